"""Ops whose kernel is one ``torch.autograd.Function``, which bypasses autograd from its second call
on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph.graph.gradients.bypass import BypassedCall, intercept_apply
from kernelgraph.graph.gradients.tape import Tape
from kernelgraph.graph.ops.backward import ByKernel
from tests.support.norm_op import (
    NormFunction,
    call,
    inputs,
    norm,
)
from tests.support.op_calls import Op, body_of, lowered, own_backward
from tests.support.op_toys import hub_layer


@torch.library.custom_op("training_test::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


@scaled.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward_of_scaled(ctx: Any, grad: Tensor) -> Any:
    x, weight = ctx.saved_tensors
    return grad * weight, (grad * x).sum(0)


scaled.register_autograd(backward_of_scaled, setup_context=save_inputs)


class Split(torch.autograd.Function):
    """A function whose forward receives no context."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    setup_context = staticmethod(save_inputs)
    backward = staticmethod(backward_of_scaled)


class Views(torch.autograd.Function):
    """Saves views of its operands and result; returns a gradient that has to be summed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        y = x * weight
        ctx.save_for_backward(x.view(-1, 2, 2), weight[:2], weight[2:], y.flatten())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, low, high, y = ctx.saved_tensors
        weight = torch.cat([low, high])
        assert torch.equal(y.view_as(grad), x.view_as(grad) * weight)
        return grad * x.view_as(grad), grad * weight


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


FUNCTIONS = {
    "op": (lambda self, x: scaled(x, self.weight), ()),
    "split": (lambda self, x: Split.apply(x, self.weight), ()),
    "views": (lambda self, x: Views.apply(self.weight, x), (0,)),
}


def tapes_of(op: Op) -> list[type]:
    """Return the types of the tapes that wait for a backward of an op."""
    body = body_of(op)
    assert isinstance(body, ByKernel)
    return [type(tape) for tape, _ in body.tapes._kept.values()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_bypasses_autograd_from_its_second_call_on(name):
    forward, results = FUNCTIONS[name]
    op = lowered(
        Scaled(), hub_layer(forward), torch.ones(3, 4), own=own_backward((0, 1), results, (True,))
    )
    for expected in (Tape, BypassedCall, BypassedCall):
        x, weight = inputs()
        y = op.overload(x, weight)[0]
        assert tapes_of(op) == [expected]
        made = torch.autograd.grad(y.square().sum(), (x, weight))
        wanted = torch.autograd.grad((x * weight).square().sum(), (x, weight))
        torch.testing.assert_close(made, wanted)
        del y
    x, weight = inputs(5, 4)  # other sizes are checked again
    y = op.overload(x, weight)[0]
    assert tapes_of(op) == [Tape]
    del y


@pytest.mark.parametrize("change", ["argument", "result", "saved", "twice", "error"])
def test_call_unlike_the_first_runs_on_a_tape(change):
    """A kernel may depend on values in any way: its gradient is right."""

    class Scales(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            y = x * weight
            other = changed and change == "saved"
            ctx.save_for_backward(x.clone() if other else x, weight)
            if changed and change == "error":
                ctx.mark_dirty()
            return y

        backward = staticmethod(backward_of_scaled)

    def forward(self, x):
        if changed and change == "argument":
            return Scales.apply(x * 2, self.weight)
        y = Scales.apply(x, self.weight)
        if changed and change == "result":
            return y * 2
        if changed and change == "twice":
            return Scales.apply(x, self.weight)
        return y

    op = lowered(
        Scaled(), hub_layer(forward), torch.ones(3, 4), own=own_backward((0, 1), (), (True,))
    )
    changed = False
    x, weight = inputs()
    for _ in range(2):
        op.overload(x, weight)
    changed = True
    factor = 2 if change in ("argument", "result") else 1
    for _ in range(3):
        y = op.overload(x, weight)[0]
        assert tapes_of(op) == [Tape]
        made = torch.autograd.grad(y.square().sum(), (x, weight))
        expected = torch.autograd.grad((x * weight * factor).square().sum(), (x, weight))
        torch.testing.assert_close(made, expected)
        del y


class Conjugates(torch.autograd.Function):
    """``x * weight``, conjugated lazily."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x * weight).conj()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad.conj() * weight.conj(), (grad.conj() * x.conj()).sum(0)


class Signs(torch.autograd.Function):
    """``x * weight``, negated lazily."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.complex(x, x * weight).conj().imag

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return -grad * weight, -(grad * x).sum(0)


@pytest.mark.parametrize("function", [Conjugates, Signs])
def test_lazily_conjugated_or_negated_results_are_resolved(function):
    class Signed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            dtype = torch.complex64 if function is Conjugates else torch.float32
            self.weight = nn.Parameter(torch.full((1,), 1.5, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight
            return y.conj_physical() if x.is_complex() else -y

    module = Signed()
    x = torch.randn(1, 1, dtype=module.weight.dtype, requires_grad=True)
    forward = hub_layer(lambda self, x: function.apply(x, self.weight))
    op = lowered(module, forward, x, own=own_backward((0, 1), (), (True,)))
    for _ in range(3):
        y, expected = op.overload(x, module.weight)[0], module(x)
        assert not y.is_conj()
        assert not y.is_neg()
        torch.testing.assert_close(y, expected)
        wanted = (x, module.weight)
        made = torch.autograd.grad(y.abs().sum(), wanted)
        torch.testing.assert_close(made, torch.autograd.grad(expected.abs().sum(), wanted))


class Twice(torch.autograd.Function):
    """``x * weight``, and a part of that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        y = x * weight
        return y, y[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_part: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = torch.cat([grad[:1], grad[1:] + of_part])
        return grad * weight, (grad * x).sum(0)


def test_results_that_share_memory_are_separated():
    class Parted(Scaled):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.weight, x[1:] * self.weight

    module, x = Parted(), torch.randn(3, 4, requires_grad=True)
    forward = hub_layer(lambda self, x: Twice.apply(x, self.weight))
    op = lowered(module, forward, x, own=own_backward((0, 1), (), (True, True)))
    for _ in range(3):
        whole, part = op.overload(x, module.weight)[:2]
        expected = module(x)
        torch.testing.assert_close((whole, part), expected)
        wanted = (x, module.weight)
        made = torch.autograd.grad(whole.sum() + part.square().sum(), wanted)
        summed = expected[0].sum() + expected[1].square().sum()
        torch.testing.assert_close(made, torch.autograd.grad(summed, wanted))
        before = part.clone()
        whole.data.fill_(99)
        assert torch.equal(part, before)


def test_caught_function_is_unchanged_for_other_callers():
    op = norm()
    for _ in range(2):
        op()
    x, weight = inputs()
    made = torch.autograd.grad(NormFunction.apply(x, 0.25, weight).sum(), (x, weight))
    expected = torch.autograd.grad(call(op, x, weight).sum(), (x, weight))
    torch.testing.assert_close(made, expected)

    class Derived(NormFunction):
        pass

    assert Derived.apply(x, 0.25, weight).grad_fn is not None
    assert intercept_apply(Split)
    expected = torch.autograd.grad((x * weight).sum(), (x, weight))
    for run in (Split.apply, lambda x, weight: Split.apply(x, weight)):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        made = torch.autograd.grad(compiled(x, weight).sum(), (x, weight))
        torch.testing.assert_close(made, expected)


def test_result_without_a_gradient_counts_as_zeros():
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            return x * 2, x * 3

        @staticmethod
        def backward(ctx: Any, double: Tensor, triple: Tensor) -> Tensor:
            return double * 2 + triple * 3

    layer = type("Layer", (nn.Module,), {"forward": lambda self, x: (x * 2, x * 3)})
    x = torch.randn(3, 4, requires_grad=True)
    own = own_backward((), (), (True, True))
    op = lowered(layer(), hub_layer(lambda self, x: Both.apply(x)), x, own=own)
    for _ in range(2):
        double, triple = op()
        (grad,) = torch.autograd.grad(triple.sum(), x, retain_graph=True)
        assert torch.equal(grad, torch.full_like(x, 3.0))
        (grad,) = torch.autograd.grad(double.sum() + triple.sum(), x)
        assert torch.equal(grad, torch.full_like(x, 5.0))
