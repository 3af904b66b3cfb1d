"""A layer, and kernels for it whose gradients are right, wrong, missing, or wrong at times."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import Mode, kernelize, use_kernel_forward_from_hub
from tests.support.toys import only

TRAINING = Mode.TRAINING
WIDTH = 4


@use_kernel_forward_from_hub("Gate")
class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x) * self.weight + y


# --- kernels ---------------------------------------------------------------------------------

calls: list[str] = []
"""The runs of `Correct`, in order."""


class Correct(torch.autograd.Function):
    """Has the gradient of the reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        calls.append("forward")
        ctx.save_for_backward(x, weight)
        ctx.shape = y.shape
        return torch.tanh(x) * weight + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        calls.append("backward")
        x, weight = ctx.saved_tensors
        th = torch.tanh(x)
        weights = (grad * th).reshape(-1, WIDTH).sum(0)
        return grad * weight * (1 - th * th), weights, grad.sum_to_size(ctx.shape)


class Zero(Correct):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(torch.zeros_like(g) for g in Correct.backward(ctx, grad))


class Identity(Correct):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, weights, ys = Correct.backward(ctx, grad)
        return grad, weights, ys


class Doubled(Correct):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xs, weights, ys = Correct.backward(ctx, grad)
        return 2 * xs, weights, ys


class NoWeight(Correct):
    """Has no gradient of the weight."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xs, _, ys = Correct.backward(ctx, grad)
        return xs, None, ys


class ContiguousInput(Correct):
    """Reads its input in the backward as if it were contiguous."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        strides = torch.empty(x.shape, device="meta").stride()
        th = torch.tanh(x.as_strided(x.shape, strides))
        weights = (grad * th).reshape(-1, WIDTH).sum(0)
        return grad * weight * (1 - th * th), weights, grad.sum_to_size(ctx.shape)


class NoBroadcast(Correct):
    """Is wrong where its last operand was broadcast."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xs, weights, ys = Correct.backward(ctx, grad)
        return xs, weights, grad if ctx.shape == grad.shape else torch.ones_like(ys)


class ContiguousGradient(Correct):
    """Is wrong for incoming gradients that are not contiguous."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return Correct.backward(ctx, grad if grad.is_contiguous() else torch.ones_like(grad))


class OverwritesGradient(Correct):
    """Writes into the incoming gradient."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made = Correct.backward(ctx, grad.clone())
        grad.zero_()
        return made


class OverwritesInput(Correct):
    """Writes into its input, which it saved."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        th = torch.tanh(x)
        weights = (grad * th).reshape(-1, WIDTH).sum(0)
        x.data.zero_()
        return grad * weight * (1 - th * th), weights, grad.sum_to_size(ctx.shape)


class OverwritesPrivate(Correct):
    """Writes into a tensor that its forward created and saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        th = torch.tanh(x)
        ctx.save_for_backward(th, weight)
        ctx.shape = y.shape
        return th * weight + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        th, weight = ctx.saved_tensors
        weights = (grad * th).reshape(-1, WIDTH).sum(0)
        slope = th.square_().neg_().add_(1)
        return grad * weight * slope, weights, grad.sum_to_size(ctx.shape)


class HidesSaves(Correct):
    """Keeps its input and its weight where no saved-tensor hook sees them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        ctx.x, ctx.weight, ctx.shape = x.detach(), weight.detach(), y.shape
        return torch.tanh(x) * weight + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        th = torch.tanh(ctx.x)
        weights = (grad * th).reshape(-1, WIDTH).sum(0)
        return grad * ctx.weight * (1 - th * th), weights, grad.sum_to_size(ctx.shape)


class SingleUse(Correct):
    """Returns zeros when its backward runs a second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        made = Correct.forward(ctx, x, weight, y)
        ctx.left = 1
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.left -= 1
        return Correct.backward(ctx, grad if ctx.left >= 0 else 0 * grad)


def kernel_of(function: Any) -> type[nn.Module]:
    """Return the hub layer that calls an autograd function."""

    def forward(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return function.apply(x, self.weight, y)

    return type(function.__name__, (nn.Module,), {"forward": forward})


class Detached(nn.Module):
    """Has no gradient."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x.detach()) * self.weight.detach() + y.detach()


class Numpy(nn.Module):
    """Has no gradient, and computes outside of torch."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, weight, y = (v.detach().numpy() for v in (x, self.weight, y))
        return torch.from_numpy(torch.tanh(torch.from_numpy(x)).numpy() * weight + y)


class HalfDetached(nn.Module):
    """Has a gradient of one of its inputs only."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x.detach()) * self.weight.detach() + y


class Plain(nn.Module):
    """Consists of operations that autograd knows."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.weight * x.tanh()


RIGHT = [kernel_of(Correct), Plain]
NEED_PREPARATION = [
    kernel_of(ContiguousGradient),
    kernel_of(OverwritesGradient),
    kernel_of(OverwritesInput),
    kernel_of(OverwritesPrivate),
    kernel_of(HidesSaves),
]
"""Kernels that are right with contiguous incoming gradients, or with copies."""
ALWAYS_WRONG = [*map(kernel_of, [Zero, Identity, Doubled, NoWeight, SingleUse]), Detached, Numpy]
SOMETIMES_WRONG = [*map(kernel_of, [ContiguousInput, NoBroadcast]), HalfDetached]
KERNELS = [*RIGHT, *NEED_PREPARATION, *ALWAYS_WRONG, *SOMETIMES_WRONG]
by_name = functools.partial(pytest.mark.parametrize, ids=lambda kernel: kernel.__name__)


def kernelized(kernel: Any, layer: nn.Module | None = None, **options: Any) -> Any:
    """Kernelize a layer, by default a `Gate`, for training with ``kernel``."""
    with only(Gate=kernel):
        return kernelize(layer or Gate(), mode=TRAINING, **options)


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    """Create two random inputs that require gradients."""
    shape = shape or (3, WIDTH)
    return torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)


Loss = Callable[[Tensor], Tensor]


def square(output: Tensor) -> Tensor:
    return output.square().sum()


def gradients(layer: nn.Module, x: Tensor, y: Tensor, loss: Loss = square) -> list[Tensor | None]:
    """Compute the gradients of a loss of a layer's output, for each tensor that requires one."""
    wanted = [v for v in (x, y, *layer.parameters()) if v.requires_grad]
    return list(torch.autograd.grad(loss(layer(x, y)), wanted, allow_unused=True))


def assert_trains_like_the_reference(
    kernel: Any, x: Tensor, y: Tensor, loss: Loss = square, **options: Any
) -> None:
    layer = kernelized(kernel, **options)
    for _ in range(2):  # the call that decides on a route, and one that takes it
        made, wanted = gradients(layer, x, y, loss), gradients(Gate(), x, y, loss)
        torch.testing.assert_close(made, wanted)


def kernelize_on_cpu(kernel: Any, layer: nn.Module) -> nn.Module:
    with only(Gate=kernel):
        return kernelize(layer, mode=TRAINING, device="cpu")
