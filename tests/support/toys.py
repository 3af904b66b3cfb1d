"""Layers and kernels whose results show which of them ran.

A reference scales its input; the kernel ``Plus10`` adds 10 to that, ``Plus20`` adds 20, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import kernelgraph
from kernelgraph import Mode, kernelize, last_report, use_kernel_forward_from_hub
from kernelgraph.report import Reason


@use_kernel_forward_from_hub("Scale")
class Scale(nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@use_kernel_forward_from_hub("Shift")
class Shift(nn.Module):
    """Has neither parameters nor buffers."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Plus10(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + 10


class Plus20(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + 20


class NoBackward(nn.Module):
    has_backward = False

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + 30


class Shift10(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 10


@dataclass(frozen=True)
class ToyRepository:
    """A repository that has ``layer`` already; ``loads`` counts how often it was loaded."""

    layer: Any
    loads: list[None] = field(default_factory=list, compare=False, repr=False)

    def load(self) -> Any:
        self.loads.append(None)
        return self.layer

    def __str__(self) -> str:
        return f"toy repository of {getattr(self.layer, '__name__', self.layer)}"


@dataclass(frozen=True)
class BrokenRepository:
    """A repository that cannot be loaded."""

    def load(self) -> Any:
        raise OSError("toy repository out of reach")


@contextmanager
def only(mapping: Any = None, **layers: Any) -> Iterator[None]:
    """A scope in which only ``layers``, kernel classes or repositories for the cpu, and ``mapping``
    are registered."""
    layers = {
        name: {"cpu": ToyRepository(kernel) if isinstance(kernel, type) else kernel}
        for name, kernel in layers.items()
    }
    with kernelgraph.use_kernel_mapping({**(mapping or {}), **layers}, inherit_mapping=False):
        yield


def kernelized(**layers: Any) -> Scale:
    """A `Scale` by 2, kernelized for inference with ``layers`` as the mapping."""
    with only(**layers):
        return kernelize(Scale(2.0), mode=Mode.INFERENCE)


def reasons() -> list[Reason]:
    """The reasons of the decisions in the last report."""
    return [decision.reason for decision in last_report().decisions]


def result(layer: Any) -> float:
    """The result of ``layer`` for 1: the factor of a `Scale`, plus what its kernel adds."""
    return layer(torch.ones(())).item()


def forwards(model: nn.Module) -> dict[str, Any]:
    """The instance's own ``forward`` of each module of ``model`` that has one, by path."""
    return {p: vars(m)["forward"] for p, m in model.named_modules() if "forward" in vars(m)}
