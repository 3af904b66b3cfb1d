"""Measures what ``kernelize`` costs for each layer, and that the cost grows linearly.

The model is a stack of blocks that hold extensible layers of three classes, and each layer gets a
kernel that is already loaded. ``named_modules()`` alone is the floor: every layer must be visited.

    python examples/benchmarks/kernelize.py

Where the ``kernels`` package is installed, its ``kernelize`` is measured on the same model.
"""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

import kernelgraph
from kernelgraph import Mode

LAYERS = (2_500, 5_000, 10_000)
REPEATS = 7
NAMES = ("Norm", "Gate", "Projection")


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Projection(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Kernel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class ToyRepository:
    """A repository whose kernel is already loaded."""

    def load(self) -> type[nn.Module]:
        return Kernel


def model_of(layers: int) -> nn.Module:
    """Blocks of ten extensible layers, nested as in a transformer; one parameter in all."""
    blocks = nn.ModuleList()
    for _ in range(layers // 10):
        attention = nn.ModuleList([Norm(), Projection(), Projection(), Gate(), Projection()])
        mlp = nn.ModuleList([Norm(), Projection(), Gate(), Gate(), Projection()])
        blocks.append(nn.ModuleDict({"attention": attention, "mlp": mlp}))
    model = nn.ModuleDict({"blocks": blocks})
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    return model


def microseconds(work: Callable[[nn.Module], object], model: nn.Module) -> float:
    """Return the fastest of a few runs, in microseconds: disturbances only slow a run down."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        work(model)
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def with_kernelgraph(model: nn.Module) -> float:
    mapping = {name: {"cpu": ToyRepository()} for name in NAMES}
    with kernelgraph.use_kernel_mapping(mapping, inherit_mapping=False):
        cost = microseconds(lambda m: kernelgraph.kernelize(m, mode=Mode.INFERENCE), model)
    report = kernelgraph.last_report()
    assert report is not None
    assert len(report.kernels) == len(report.decisions) > 0
    return cost


def with_kernels(model: nn.Module) -> float:
    kernels = importlib.import_module("kernels")
    mapping = {name: {"cpu": ToyRepository()} for name in NAMES}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        return microseconds(lambda m: kernels.kernelize(m, mode=kernels.Mode.INFERENCE), model)


def main() -> None:
    for name, cls in zip(NAMES, (Norm, Gate, Projection), strict=True):
        kernelgraph.replace_kernel_forward_from_hub(cls, name)
    others = {"kernels": with_kernels} if importlib.util.find_spec("kernels") else {}
    print("microseconds a layer; the ratio is kernelgraph's to named_modules")
    print("layers", "named_modules", "kernelgraph", "ratio", *others, sep="  ")
    for layers in LAYERS:
        model = model_of(layers)
        walk = microseconds(lambda m: deque(m.named_modules(), maxlen=0), model) / layers
        ours = with_kernelgraph(model) / layers
        theirs = [measure(model_of(layers)) / layers for measure in others.values()]
        row = f"{layers:6}  {walk:13.2f}  {ours:11.2f}  {ours / walk:5.2f}"
        print(row, *(f"{cost:7.2f}" for cost in theirs), sep="  ")


if __name__ == "__main__":
    main()
