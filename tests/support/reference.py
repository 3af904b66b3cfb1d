"""The references of the example kernels, and the comparison of a kernel with one in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

EPS = 1e-5

# The norm of the difference, relative to that of the reference: a few roundings of each dtype.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}

# The inputs are such that most results, and the terms of most gradients, are about 1. Results that
# are all smaller are what is left of larger numbers, and have the errors of these.
SMALL = 0.3


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def moe_experts(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Run every expert on every token; an expert that a token did not choose has weight 0."""
    experts = gate_up.shape[0]
    chosen = F.one_hot(index, experts + 1)[..., :experts].to(x.dtype)
    scale = (chosen * weights[..., None]).sum(1)
    gate, up = torch.einsum("th,eih->tei", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("tei,ehi,te->th", F.silu(gate) * up, down, scale)


def kernel_rms_norm(package: ModuleType) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return call(package, "RMSNorm", x, weight=weight, variance_epsilon=EPS)

    return run


def kernel_silu_and_mul(package: ModuleType) -> Callable[..., Tensor]:
    return lambda x: call(package, "SiluAndMul", x)


def kernel_moe_experts(package: ModuleType) -> Callable[..., Tensor]:
    def run(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        state = {"gate_up_proj": gate_up, "down_proj": down}
        return call(package, "MoEExperts", x, index, weights, **state)

    return run


def call(package: ModuleType, name: str, *args: Tensor, **state: Any) -> Tensor:
    """Call the hub layer ``name`` with this state as its attributes."""
    layer = getattr(package.layers, name)()
    for attribute, value in state.items():
        setattr(layer, attribute, value)
    result: Tensor = layer(*args)
    return result


def norm_inputs(*shape: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return hidden states of a shape, and a weight.

    No number is close to zero: with a row of a few such, the gradient would be the small difference
    of large numbers.
    """
    x = torch.randn(shape)
    x = x + x.sign() / 2
    return x.to(device, dtype), torch.randn(shape[-1]).to(device, dtype)


def moe_inputs(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    intermediate: int,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw inputs of scales such that the values of every layer are about 1."""
    x = torch.randn(tokens, hidden)
    weights, index = torch.rand(tokens, experts).topk(top_k, dim=-1)
    gate_up = torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate) * intermediate**-0.5
    x, weights, gate_up, down = (t.to(device, dtype) for t in (x, weights, gate_up, down))
    return x, index.to(device), weights, gate_up, down


def assert_matches(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> None:
    """Compare the output and the gradients of all floating inputs with those in float64."""
    dtype = inputs[0].dtype
    found = _run(kernel, [t.detach() for t in inputs])
    wanted = _run(reference, [t.detach().double() if t.is_floating_point() else t for t in inputs])
    names = ["output", *(f"gradient {i}" for i, t in enumerate(inputs) if t.is_floating_point())]
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        assert ours.shape == theirs.shape, name
        assert ours.dtype == dtype, name
        assert ours.isfinite().all(), name
        terms = max(wanted[0].numel(), theirs.numel())  # each output is in one sum at least
        norm = max(theirs.norm().item(), SMALL * terms**0.5)
        error = (ours.double() - theirs).norm().item()
        assert error <= TOLERANCE[dtype] * norm, f"{name}: an error of {error:.3g} in {norm:.3g}"


def _run(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    wanted = [t.requires_grad_() for t in inputs if t.is_floating_point()]
    out = function(*inputs)
    # Not contiguous, and no two elements alike.
    grad = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape[::-1])
    grad = grad.permute(*reversed(range(out.dim()))).to(out)
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]
