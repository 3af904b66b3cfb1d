"""A trial finds out how a right backward has to be run, and refuses one that is unreliable."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernelgraph.graph.gradients.gradient import (
    Overwrites,
    Source,
    SourceKind,
)
from kernelgraph.graph.verify.verdict import Verdict
from tests.support.op_calls import own_backward
from tests.support.trials import (
    Norm,
    X,
    composite,
    norm_backward,
    norm_function,
    right_backward,
    verdict,
)


def saves_the_output(ctx, x, w, y):
    ctx.save_for_backward(x, w, y)


def from_the_output(ctx, g):
    x, w, y = ctx.saved_tensors
    r = y / (x * w)
    gw = (g * y / w).sum_to_size(w.shape)
    g = g * w
    return r * g - x * r**3 * (g * x).mean(-1, keepdim=True), gw


def saves_its_own(ctx, x, w, y):
    ctx.save_for_backward(x.clone(), w.clone())


def holds_its_input(ctx, x, w, y):
    ctx.x = x
    ctx.save_for_backward(w)


def holds_its_output(ctx, x, w, y):
    ctx.y = y
    ctx.save_for_backward(x, w)


def into_operands(ctx, g):
    x, w = ctx.saved_tensors
    gx, gw = norm_backward(g, x, w)
    return x.copy_(gx), w.copy_(gw)


def into_gradient(ctx, g):
    gx, gw = norm_backward(g, *ctx.saved_tensors)
    return g.copy_(gx), gw


def into_its_own(ctx, g):
    x, w = ctx.saved_tensors
    gx, gw = norm_backward(g, x, w)
    return x.copy_(gx), w.copy_(gw)


def once(ctx, g):
    x = ctx.__dict__.pop("x")
    return norm_backward(g, x.clone(), *ctx.saved_tensors)


def by_autograd(ctx, g):
    with torch.enable_grad():
        x, w = (v.detach().requires_grad_() for v in ctx.saved_tensors)
        return torch.autograd.grad(composite(SimpleNamespace(weight=w), x), (x, w), g)


OPERANDS = (Source(SourceKind.OPERAND, 0), Source(SourceKind.OPERAND, 1))

RIGHT = {
    "torch": (composite, own_backward((0, 1), (), (True,))),
    "function": (norm_function(right_backward), own_backward((0, 1), (), (True,))),
    "saved output": (
        norm_function(from_the_output, saves_the_output),
        own_backward((0, 1), (0,), (True,)),
    ),
    "own copies": (norm_function(right_backward, saves_its_own), own_backward((), (), (True,))),
    "holds its input": (
        norm_function(
            lambda ctx, g: norm_backward(g, ctx.x, *ctx.saved_tensors),
            holds_its_input,
        ),
        own_backward((), (), (True,), hidden_saves=True),
    ),
    "holds its output": (
        norm_function(
            lambda ctx, g: norm_backward(g + 0 * ctx.y, *ctx.saved_tensors), holds_its_output
        ),
        own_backward((), (), (True,), hidden_saves=True),
    ),
    "writes into operands": (
        norm_function(into_operands),
        own_backward((0, 1), (), (True,), overwrites=Overwrites(saved=OPERANDS)),
    ),
    "writes into the gradient": (
        norm_function(into_gradient),
        own_backward((0, 1), (), (True,), overwrites=Overwrites(grads=(0,))),
    ),
    "writes into its own": (
        norm_function(into_its_own, saves_its_own),
        own_backward((), (), (True,), overwrites=Overwrites(private=True)),
    ),
    "uses autograd": (
        norm_function(by_autograd),
        own_backward((0, 1), (), (True,))._replace(uses_autograd=True),
    ),
    "runs once": (
        norm_function(
            once, lambda ctx, x, w, y: (setattr(ctx, "x", x.clone()), ctx.save_for_backward(w))
        ),
        own_backward((1,), (), (True,)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", RIGHT)
def test_right_backward_is_found_with_what_it_needs(what, dtype):
    forward, own = RIGHT[what]
    assert verdict(Norm(dtype=dtype), forward, X.to(dtype)) == Verdict(own)


@pytest.mark.parametrize("what", RIGHT)
def test_needs_of_a_backward_are_found_without_the_reference(what):
    class Unknown(Norm):
        def forward(self, x):
            raise AssertionError("the reference is not run")

    forward, own = RIGHT[what]
    assert verdict(Unknown(), forward, X, compare=False) == Verdict(own)


@pytest.mark.parametrize("layout", ["gaps", "rows"])
def test_backward_may_need_contiguous_gradients(layout):
    def as_if_contiguous(ctx, g):
        x, w = ctx.saved_tensors
        if layout == "gaps":  # it knows how long a row is in memory
            flat = g.as_strided(g.shape, (g.stride(0), 1))
        else:
            flat = g if g.stride(-1) != 1 else g.as_strided(g.shape, (g.shape[-1], 1))
        return norm_backward(flat, x, w)

    assert verdict(Norm(), norm_function(as_if_contiguous), X) == Verdict(
        own_backward((0, 1), (), (True,)), contiguous=True
    )

    def refuses(ctx, g):
        if not g.is_contiguous():
            raise ValueError("not contiguous")
        return norm_backward(g, *ctx.saved_tensors)

    assert verdict(Norm(), norm_function(refuses), X).contiguous


def test_backward_that_depends_on_earlier_runs_is_refused():
    """Its gradients differ each time that it runs, with copies or without."""

    def backward(ctx, g):
        ctx.count = getattr(ctx, "count", 0) + 1
        gx, gw = norm_backward(g, *ctx.saved_tensors)
        return gx * ctx.count, gw

    found = verdict(Norm(), norm_function(backward), X)
    assert found.wrong == "its backward gives other gradients when it is run again"


def test_gradient_that_is_none_counts_as_zeros():
    class Unused(nn.Module):
        def forward(self, x, y):
            return x * 2 + 0 * y

    assert verdict(Unused(), lambda self, x, y: x * 2, X, X).own is not None


def test_layer_may_return_its_operand():
    class Identity(nn.Module):
        def forward(self, x):
            return x

    assert verdict(Identity(), lambda self, x: x, X).own is not None
    assert verdict(Identity(), lambda self, x: x.detach(), X).own is None


def test_weights_of_the_layer_keep_their_values():
    module = Norm()
    verdict(module, norm_function(into_operands), X)
    assert torch.equal(module.weight, torch.ones(16))
    assert module.weight.grad is None


@pytest.mark.cuda
@pytest.mark.parametrize("what", RIGHT)
def test_right_backward_is_found_on_a_gpu(what):
    forward, own = RIGHT[what]
    assert verdict(Norm().cuda(), forward, X.cuda()) == Verdict(own)
