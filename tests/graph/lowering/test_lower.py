"""Kernels with wrong gradients in compiled graphs: the report, the WARNING and the options."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import Mode, kernelize, last_report, rewrite, use_kernel_mapping
from kernelgraph.graph.fx.tracer import Tracer
from kernelgraph.report import Decision, Reason
from tests.support.toy_models import Scale, on_cpu

runs: list[str] = []


class ScaleFunction(torch.autograd.Function):
    """Its gradients are ``factor`` times what they should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shift: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor = factor
        return x * weight + shift

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        runs.append("backward")
        x, weight = ctx.saved_tensors
        grad = grad * ctx.factor
        return grad * weight, (grad * x).sum(0), None, None


class Right(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ScaleFunction.apply(x, self.weight, self.shift + self.eps, 1.0)


class Doubles(nn.Module):
    """Its gradients are twice what they should be."""

    def forward(self, x: Tensor) -> Tensor:
        return ScaleFunction.apply(x, self.weight, self.shift + self.eps, 2.0)


class Stops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(
            x.detach().numpy() * self.weight.detach().numpy() + self.shift.numpy() + self.eps
        )


class Plus10(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.shift + self.eps + 10


def trained(kernel: type[nn.Module], **options: Any) -> tuple[Tensor, Tensor, Decision]:
    """The result and the gradient of a layer that is compiled with ``kernel``, and the decision."""
    torch.manual_seed(0)
    layer, x = Scale(), torch.randn(3, 4)
    options = {"inner": "aot_eager", **options}
    with use_kernel_mapping(on_cpu(Scale=kernel), inherit_mapping=False):
        compiled = torch.compile(layer, backend="hubkernels", fullgraph=True, options=options)
        runs.clear()
        y = compiled(x)
        y.square().sum().backward()
    report = last_report()
    assert report is not None
    assert layer.weight.grad is not None
    return y.detach(), layer.weight.grad, report.decisions[0]


def expected() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    layer, x = Scale(), torch.randn(3, 4)
    y = layer(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), layer.weight)[0]


def test_right_kernel_keeps_its_own_backward():
    y, grad, decision = trained(Right)
    torch.testing.assert_close((y, grad), expected())
    assert (decision.reason, decision.gradient) == (Reason.KERNEL, "kernel")
    assert runs[-1:] == ["backward"]


@pytest.mark.parametrize(
    ("kernel", "why"), [(Doubles, "is 2 times the layer's"), (Stops, "it has no backward")]
)
def test_wrong_gradient_is_replaced_by_that_of_the_layer(kernel, why, caplog, monkeypatch):
    monkeypatch.setattr("kernelgraph.report._warned", set())
    for _ in range(2):
        torch.compiler.reset()
        y, grad, decision = trained(kernel)
        torch.testing.assert_close((y, grad), expected())
        assert decision.uses_kernel
        assert decision.gradient.startswith("reference: ")
        assert why in decision.gradient
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    message = warning.getMessage()
    assert kernel.__name__ in message
    assert "layer Scale" in message
    assert why in message
    assert "runs the layer's own forward again" in message


@pytest.mark.parametrize("kernel", [Doubles, Stops])
def test_wrong_gradient_keeps_the_reference_if_asked(kernel):
    y, grad, decision = trained(kernel, wrong_gradient="reference")
    torch.testing.assert_close((y, grad), expected())
    assert (decision.reason, decision.op) == (Reason.WRONG, "")


def test_kernel_with_a_wrong_output_is_not_used_in_training():
    y, grad, decision = trained(Plus10)
    torch.testing.assert_close((y, grad), expected())
    assert decision.reason is Reason.WRONG


def test_wrong_gradient_is_used_if_it_is_not_verified():
    _, grad, decision = trained(Doubles, verify_gradients=False)
    torch.testing.assert_close(grad, 2 * expected()[1])
    assert decision.gradient == "kernel"


def test_own_backward_option_recomputes_all_gradients():
    y, grad, decision = trained(Right, own_backward=False)
    torch.testing.assert_close((y, grad), expected())
    assert decision.gradient == "reference: own_backward is False"
    assert runs == []


def test_arguments_of_kernelize_count_in_a_compiled_graph():
    layer, x = Scale(), torch.randn(3, 4)
    for verify, factor in ((True, 1), (False, 2)):
        with use_kernel_mapping(on_cpu(Scale=Doubles), inherit_mapping=False):
            kernelize(layer, mode=Mode.TRAINING | Mode.TORCH_COMPILE, verify_gradients=verify)
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for run in (compiled, layer):
            (grad,) = torch.autograd.grad(run(x).sum(), layer.weight)
            torch.testing.assert_close(grad, factor * x.sum(0))


def test_rewrite_verifies_gradients_too():
    model, x = nn.Sequential(Scale()), torch.randn(3, 4)
    for wrong, ops in (("recompute", 1), ("reference", 0)):
        graph_module = torch.fx.GraphModule(model, Tracer().trace(model))
        with use_kernel_mapping(on_cpu(Scale=Doubles), inherit_mapping=False):
            rewrite(graph_module, mode=Mode.TRAINING, example_inputs=(x,), wrong_gradient=wrong)
        assert sum("hubkernels" in str(n.target) for n in graph_module.graph.nodes) == ops
        (grad,) = torch.autograd.grad(graph_module(x).sum(), model[0].weight)
        torch.testing.assert_close(grad, x.sum(0))
