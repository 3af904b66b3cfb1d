"""Toy layers and kernels for tests of ops. A kernel adds 10, which shows that it ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Scale(nn.Module):
    def __init__(self, size: int = 4, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size, dtype=dtype))
        self.eps = 0.25

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.eps


class Plus10(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.eps + 10


class Native(nn.Module):
    """Adds 10 in native code, which torch does not see."""

    def forward(self, x: Tensor) -> Tensor:
        array = x.detach().numpy() * self.weight.detach().numpy() + self.eps + 10
        return torch.from_numpy(array)


def hub_layer(forward: Callable[..., Any]) -> type[nn.Module]:
    """Return a hub layer with ``forward``."""
    return type("Toy", (nn.Module,), {"forward": forward, "__module__": __name__})


def layer_with(forward: Callable[..., Any], **attributes: Any) -> nn.Module:
    """Return a layer whose reference is ``forward``."""
    module = type("Layer", (nn.Module,), {"forward": forward, "__module__": __name__})()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module
