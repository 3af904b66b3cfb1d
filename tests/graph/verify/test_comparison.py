"""What a trial compares, and how exactly: dtypes, rounding, and tables with equal halves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from kernelgraph.graph.verify.verdict import Verdict
from tests.support.op_calls import own_backward
from tests.support.trials import (
    Norm,
    X,
    composite,
    times,
    verdict,
)


class Linear(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, dtype=dtype) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) @ self.weight


class Matmul(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mH, x.mH @ g


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_compared(dtype):
    module, x = Linear(dtype), torch.randn(6, 16, dtype=dtype)
    assert verdict(module, lambda self, x: Matmul.apply(x, self.weight), x).own is not None
    assert verdict(module, lambda self, x: torch.view_as_complex(parts(x @ self.weight)), x).output


def parts(y: Tensor) -> Tensor:
    """Return the real and imaginary parts of ``y``, the latter with the wrong sign."""
    return torch.view_as_real(y) * torch.tensor([1.0, -1.0], dtype=y.real.dtype)


def test_float8_operands_are_compared():
    x = torch.randn(6, 16).to(torch.float8_e4m3fn)

    def forward(self, x):
        return Matmul.apply(x.float(), self.weight)

    assert verdict(Linear(), forward, x, wanted=(False, True)).own is not None
    found = verdict(Linear(), lambda self, x: forward(self, x).detach(), x, wanted=(False, True))
    assert found.own is None


def test_scalars_are_compared():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x, factor):
            return x * self.weight * factor

    def forward(self, x, factor):
        return factor * self.weight * x

    assert verdict(Scale(), forward, torch.tensor(3.0), 2).own is not None
    assert verdict(Scale(), forward, torch.randn(40, 1), 0.5).own is not None
    found = verdict(Scale(), lambda self, x, f: forward(self, x, f).sin(), torch.tensor(3.0), 2)
    assert found.output


def test_calls_under_autocast_are_compared():
    def forward(self, x):
        return Matmul.apply(x.bfloat16(), self.weight.bfloat16())

    with torch.autocast("cpu", torch.bfloat16):
        assert verdict(Linear(), forward, torch.randn(40, 16)).own is not None
        found = verdict(Linear(), lambda self, x: forward(self, times(x, 2.0)), torch.randn(40, 16))
        assert found.wrong == "the gradient of x is 2 times the layer's"


class Summing(nn.Module):
    """A layer that rounds its sum at each step."""

    def forward(self, x):
        total = x[:, 0]
        for i in range(1, x.shape[1]):
            total = total + x[:, i]
        return total * total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_more_exact_than_its_layer_may_train(dtype):
    x = torch.randn(4, 2048).to(dtype)

    def better(self, x):
        return x.float().sum(1).square().to(x.dtype)

    assert verdict(Summing(), better, x).own is not None
    found = verdict(Summing(), lambda self, x: better(self, x) * 2, x)
    assert found.output


def test_kernel_far_less_exact_than_its_layer_is_refused():
    class Sum(nn.Module):
        def forward(self, x):
            return x.double().sum(1).square().to(x.dtype)

    x = torch.randn(4, 4096, dtype=torch.bfloat16)
    assert verdict(Sum(), lambda self, x: Summing.forward(self, x), x).output


def test_products_in_tf32_may_train():
    def cut(t):
        return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)

    class Cut(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return cut(x) @ cut(w)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return cut(g) @ cut(w).t(), cut(x).t() @ cut(g)

    assert verdict(Linear(), lambda self, x: Cut.apply(x, self.weight), torch.randn(9, 16)).own


@pytest.mark.parametrize("which", ["kernel", "layer", "both"])
def test_float32_inside_a_float64_call_may_train(which):
    """Many layers compute in float32 whatever they receive."""

    def single(self, x):
        weight = self.weight.float()
        return composite(SimpleNamespace(weight=weight), x.float()).to(x.dtype)

    class Single(Norm):
        def forward(self, x):
            return single(self, x)

    module = (Norm if which == "kernel" else Single)(dtype=torch.float64)
    forward = composite if which == "layer" else single
    assert verdict(module, forward, X.double()).own is not None


class Rotary(nn.Module):
    def forward(self, x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


def rotated(x: Tensor, cos: Tensor, sin: Tensor, back: float = 1.0) -> Tensor:
    """Rotate ``x``, relying on equal halves of the tables."""
    half = x.shape[-1] // 2
    cos, sin, (first, second) = cos[..., :half], sin[..., :half] * back, x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Rotate(Function):
    @staticmethod
    def forward(ctx, x, cos, sin, back):
        ctx.save_for_backward(cos, sin)
        ctx.back = back
        return rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, g):
        return rotated(g, *ctx.saved_tensors, back=ctx.back), None, None, None


@pytest.mark.parametrize("batch", [1, 2])
def test_kernel_may_rely_on_equal_halves_of_rotary_tables(batch):
    angles = torch.randn(1, 7, 8)
    cos, sin = (torch.cat([t, t], -1).expand(batch, 7, 16) for t in (angles.cos(), angles.sin()))
    args = torch.randn(batch, 7, 16), cos, sin
    x_only = (True, False, False)

    def forward(self, x, cos, sin):
        return Rotate.apply(x, cos, sin, -1.0)

    def identity(self, x, cos, sin):
        return Rotate.apply(x, cos, sin, 1.0)

    assert verdict(Rotary(), forward, *args, wanted=x_only) == Verdict(
        own_backward((1, 2), (), (True,))
    )
    found = verdict(Rotary(), identity, *args, wanted=x_only)
    assert found.wrong.startswith("the gradient of x is off by")
    assert verdict(Rotary(), forward, *args).output, "whoever wants all gradients has any tables"
    worse = verdict(Rotary(), lambda self, *a: forward(self, *a) * 2, *args, wanted=x_only)
    assert worse.output
