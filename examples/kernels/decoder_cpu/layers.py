"""The hub layers: pure classes whose ``forward`` replaces that of a model's layer."""

from __future__ import annotations

import torch
from torch import nn

from ._ops import moe_experts, rms_norm, silu_and_mul


class RMSNorm(nn.Module):
    has_backward = True

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SiluAndMul(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu_and_mul(x)


class MoEExperts(nn.Module):
    has_backward = True

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        return moe_experts(
            hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj
        )
