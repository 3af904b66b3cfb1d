"""Trials: a norm, kernels that compute it, and the verdicts on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from kernelgraph.graph.gradients.gradient import wanted_of
from kernelgraph.graph.verify import trial
from kernelgraph.graph.verify.trial import judge
from kernelgraph.graph.verify.verdict import Verdict
from kernelgraph.kernel import Kernel
from tests.support.op_calls import call_of, kernel_of, layer_of

EPS = 1e-6


class Norm(nn.Module):
    def __init__(self, size: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def kernel(forward: Callable[..., Any], revision: str | None = None) -> Kernel:
    """Return a kernel with ``forward``, in a repository if it has a ``revision``."""
    toy = type("Toy", (nn.Module,), {"forward": forward, "__module__": __name__})
    return kernel_of(toy, revision)


def verdict(
    module: nn.Module,
    forward: Callable[..., Any] | Kernel,
    *args: Any,
    wanted: Sequence[bool] | None = None,
    compare: bool = True,
) -> Verdict:
    """Return the verdict on a kernel with ``forward``, in a call of ``module`` with ``args``."""
    toy = forward if isinstance(forward, Kernel) else kernel(forward)
    call, operands = call_of(module, *args, forward=toy.forward)
    wanted = wanted_of(operands, every=True) if wanted is None else wanted
    return judge(layer_of(module), module, toy, call, operands, wanted, compare=compare)


def norm_backward(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and the weight."""
    r = torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)
    gw = (g * x * r).sum_to_size(w.shape)
    g = g * w
    return r * g - x * r**3 * (g * x).mean(-1, keepdim=True), gw


def norm_function(
    backward: Callable[..., Any],
    save: Callable[[Any, Tensor, Tensor, Tensor], None] | None = None,
) -> Callable[..., Any]:
    """Return the forward of a norm, in a ``torch.autograd.Function`` with ``backward``.

    Args:
        backward: ``(ctx, grad)``: returns the gradients.
        save: ``(ctx, x, weight, y)``: saves what the backward needs; by default x and the weight.
    """

    class Norms(Function):
        @staticmethod
        def forward(ctx, x, w):
            y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w
            if save is None:
                ctx.save_for_backward(x, w)
            else:
                save(ctx, x, w, y)
            return y

        @staticmethod
        def backward(ctx, g):
            return backward(ctx, g)

    return lambda self, x: Norms.apply(x, self.weight)


X = torch.randn(6, 16)


def composite(self: Any, x: Tensor) -> Tensor:
    """The forward of a norm in ordinary autograd."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * self.weight


def right_backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    """The backward for `norm_function`."""
    return norm_backward(g, *ctx.saved_tensors)


def scaled(of_x: float, of_weight: float) -> Callable[..., Any]:
    """Return the forward of a norm with gradients that are scaled by these factors."""

    def backward(ctx, g):
        gx, gw = norm_backward(g, *ctx.saved_tensors)
        return gx * of_x, gw * of_weight

    return norm_function(backward)


def times(tensor: Tensor, factor: float) -> Tensor:
    """Return ``tensor``, with a gradient that is scaled by ``factor``."""
    return tensor * factor + (tensor * (1 - factor)).detach()


def forget_verdicts() -> None:
    """Forget the verdicts of this process; those on disk stay."""
    trial._verdicts.clear()
