"""A norm and its kernels, with backwards of their own, as an op for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kernelgraph.graph.ops.backward import ByKernel
from tests.support.op_calls import Op, body_of, lowered, own_backward

runs: list[str] = []
"""What has run: ``forward`` and ``backward`` of a kernel, and ``reference``."""


def note_run(what: str, x: Tensor) -> None:
    if not isinstance(x, FakeTensor):
        runs.append(what)


class Norm(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.eps = 0.25

    def forward(self, x: Tensor) -> Tensor:
        note_run("reference", x)
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class NormFunction(torch.autograd.Function):
    """A norm that saves an operand, two parts of one, a result, and a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, weight: Tensor) -> Tensor:
        note_run("forward", x)
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        y = x * scale * weight
        ctx.save_for_backward(x, weight[1:], weight[:1], scale, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        runs.append("backward")
        x, most, first, scale, y = ctx.saved_tensors
        weight = torch.cat([first, most])
        normed = x * scale
        slope = (grad * y).mean(-1, keepdim=True)
        of_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return scale * (grad * weight - normed * slope), None, of_weight


class NormKernel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NormFunction.apply(x, self.eps, self.weight)


OWN = own_backward(operands=(0, 1), results=(0,), flows=(True,))


class PlainKernel(nn.Module):
    """A norm in several nodes of ordinary autograd."""

    def forward(self, x: Tensor) -> Tensor:
        note_run("forward", x)
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).pow(-0.5) * self.weight


KERNELS = {"function": NormKernel, "autograd": PlainKernel}


def waiting(op: Op) -> int:
    """Return the number of forwards of an op that wait for their backward."""
    body = body_of(op)
    assert isinstance(body, ByKernel)
    return len(body.tapes)


def norm(toy: type[nn.Module] = NormKernel, x: Tensor | None = None, **kwargs: Any) -> Op:
    """Return the op for training that calls ``toy`` for a norm of ``x``."""
    x = torch.randn(3, 4) if x is None else x
    op = lowered(Norm(), toy, x, own=kwargs.pop("own", OWN), **kwargs)
    runs.clear()
    return op


def model(op: Op) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a model with the op between other ops, whose buffers a compiler may reuse."""

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return call(op, x.sin(), weight).cos() * 2

    return run


def call(op: Op, x: Tensor, weight: Tensor) -> Tensor:
    """Call the op of a norm, and return the norm without the handle."""
    return op.overload(x, weight, 0.25)[0]


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """Compute what `model` computes, without the op."""
    x = x.sin()
    y = x * (x.square().mean(-1, keepdim=True) + 0.25).rsqrt() * weight
    return y.cos() * 2


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    """Return an input and a weight that require gradients."""
    x = torch.randn(*(shape or (3, 4)), requires_grad=True)
    return x, torch.linspace(0.5, 1.5, x.shape[-1]).requires_grad_()


def assert_gradients(run: Callable[..., Tensor], *shape: int) -> None:
    """Compare the gradients of ``run`` with those of `reference`."""
    x, weight = inputs(*shape)
    made = torch.autograd.grad(run(x, weight).square().sum(), (x, weight))
    expected = torch.autograd.grad(reference(x, weight).square().sum(), (x, weight))
    torch.testing.assert_close(made, expected)
