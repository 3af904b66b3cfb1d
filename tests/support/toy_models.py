"""Toy layers and kernels for compiling. A kernel adds 10 or more, which tells that it ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernelgraph import use_kernel_forward_from_hub


class Repository:
    """A repository of one hub layer."""

    def __init__(self, layer: type[nn.Module]) -> None:
        self.layer = layer

    def load(self) -> type[nn.Module]:
        return self.layer

    def __repr__(self) -> str:
        return f"Repository({self.layer.__name__})"


@use_kernel_forward_from_hub("Scale")
class Scale(nn.Module):
    """Reads a parameter, a buffer, a float, a bool and a string."""

    shift: Tensor

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.register_buffer("shift", torch.linspace(-1, 1, size))
        self.eps = 0.25
        self.negate = False
        self.power = "linear"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight + self.shift + self.eps
        if self.power == "square":
            y = y * y
        return -y if self.negate else y


class OpaqueScale(nn.Module):
    """`Scale` and 10, in numpy: Dynamo cannot trace it, and fake tensors cannot run it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.detach().numpy() * self.weight.detach().numpy() + self.shift.numpy() + self.eps
        if self.power == "square":
            y = y * y
        return torch.from_numpy((-y if self.negate else y) + 10)


class TraceableScale(nn.Module):
    """`Scale` and 20, in torch."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.shift + self.eps + 20


class ForwardOnlyScale(nn.Module):
    """`Scale` and 30, without a backward."""

    has_backward = False

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.shift + self.eps + 30


class Chain(nn.Module):
    """Two scales with a linear layer between them."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scale(size), nn.Linear(size, size), Scale(size)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def error(actual: Tensor, expected: Tensor) -> float:
    """The relative error by norm."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def on_cpu(**layers: type[nn.Module]) -> dict[str, Any]:
    """A mapping from layer names to hub layers."""
    return {name: {"cpu": Repository(layer)} for name, layer in layers.items()}
