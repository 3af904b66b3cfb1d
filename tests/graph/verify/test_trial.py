"""Kernels with wrong outputs or gradients are refused, and the verdict says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from kernelgraph.graph.verify.trial import judge
from kernelgraph.graph.verify.verdict import Verdict
from tests.support.op_calls import call_of, layer_of, own_backward
from tests.support.trials import (
    EPS,
    Norm,
    X,
    composite,
    forget_verdicts,
    kernel,
    norm_backward,
    norm_function,
    right_backward,
    scaled,
    verdict,
)


def with_gradients_of(other: Callable[[Any, Tensor], Tensor]) -> Callable[..., Any]:
    """Return a forward with the norm's output, and the gradients of ``other``."""

    def forward(self, x):
        made = other(self, x)
        return composite(self, x).detach() + (made - made.detach())

    return forward


def from_numpy(self, x):
    x, w = x.detach().numpy(), self.weight.detach().numpy()
    return torch.from_numpy(x / ((x * x).mean(-1, keepdims=True) + EPS) ** 0.5 * w)


def ignores_weight(ctx, g):
    x, w = ctx.saved_tensors
    return norm_backward(g, x, torch.ones_like(w))[0], norm_backward(g, x, w)[1]


def raises(ctx, g):
    raise NotImplementedError("no backward\nyet")


WRONG_GRADIENTS = {
    "numpy": (from_numpy, "it has no backward: no gradient flows through what it returns"),
    "detach": (lambda self, x: composite(self, x).detach(), "it has no backward"),
    "no_grad": (torch.no_grad()(composite), "it has no backward"),
    "zero": (
        norm_function(lambda ctx, g: tuple(map(torch.zeros_like, ctx.saved_tensors))),
        "the gradient of x is zero; the gradient of weight is zero",
    ),
    "identity": (
        with_gradients_of(lambda self, x: x + 0 * self.weight),
        "the gradient of x is off by 0.",
    ),
    "factor 2": (scaled(2, 1), "the gradient of x is 2 times the layer's"),
    "factor 1.01": (scaled(1.01, 1), "the gradient of x is 1.01 times the layer's"),
    "sign": (scaled(1, -1), "the gradient of weight is -1 times the layer's"),
    "both": (
        scaled(0.5, 3),
        "the gradient of x is 0.5 times the layer's; the gradient of weight is 3 times the layer's",
    ),
    "one missing": (
        norm_function(lambda ctx, g: (norm_backward(g, *ctx.saved_tensors)[0], None)),
        "the gradient of weight is missing",
    ),
    "one stops": (
        lambda self, x: (
            x * torch.rsqrt((x * x).mean(-1, keepdim=True).detach() + EPS) * self.weight
        ),
        "the gradient of x is off by 0.",
    ),
    "ignores the weight": (norm_function(ignores_weight), "the gradient of x is off by 0."),
    "nan": (
        norm_function(lambda ctx, g: tuple(t * float("nan") for t in ctx.saved_tensors)),
        "the gradient of x is not finite where the layer's is",
    ),
    "raises": (
        norm_function(raises),
        "where gradients are wanted it raised NotImplementedError: no backward",
    ),
}


@pytest.mark.parametrize("what", WRONG_GRADIENTS)
def test_wrong_gradient_is_refused(what):
    forward, message = WRONG_GRADIENTS[what]
    found = verdict(Norm(), forward, X)
    assert found.own is None
    assert found.wrong.startswith(message)
    assert found.output == ""


def test_gradient_that_is_not_wanted_is_not_compared():
    assert verdict(Norm(), scaled(2, 1), X, wanted=(False, True)).own is not None
    assert verdict(Norm(), scaled(1, 2), X, wanted=(True, False)).own is not None
    assert verdict(Norm(), scaled(1, 2), X, wanted=(False, True)).own is None


def test_gradient_wrong_for_some_layouts_is_refused_for_them():
    """A kernel that ignores strides and broadcasting is right where there are none."""

    def as_if_contiguous(ctx, g):
        x, w = ctx.saved_tensors
        flat = x.as_strided(x.shape, torch.empty(x.shape).stride())
        return norm_backward(g, flat, w)

    forward = norm_function(as_if_contiguous)
    assert verdict(Norm(), forward, X).own is not None
    assert verdict(Norm(), forward, torch.randn(16, 40).t()[:, :16]).own is None


def test_gradient_wrong_under_broadcasting_is_refused():
    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    class Adds(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.shapes = x.shape, y.shape
            return x + y

        @staticmethod
        def backward(ctx, g):
            return tuple(g[tuple(slice(n) for n in shape)].clone() for shape in ctx.shapes)

    def forward(self, x, y):
        return Adds.apply(x, y)

    assert verdict(Add(), forward, X, X).own is not None
    found = verdict(Add(), forward, X, torch.randn(1, 16))
    assert found.wrong.startswith("the gradient of y is off by ")
    found = verdict(Add(), forward, torch.randn(64, 1), torch.randn(1, 16))
    assert "the gradient of x" in found.wrong


def test_gradient_missing_from_one_of_two_results_is_refused():
    class Two(nn.Module):
        def forward(self, x):
            return x.sin(), {"y": x.cos(), "n": 3}

    right_backward = verdict(Two(), lambda self, x: (x.sin(), {"y": x.cos(), "n": 3}), X)
    assert right_backward.own is not None
    assert right_backward.own.flows == (True, True)
    found = verdict(Two(), lambda self, x: (x.sin(), {"y": x.cos().detach(), "n": 3}), X)
    assert found.wrong.startswith("the gradient of x is off by ")


OUTPUTS = {
    "factor": (lambda self, x: composite(self, x) * 1.1, "it is 1.1 times the layer's"),
    "zero": (lambda self, x: composite(self, x) * 0, "it is zero"),
    "shape": (
        lambda self, x: composite(self, x).t(),
        "it returned a torch.float32 tensor of shape",
    ),
    "dtype": (lambda self, x: composite(self, x).double(), "it returned a torch.float64 tensor of"),
    "structure": (
        lambda self, x: (composite(self, x),),
        "it returned a tuple of 1 (a tensor), and",
    ),
    "set": (lambda self, x: {x}, "it returned 'a set', and the layer a tensor"),
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_wrong_output_is_refused(what):
    forward, message = OUTPUTS[what]
    found = verdict(Norm(), forward, X)
    assert found.own is None
    assert found.output.startswith(message)
    assert found.wrong == f"its output is wrong: {found.output}"


def test_wrong_result_is_named():
    class Two(nn.Module):
        def forward(self, x):
            return x.sin(), x.argmax(-1)

    found = verdict(Two(), lambda self, x: (x.sin(), x.argmin(-1)), X)
    assert found.output.startswith("result 1 is off by")


def test_without_the_reference_only_a_missing_backward_is_refused():
    assert verdict(Norm(), scaled(2, 2), X, compare=False).own is not None
    assert verdict(Norm(), WRONG_GRADIENTS["numpy"][0], X, compare=False).own is None
    assert verdict(Norm(), WRONG_GRADIENTS["raises"][0], X, compare=False).own is None


def why_incomparable(module: nn.Module, forward: Callable[..., Any], *args: Any) -> str:
    found = verdict(module, forward, *args)
    assert (found.own, found.output) == (None, "")
    assert found.wrong.startswith("its gradients cannot be compared: ")
    return found.wrong.partition(": ")[2]


def test_reference_that_raises_cannot_be_compared():
    class Picky(nn.Module):
        def forward(self, x):
            raise ValueError("only real inputs\nplease")

    text = "the reference raised ValueError: only real inputs"
    assert why_incomparable(Picky(), lambda self, x: x, X) == text


def test_layer_that_writes_into_its_operands_cannot_be_compared():
    class Writes(nn.Module):
        def forward(self, x, y):
            return x.mul_(y)

    found = verdict(Writes(), lambda self, x, y: x * y, X, X, wanted=(False, True))
    why = "its gradients cannot be compared: the layer writes into its operands"
    assert found == Verdict(None, why)
    assert "in-place operation" in why_incomparable(Writes(), lambda self, x, y: x * y, X, X)


def test_layer_that_sets_attributes_cannot_be_compared():
    class Counts(nn.Module):
        def forward(self, x):
            setattr(self, "seen", 1)  # noqa: B010 (as no reader of its source sees)
            return x * 2

    assert "sets seen of the layer" in why_incomparable(Counts(), lambda self, x: x * 2, X)


def test_layer_without_finite_results_cannot_be_compared():
    class Log(nn.Module):
        def forward(self, x):
            return (-x * x).log()

    message = "nothing that the layer returns for made-up inputs is finite"
    assert why_incomparable(Log(), lambda self, x: (-x * x).log(), X) == message


def test_kernel_that_draws_other_random_numbers_cannot_be_compared():
    class Noise(nn.Module):
        def forward(self, x):
            return x * torch.rand_like(x)

    assert verdict(Noise(), lambda self, x: torch.rand_like(x) * x, X).own is not None

    def other(self, x):
        torch.rand(3)
        return x * torch.rand_like(x)

    message = "the layer is random, and the kernel draws other numbers"
    assert why_incomparable(Noise(), other, X) == message


def test_sparse_operand_cannot_be_compared():
    class Dense(nn.Module):
        def forward(self, x):
            return x.to_dense()

    text = "no values can be made up for a sparse_coo Tensor"
    assert why_incomparable(Dense(), lambda self, x: x.to_dense(), X.to_sparse()) == text


def test_kernel_that_raises_is_refused():
    def forward(self, x):
        raise ValueError("no")

    found = verdict(Norm(), forward, X)
    assert found == Verdict(None, "it raised ValueError: no")


def test_out_of_memory_is_not_kept_as_a_verdict(monkeypatch):
    ran = []

    def forward(self, x):
        ran.append(1)
        if len(ran) == 1:
            raise torch.OutOfMemoryError("full")
        return composite(self, x)

    toy = kernel(forward)
    assert why_incomparable(Norm(), toy, X) == "OutOfMemoryError: full"
    forget_verdicts()
    assert verdict(Norm(), toy, X).own is not None


def dynamic(dims: int) -> StatelessSymbolicContext:
    """Return a context in which the first of so many sizes is a symbol."""
    rest = [DimDynamic.STATIC] * (dims - 1)
    return StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, *rest])


def test_verdict_is_the_same_in_the_middle_of_a_trace():
    module = Norm()
    right = norm_function(right_backward), own_backward((0, 1), (), (True,))
    for forward, own in (right, (scaled(2, 1), None)):
        toy = kernel(forward)
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fake = mode.from_tensor(torch.empty(50, 16), symbolic_context=dynamic(2))
        call, operands = call_of(module, fake, forward=toy.forward)
        assert isinstance(operands[0].shape[0], torch.SymInt)
        with mode:
            found = judge(layer_of(module), module, toy, call, operands, (True, True))
        assert found.own == own


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_verdict_is_the_same_where_gradients_are_off(mode):
    with mode():
        assert verdict(Norm(), composite, X).own is not None


@pytest.mark.cuda
@pytest.mark.parametrize("what", sorted(WRONG_GRADIENTS.keys() - {"numpy"}))
def test_wrong_gradient_is_refused_on_a_gpu(what):
    forward, message = WRONG_GRADIENTS[what]
    found = verdict(Norm().cuda(), forward, X.cuda())
    assert (found.own, found.output) == (None, "")
    assert found.wrong.startswith(message)
