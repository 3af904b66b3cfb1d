"""SiluAndMul, forward and backward, as ops that torch.compile can trace."""

# Triton has no types. Its kernels are in a language of its own, with constants in capitals.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, import"
# ruff: noqa: N803

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

# Unique by content, so that two versions of these kernels can be loaded side by side.
NAMESPACE: str = json.loads((Path(__file__).parent / "metadata.json").read_text())["id"]
BLOCK = 1024


@torch.library.custom_op(f"{NAMESPACE}::silu_and_mul", mutates_args=())
def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    d = x.shape[-1] // 2
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], d))
    if out.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[_grid(out)](x, out, d, BLOCK=BLOCK)
    return out


@torch.library.custom_op(f"{NAMESPACE}::silu_and_mul_backward", mutates_args=())
def _silu_and_mul_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    grad = grad.contiguous()
    x = x.contiguous()
    grad_x = torch.empty_like(x)
    if grad.numel():
        with torch.cuda.device_of(x):
            _backward_kernel[_grid(grad)](grad, x, grad_x, grad.shape[-1], BLOCK=BLOCK)
    return grad_x


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [..., 2d], whose halves are gate and up; gives [..., d]."""
    if x.shape[-1] % 2:
        raise ValueError(f"silu_and_mul: the last dimension must be even, but x is {x.shape}")
    result: torch.Tensor = _silu_and_mul(x)
    return result


def _grid(out: torch.Tensor) -> tuple[int, int]:
    d = out.shape[-1]
    return out.numel() // d, triton.cdiv(d, BLOCK)


@_silu_and_mul.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_silu_and_mul_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    return _silu_and_mul_backward(grad, *ctx.saved_tensors)


_silu_and_mul.register_autograd(_backward, setup_context=_setup)


@triton.jit
def _forward_kernel(x_ptr, out_ptr, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < d
    gate = tl.load(x_ptr + row * 2 * d + columns, mask, 0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * d + d + columns, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + row * d + columns, gate * tl.sigmoid(gate) * up, mask)


@triton.jit
def _backward_kernel(grad_ptr, x_ptr, grad_x_ptr, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < d
    grad = tl.load(grad_ptr + row * d + columns, mask, 0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * 2 * d + columns, mask, 0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * d + d + columns, mask, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(grad_x_ptr + row * 2 * d + columns, grad_gate, mask)
    tl.store(grad_x_ptr + row * 2 * d + d + columns, grad * gate * sigmoid, mask)
