"""The functions of the liger-kernel package as hub layers for the layers of ``../decoder.py``."""

# liger-kernel has no types, and is on few machines.
# mypy: disable-error-code="import"

from __future__ import annotations

import torch
from liger_kernel import ops
from torch import Tensor, nn


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    # No offset of the weight; Llama's roundings; and not in place, which would write over a
    # gradient that is not the function's own.
    out: Tensor = ops.LigerRMSNormFunction.apply(hidden_states, weight, eps, 0.0, "llama", False)
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    out: Tensor = ops.LigerSiLUMulFunction.apply(*x.chunk(2, dim=-1))
    return out


def moe_experts(
    hidden_states: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    index = index.to(torch.int32)
    out: Tensor = ops.LigerFusedMoEFunction.apply(hidden_states, gate_up, down, index, weights)
    return out


class RMSNorm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return silu_and_mul(x)


class MoEExperts(nn.Module):
    gate_up_proj: Tensor
    down_proj: Tensor

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return moe_experts(
            hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj
        )
