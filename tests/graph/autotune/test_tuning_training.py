"""``policy="fastest"`` in training: the backward counts, and gradients are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernelgraph import LocalLayerRepository, last_report, use_kernel_mapping
from kernelgraph.graph.autotune import candidates, records
from kernelgraph.report import Reason
from tests.support.costs import Work, kernel, spend
from tests.support.toy_repository import write_repository
from tests.support.tuned_models import compiled, mapping, reasons, run, stack

TRACEABLE = """
import torch

class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = {gradient}
        return grad * weight, (grad * x).sum(0)

class Traceable(torch.nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, x):
        return torch.ops.kernelgraph_tests_costs.spend(Times.apply(x, self.weight) + 1, 0.5)
"""


def test_time_of_the_backward_counts():
    """The kernel is faster forward, and its backward makes it slower."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return spend(x * weight + 1, 0.1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, weight = ctx.saved_tensors
            spend(grad, 5.0)
            return grad * weight, (grad * x).sum(0)

    class SlowBackward(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Function.apply(x, self.weight)

    model = stack(1.0)[:1]
    with mapping(Work=SlowBackward):
        run(model)
        assert reasons() == [Reason.KERNEL]
        out = compiled(model, inner="aot_eager")(torch.randn(3, 4))
    assert reasons() == [Reason.SLOWER]
    out.sum().backward()
    assert model[0].weight.grad is not None


def test_backward_in_a_trial_or_contest_runs_in_the_tracing_thread():
    """In a device's own thread, a backward that compiles would wait for a lock of this one."""
    apart: list[bool] = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x * weight + 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            apart.append(not torch._C._is_multithreading_enabled())
            x, weight = ctx.saved_tensors
            return grad * weight, (grad * x).sum(0)

    class Kernel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Function.apply(x, self.weight)

    with mapping(Work=Kernel):
        out = compiled(stack(1.0)[:1], inner="aot_eager")(torch.randn(3, 4))
    assert apart
    assert all(apart)
    apart.clear()
    out.sum().backward()
    assert apart == [False]


def test_kernel_that_wins_trains_with_right_gradients():
    torch.manual_seed(0)
    model = stack(1.0)[:1]
    x = torch.randn(3, 4)
    with mapping(Work=kernel(0.5, plus=0.0)):
        compiled(model, inner="aot_eager")(x).square().sum().backward()
    assert reasons() == [Reason.KERNEL]
    found, model[0].weight.grad = model[0].weight.grad, None
    model(x).square().sum().backward()
    torch.testing.assert_close(found, model[0].weight.grad)


@pytest.mark.parametrize("wrong", [True, False])
def test_kernel_is_traced_only_with_right_gradients(tmp_path, monkeypatch, wrong):
    """A traced kernel has the gradient of its own ops, which kernelgraph cannot replace."""
    source = TRACEABLE.format(gradient="grad * 7" if wrong else "grad")
    files = {"__init__.py": "from . import layers\n", "layers.py": source}
    write_repository(tmp_path / "kernels", files)
    repository = LocalLayerRepository(tmp_path / "kernels", layer_name="Traceable")
    own = candidates.program

    def program(region: Any, untuned: Any, candidate: Any) -> Any:
        made = own(region, untuned, candidate)
        if candidate.implementation is records.Implementation.OP:  # the op costs more here
            node = next(n for n in made.graph.nodes if n.op == "output")
            with made.graph.inserting_before(node):
                first = made.graph.call_function(
                    torch.ops.kernelgraph_tests_costs.spend, (node.args[0][0], 0.3)
                )
            node.args = ((first, *node.args[0][1:]),)
            made.recompile()
        return made

    monkeypatch.setattr(candidates, "program", program)
    torch.manual_seed(0)
    model, x = stack(1.0)[:1], torch.randn(3, 4)
    kernels = {"Work": {"cpu": repository}}
    with use_kernel_mapping(kernels, inherit_mapping=False):
        out = compiled(model, inner="aot_eager")(x)
    out.square().sum().backward()
    # With the recomputed gradient of the layer, the kernel costs more than the layer.
    assert reasons() == [Reason.SLOWER if wrong else Reason.KERNEL]
    assert ("traced" in last_report().decisions[0].detail) is not wrong
    found, model[0].weight.grad = model[0].weight.grad, None
    model(x).square().sum().backward()
    torch.testing.assert_close(found, model[0].weight.grad)


@pytest.mark.parametrize(("seconds", "reason"), [(0.5, Reason.KERNEL), (9.0, Reason.SLOWER)])
def test_layer_in_a_checkpointed_block_is_tuned(seconds, reason):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.work, self.linear = Work(1.0), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(lambda x: self.linear(self.work(x)), x, use_reentrant=False)
            return torch.relu(y)

    torch.manual_seed(0)
    model, x = Block(), torch.randn(3, 4)
    with mapping(Work=kernel(seconds, plus=0)):
        out = compiled(model, inner="aot_eager")(x)
    out.sum().backward()
    assert reasons() == [reason]
    assert "not measured" not in last_report().decisions[0].detail
    found, model.work.weight.grad = model.work.weight.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(found, model.work.weight.grad)
