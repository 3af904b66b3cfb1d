"""The C++ ops as differentiable functions."""

# torch.autograd.Function.apply and torch.ops.load_library have no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_HERE = Path(__file__).parent
# Unique by content, so that two versions of these kernels can be loaded side by side.
NAMESPACE: str = json.loads((_HERE / "metadata.json").read_text())["id"]
_ops = getattr(torch.ops, NAMESPACE)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Llama's RMSNorm over the last dimension.

    hidden_states [..., n] and weight [n] have one dtype, which the result has too; the statistics
    are float32 (float64 for float64).
    """
    result: torch.Tensor = _RMSNorm.apply(hidden_states, weight, eps)
    return result


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [..., 2d], whose halves are gate and up; gives [..., d]."""
    result: torch.Tensor = _ops.silu_and_mul(x)
    return result


def moe_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of each token's experts, SwiGLU MLPs.

    hidden_states [T, H], gate_up_proj [E, 2I, H] and down_proj [E, H, I] have one dtype, which the
    result [T, H] has too. top_k_index [T, K] is int64; E itself stands for no expert.
    top_k_weights [T, K] is of any floating dtype.
    """
    result: torch.Tensor = _MoEExperts.apply(
        hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj
    )
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _ops.rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return (*_ops.rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None)


class _MoEExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, *others: torch.Tensor) -> Any:
        ctx.save_for_backward(hidden_states, *others)
        return _ops.moe_experts(hidden_states, *others, _native_gemm(hidden_states.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        native = _native_gemm(grad.dtype)
        dx, dweights, dgate_up, ddown = _ops.moe_experts_backward(grad, *ctx.saved_tensors, native)
        return dx, None, dweights, dgate_up, ddown


_CPU = torch.cpu.get_capabilities()


def _native_gemm(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit dtype faster than those of float32."""
    if dtype == torch.bfloat16:
        return bool(_CPU.get("amx_bf16") or _CPU.get("avx512_bf16"))
    return dtype == torch.float16 and bool(_CPU.get("amx_fp16"))


def _silu_and_mul_fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _silu_and_mul_backward_fake(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _silu_and_mul_setup(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _silu_and_mul_backward(ctx: Any, grad: torch.Tensor) -> Any:
    return _ops.silu_and_mul_backward(grad, *ctx.saved_tensors)


def _load() -> None:
    """Register the ops, unless another copy of this very variant has done so."""
    if hasattr(_ops, "silu_and_mul"):
        return
    torch.ops.load_library(_HERE / "decoder_layers.so")
    # silu_and_mul may be traced by torch.compile, which needs fakes and a gradient in terms of
    # ops. The other two are opaque: their hub layers don't declare `can_torch_compile`.
    name = f"{NAMESPACE}::silu_and_mul"
    torch.library.register_fake(name, _silu_and_mul_fake)
    torch.library.register_fake(f"{name}_backward", _silu_and_mul_backward_fake)
    torch.library.register_autograd(name, _silu_and_mul_backward, setup_context=_silu_and_mul_setup)


_load()
