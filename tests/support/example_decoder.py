"""Small models of examples/decoder.py, and inputs for them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

LAYERS = ("RMSNorm", "SiluAndMul", "MoEExperts")


def small(decoder: ModuleType, experts: int, **changes: int) -> Any:
    """Return a decoder of two layers."""
    sizes = {"vocab": 61, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 24}
    return decoder.Decoder(decoder.DecoderConfig(**sizes, experts=experts), **changes)


def tokens(*shape: int) -> torch.Tensor:
    """Return random tokens for it."""
    return torch.randint(61, shape)
