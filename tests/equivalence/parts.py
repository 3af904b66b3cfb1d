"""Helpers that the text of random programs names: conversions and containers of results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Pair:
    """Two values in a dataclass."""

    first: Any = None
    second: Any = None


class Both(NamedTuple):
    """Two values in a named tuple."""

    first: Any
    second: Any


class Twice(nn.Module):
    """A parametrization of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def to_array(tensor: Tensor) -> Any:
    """Return a tensor as an array, which shares its memory where numpy has its dtype."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_tensor(array: Any, dtype: torch.dtype) -> Tensor:
    """Return a tensor of its own memory with the values of an array."""
    return torch.from_numpy(np.array(array, order="C")).to(dtype)
