"""A small Llama-like decoder in plain PyTorch, dense or with a mixture of experts.

Its `RMSNorm`, `SiluAndMul` and `MoEExperts` are extensible: what they compute is written here, and
a kernel registered under their names may compute it instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from kernelgraph import use_kernel_forward_from_hub


@dataclass(frozen=True)
class DecoderConfig:
    vocab: int = 1024
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 512
    experts: int = 0
    """0: each layer has one MLP."""
    top_k: int = 2
    """How many experts each token uses."""
    rope_base: float = 10000.0
    eps: float = 1e-6


@use_kernel_forward_from_hub("RMSNorm")
class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


@use_kernel_forward_from_hub("SiluAndMul")
class SiluAndMul(nn.Module):
    """x [..., 2d] -> [..., d]; its halves are gate and up."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


def _like_hidden_states(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return torch.empty_like(hidden_states)


# The loop below depends on the data, so a run on fakes cannot infer the output's shape.
@use_kernel_forward_from_hub("MoEExperts", fake=_like_hidden_states)
class MoEExperts(nn.Module):
    """hidden_states [T, H], top_k_index and top_k_weights [T, K] -> [T, H].

    An index equal to the number of experts stands for no expert.
    """

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        experts = self.gate_up_proj.shape[0]
        mask = F.one_hot(top_k_index, experts + 1).permute(2, 1, 0)[:experts]
        for expert in mask.sum(dim=(1, 2)).nonzero().flatten():
            position, token = torch.where(mask[expert])
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[expert])
            y = y * top_k_weights[token, position, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.hidden // config.heads
        qkv = (config.heads + 2 * config.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden, qkv, bias=False)
        self.o_proj = nn.Linear(config.heads * self.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, heads, T, d] by cos and sin [T, d / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden, 2 * config.intermediate, bias=False)
        self.act = SiluAndMul()
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(self.gate_up_proj(x)))
        return out


class MoE(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = nn.Linear(config.hidden, config.experts, bias=False)
        self.experts = MoEExperts(config.experts, config.hidden, config.intermediate)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, x.shape[-1])
        weights, index = self.router(tokens).float().softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out: Tensor = self.experts(tokens, index, weights.to(x.dtype))
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden, config.eps)
        self.mlp = MoE(config) if config.experts else MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Decoder(nn.Module):
    """input_ids [B, T] int64 -> logits [B, T, vocab]. The same seed gives the same parameters
    on the same type of device."""

    inv_freq: Tensor

    def __init__(self, config: DecoderConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)
        exponent = torch.arange(0, 1, 2 * config.heads / config.hidden)
        self.register_buffer("inv_freq", config.rope_base**-exponent, persistent=False)
        generator = torch.Generator(self.embed.weight.device).manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                std = parameter.shape[-1] ** -0.5
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        position = torch.arange(input_ids.shape[1], device=x.device)
        angle = torch.outer(position.float(), self.inv_freq.float())
        rotary = (angle.cos().to(x.dtype), angle.sin().to(x.dtype))
        for block in self.blocks:
            x = block(x, rotary)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits
