"""Triton kernels over rows that are grouped by expert; `moe` says what rows and tiles are."""

# Triton has no types. Its kernels are in a language of its own, with constants in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import"
# ruff: noqa: N803

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from .moe import Routing


def activations(routing: Routing, x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of each row's token: x [T, H], gate_up [E, 2I, H] -> [rows, I]."""
    experts, both, hidden = gate_up.shape
    n = both // 2
    out = x.new_empty(routing.pair.numel(), n)
    block_k, warps = _tuning(routing, x.dtype)
    grid = (triton.cdiv(n, 64), routing.tile_row.numel())
    _activations_kernel[grid](
        *(x, gate_up, out, routing.token, routing.tile_expert, routing.tile_row, routing.begin),
        *(experts, n, hidden, *gate_up.stride()),
        BLOCK_M=routing.tile_size,
        BLOCK_N=64,
        BLOCK_K=block_k,
        num_warps=warps,
    )
    return out


def rows(
    routing: Routing,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    from_tokens: bool = False,
    to_pairs: bool = False,
) -> torch.Tensor:
    """Each row times its expert's matrix: b [E, K, N] -> [rows, N].

    Args:
        routing: The rows.
        a: [rows, K], or [T, K] if ``from_tokens``.
        b: Of any strides.
        from_tokens: Each row reads its token's row of ``a``.
        to_pairs: The result is ordered by pair, not by row.
    """
    experts, k, n = b.shape
    out = a.new_empty(routing.pair.numel(), n)
    block_k, warps = _tuning(routing, a.dtype)
    block_n = 128 if a.dtype.itemsize == 2 else 64
    grid = (triton.cdiv(n, block_n), routing.tile_row.numel())
    _rows_kernel[grid](
        *(a, b, out, routing.token, routing.pair),
        *(routing.tile_expert, routing.tile_row, routing.begin),
        *(experts, n, k, *b.stride()),
        FROM_TOKENS=from_tokens,
        TO_PAIRS=to_pairs,
        BLOCK_M=routing.tile_size,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
    )
    return out


def weights(
    routing: Routing,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    left_tokens: bool = False,
    right_tokens: bool = False,
) -> torch.Tensor:
    """Each expert's left.T @ right over its rows: left [.., M], right [.., N] -> [E, M, N].

    ``left`` and ``right`` have one row for each row, or for each token where so flagged.
    """
    experts = routing.begin.numel() - 1
    m, n = left.shape[1], right.shape[1]
    out = left.new_empty(experts, m, n)
    grid = (triton.cdiv(n, 64), triton.cdiv(m, 64), experts)
    _weights_kernel[grid](
        *(left, right, out, routing.token, routing.begin, m, n),
        LEFT_TOKENS=left_tokens,
        RIGHT_TOKENS=right_tokens,
        BLOCK_M=64,
        BLOCK_N=64,
        BLOCK_R=64 if left.dtype.itemsize == 2 else 32,
    )
    return out


def activations_backward(
    routing: Routing, gate_up: torch.Tensor, grad_act: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The gradient of ``scale`` [T, K], float32; overwrites the other two.

    With a = silu(gate) * up, ``grad_act`` [rows, I] is the gradient of a for an unweighted row. It
    becomes scale * a, which down_proj's gradient needs, and ``gate_up`` [rows, 2I] becomes its own
    gradient.
    """
    n = grad_act.shape[1]
    grad_scale = torch.zeros_like(scale)
    block = min(1024, triton.next_power_of_2(n))
    _activations_backward_kernel[(grad_act.shape[0],)](
        *(gate_up, grad_act, scale, grad_scale, routing.pair, routing.begin),
        *(routing.begin.numel() - 1, n),
        BLOCK=block,
    )
    return grad_scale


def combine(routing: Routing, y: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Each token's sum over its pairs, weighted by ``scale`` [T, K]: y [pairs, H] -> [T, H]."""
    tokens, top_k = routing.index.shape
    hidden = y.shape[1]
    out = y.new_empty(tokens, hidden)
    block = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(tokens, triton.cdiv(hidden, block))](
        *(y, routing.index, scale, out, routing.begin.numel() - 1, hidden),
        TOP_K=top_k,
        WEIGHTED=scale is not None,
        BLOCK=block,
    )
    return out


def _tuning(routing: Routing, dtype: torch.dtype) -> tuple[int, int]:
    """How much of K a program takes at once, and its warps."""
    return (64 if dtype.itemsize == 2 else 32), (8 if routing.tile_size == 128 else 4)


@triton.jit
def _activations_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    token_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    begin_ptr,
    experts,
    n,
    k_size,
    stride_e,
    stride_n,
    stride_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(1)
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= experts:
        return
    row = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(begin_ptr + expert + 1)
    token = tl.load(token_ptr + row, row_mask, 0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < n
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + token[:, None] * k_size + ks[None, :]
    gate_ptrs = weight_ptr + expert * stride_e + ks[:, None] * stride_k + column[None, :] * stride_n
    up_offset = tl.cast(n, tl.int64) * stride_n
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, k_size, BLOCK_K):
        k_mask = ks < k_size - k
        x = tl.load(x_ptrs + k, row_mask[:, None] & k_mask[None, :], 0.0)
        mask = k_mask[:, None] & column_mask[None, :]
        w_gate = tl.load(gate_ptrs + k * stride_k, mask, 0.0)
        w_up = tl.load(gate_ptrs + up_offset + k * stride_k, mask, 0.0)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")
    act = gate * tl.sigmoid(gate) * up
    out_ptrs = out_ptr + row[:, None] * n + column[None, :]
    tl.store(out_ptrs, act, row_mask[:, None] & column_mask[None, :])


@triton.jit
def _rows_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    token_ptr,
    pair_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    begin_ptr,
    experts,
    n,
    k_size,
    stride_e,
    stride_k,
    stride_n,
    FROM_TOKENS: tl.constexpr,
    TO_PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(1)
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= experts:
        return
    row = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(begin_ptr + expert + 1)
    source = row
    target = row
    if FROM_TOKENS:
        source = tl.load(token_ptr + row, row_mask, 0)
    if TO_PAIRS:
        target = tl.load(pair_ptr + row, row_mask, 0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < n
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + source[:, None] * k_size + ks[None, :]
    b_ptrs = b_ptr + expert * stride_e + ks[:, None] * stride_k + column[None, :] * stride_n
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, k_size, BLOCK_K):
        k_mask = ks < k_size - k
        a = tl.load(a_ptrs + k, row_mask[:, None] & k_mask[None, :], 0.0)
        b = tl.load(b_ptrs + k * stride_k, k_mask[:, None] & column_mask[None, :], 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    out_ptrs = out_ptr + target[:, None] * n + column[None, :]
    tl.store(out_ptrs, total, row_mask[:, None] & column_mask[None, :])


@triton.jit
def _weights_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    token_ptr,
    begin_ptr,
    m,
    n,
    LEFT_TOKENS: tl.constexpr,
    RIGHT_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    expert = tl.program_id(2)
    ms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(begin_ptr + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(tl.load(begin_ptr + expert), end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = row < end
        token = row
        if LEFT_TOKENS or RIGHT_TOKENS:
            token = tl.load(token_ptr + row, mask, 0)
        l_row = token if LEFT_TOKENS else row
        r_row = token if RIGHT_TOKENS else row
        l_ptrs = left_ptr + l_row[:, None] * m + ms[None, :]
        r_ptrs = right_ptr + r_row[:, None] * n + ns[None, :]
        left = tl.load(l_ptrs, mask[:, None] & (ms < m)[None, :], 0.0)
        right = tl.load(r_ptrs, mask[:, None] & (ns < n)[None, :], 0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    out_ptrs = out_ptr + (expert.to(tl.int64) * m + ms[:, None]) * n + ns[None, :]
    tl.store(out_ptrs, total, (ms < m)[:, None] & (ns < n)[None, :])


@triton.jit
def _activations_backward_kernel(
    gate_up_ptr,
    grad_act_ptr,
    scale_ptr,
    grad_scale_ptr,
    pair_ptr,
    begin_ptr,
    experts,
    n,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(begin_ptr) or row >= tl.load(begin_ptr + experts):
        return
    pair = tl.load(pair_ptr + row)
    scale = tl.load(scale_ptr + pair)
    grad_scale = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < n
        gate_ptrs = gate_up_ptr + row * 2 * n + column
        gate = tl.load(gate_ptrs, mask, 0.0).to(tl.float32)
        up = tl.load(gate_ptrs + n, mask, 0.0).to(tl.float32)
        grad = tl.load(grad_act_ptr + row * n + column, mask, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        act = gate * sigmoid * up
        grad_scale += grad * act
        grad *= scale
        tl.store(grad_act_ptr + row * n + column, act * scale, mask)
        tl.store(gate_ptrs, grad * up * sigmoid * (1 + gate * (1 - sigmoid)), mask)
        tl.store(gate_ptrs + n, grad * gate * sigmoid, mask)
    tl.store(grad_scale_ptr + pair, tl.sum(grad_scale))


@triton.jit
def _combine_kernel(
    y_ptr,
    index_ptr,
    scale_ptr,
    out_ptr,
    experts,
    hidden,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(TOP_K):
        pair = token * TOP_K + k
        expert = tl.load(index_ptr + pair)
        # Nobody wrote the row of a pair without an expert.
        real = (expert >= 0) & (expert < experts)
        y = tl.load(y_ptr + pair * hidden + column, mask & real, 0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(scale_ptr + pair)
        total += y
    tl.store(out_ptr + token * hidden + column, total, mask)
