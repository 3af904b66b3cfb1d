"""Mixture of experts, forward and backward, as grouped matrix products.

The (token, k) pairs are sorted by expert, so that each expert's tokens are consecutive *rows*. Rows
are cut into *tiles* of one expert each, and every program of a grouped product works on one tile.
How many tiles there are is only known on the GPU: as many programs are started as there could
be, and those without a tile return at once. So nothing waits for the GPU, and all of it can be
captured in a CUDA graph.
"""

# mypy: disable-error-code="no-untyped-call, import"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from . import grouped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    _check(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    result: torch.Tensor = _MoEExperts.apply(
        hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj
    )
    return result


def _check(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> None:
    shapes = [list(t.shape) for t in (x, index, weights, gate_up, down)]
    if x.dim() != 2 or index.dim() != 2 or gate_up.dim() != 3 or gate_up.shape[1] % 2:
        fits = False
    else:
        experts, both, hidden = gate_up.shape
        fits = (
            x.shape[1] == hidden
            and index.shape[0] == x.shape[0]
            and weights.shape == index.shape
            and down.shape == (experts, hidden, both // 2)
        )
    if not fits:
        raise ValueError(
            "moe_experts takes hidden_states [T, H], top_k_index and top_k_weights [T, K], "
            f"gate_up_proj [E, 2I, H] and down_proj [E, H, I], not {shapes}"
        )
    if x.dtype not in DTYPES or gate_up.dtype != x.dtype or down.dtype != x.dtype:
        raise ValueError(
            "moe_experts: hidden_states, gate_up_proj and down_proj must have one dtype of "
            f"float32, bfloat16 and float16, not {x.dtype}, {gate_up.dtype} and {down.dtype}"
        )
    if index.dtype != torch.int64 or not weights.is_floating_point():
        raise ValueError(
            "moe_experts: top_k_index must be int64 and top_k_weights floating point, not "
            f"{index.dtype} and {weights.dtype}"
        )


@dataclass(frozen=True)
class Routing:
    """Where each row comes from and where its expert's tiles lie. All are int64 tensors."""

    index: torch.Tensor
    """[T, K]: the expert of each pair."""
    pair: torch.Tensor
    """[rows]: the pair of each row, an index into the flattened [T, K]."""
    token: torch.Tensor
    """[rows]: its token."""
    begin: torch.Tensor
    """[E + 1]: the rows of expert e are begin[e] to begin[e + 1]. Rows of no expert come after."""
    tile_expert: torch.Tensor
    """[tiles]: E for a tile that isn't there."""
    tile_row: torch.Tensor
    """[tiles]: the first row of the tile."""
    tile_size: int
    """Rows in a tile, the last one of an expert aside."""


def route(top_k_index: torch.Tensor, experts: int, dtype: torch.dtype) -> Routing:
    """Sort the pairs by expert and lay out the tiles, without waiting for the GPU."""
    index = top_k_index.contiguous()
    device = index.device
    rows = index.numel()
    largest = 128 if dtype.itemsize == 2 else 64
    size = min(largest, max(16, triton.next_power_of_2(rows // max(1, experts))))
    expert_of_row, pair = torch.sort(index.flatten(), stable=True)
    begin = torch.searchsorted(expert_of_row, torch.arange(experts + 1, device=device))
    count = (begin.diff() + size - 1) // size
    end = count.cumsum(0)
    # At most one tile of each expert is not full, and no tile is empty.
    tile = torch.arange(min(rows, rows // size + experts), device=device)
    tile_expert = torch.searchsorted(end, tile, right=True)
    of = tile_expert.clamp(max=experts - 1)
    tile_row = begin[of] + (tile - (end - count)[of]) * size
    token = pair // max(1, index.shape[1])
    return Routing(index, pair, token, begin, tile_expert, tile_row, size)


class _MoEExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
    ) -> Any:
        ctx.save_for_backward(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
        if top_k_index.numel() == 0 or gate_up_proj.numel() == 0:
            return torch.zeros_like(hidden_states)
        x = hidden_states.contiguous()
        scale = top_k_weights.float().contiguous()
        routing = route(top_k_index, gate_up_proj.shape[0], x.dtype)
        with torch.cuda.device_of(x):
            act = grouped.activations(routing, x, gate_up_proj)
            y = grouped.rows(routing, act, down_proj.mT, to_pairs=True)
            return grouped.combine(routing, y, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden_states, index, weights, gate_up, down = ctx.saved_tensors
        if index.numel() == 0 or gate_up.numel() == 0:
            inputs = (hidden_states, weights, gate_up, down)
            dx, dweights, dgate_up, ddown = map(torch.zeros_like, inputs)
            return dx, None, dweights, dgate_up, ddown
        x = hidden_states.contiguous()
        grad = grad.contiguous()
        scale = weights.float().contiguous()
        routing = route(index, gate_up.shape[0], x.dtype)
        with torch.cuda.device_of(x):
            # The products of the forward are computed anew: kept, they would take several times
            # the memory of its output.
            both = grouped.rows(routing, x, gate_up.mT, from_tokens=True)
            grad_act = grouped.rows(routing, grad, down, from_tokens=True)
            # Now `both` becomes its own gradient and grad_act the weighted activation.
            dscale = grouped.activations_backward(routing, both, grad_act, scale)
            ddown = grouped.weights(routing, grad, grad_act, left_tokens=True)
            dgate_up = grouped.weights(routing, both, x, right_tokens=True)
            dx = grouped.combine(routing, grouped.rows(routing, both, gate_up, to_pairs=True))
        return dx, None, dscale.to(weights.dtype), dgate_up, ddown
