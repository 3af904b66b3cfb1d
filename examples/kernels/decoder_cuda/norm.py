"""RMSNorm, forward and backward: one program normalises a whole row."""

# Triton has no types. Its kernels are in a language of its own, with constants in capitals.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, import"
# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

MAX_COLUMNS = 65536
"""A row is held in one program's registers."""


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Llama's RMSNorm over the last dimension.

    hidden_states [..., n] and weight [n] have one dtype, which the result has too; the statistics
    are float32.
    """
    n = hidden_states.shape[-1]
    if weight.shape != (n,) or weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"rms_norm: weight is {weight.dtype} {list(weight.shape)}, but hidden_states "
            f"{hidden_states.dtype} {list(hidden_states.shape)} needs {hidden_states.dtype} [{n}]"
        )
    if n > MAX_COLUMNS:
        raise ValueError(f"rms_norm: rows of {n} are longer than {MAX_COLUMNS}")
    result: torch.Tensor = _RMSNorm.apply(hidden_states, weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        n = weight.numel()
        x = hidden_states.contiguous()
        weight = weight.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // n if n else 0
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        if rows:
            with torch.cuda.device_of(x):
                _forward_kernel[(rows,)](x, weight, out, rstd, n, eps, **_shape(n))
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        n, rows = weight.numel(), rstd.numel()
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        programs = min(rows, _programs(x.device))
        partial = torch.empty(programs, n, dtype=torch.float32, device=x.device)
        if rows:
            with torch.cuda.device_of(x):
                _backward_kernel[(programs,)](
                    grad, x, weight, rstd, grad_x, partial, rows, n, **_shape(n)
                )
        return grad_x, partial.sum(0).to(weight.dtype), None


def _shape(n: int) -> dict[str, int]:
    block = triton.next_power_of_2(n)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _programs(device: torch.device) -> int:
    """How many programs sum the weight's gradient: a few for each multiprocessor."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _forward_kernel(x_ptr, weight_ptr, out_ptr, rstd_ptr, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    x = tl.load(x_ptr + row * n + columns, mask, 0.0).to(tl.float32)
    rstd = 1 / tl.sqrt_rn(tl.sum(x * x) / n + eps)
    tl.store(rstd_ptr + row, rstd)
    # Llama rounds to the input's dtype before it multiplies by the weight.
    normed = (x * rstd).to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + row * n + columns, normed * weight, mask)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr, rows, n, BLOCK: tl.constexpr
):
    """Each program takes every so many-th row, and sums its rows' parts of the weight's gradient.

    With r = rstd: grad_x = r * grad * weight - x * r^3 / n * sum(grad * weight * x).
    """
    first = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    weight = tl.load(weight_ptr + columns, mask, 0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for row in range(first, rows, tl.num_programs(0)):
        offsets = tl.cast(row, tl.int64) * n + columns
        x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask, 0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = x * rstd
        grad_weight += grad * normed.to(x_ptr.dtype.element_ty).to(tl.float32)
        grad *= weight
        slope = tl.sum(grad * normed) / n
        tl.store(grad_x_ptr + offsets, rstd * (grad - normed * slope), mask)
    tl.store(partial_ptr + first.to(tl.int64) * n + columns, grad_weight, mask)
