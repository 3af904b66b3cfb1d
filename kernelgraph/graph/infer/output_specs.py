"""What is told of a layer's results before there are any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Runner, Template, UnsupportedValue, flatten_tensors


class UnknownShape(Exception):
    """The shape of a layer's output cannot be told."""


class TensorSpec(NamedTuple):
    """What is known of one tensor of an output before there is any."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


def make_fakes(results: Sequence[TensorSpec]) -> list[Tensor]:
    """What an op returns, in the fake mode that is on."""
    return [torch.empty(r.shape, dtype=r.dtype, device=r.device) for r in results]


class OutputSpec(NamedTuple):
    """What a run tells."""

    results: tuple[TensorSpec, ...]
    output: Template
    """What the layer returns, its tensors taken out."""
    written: tuple[int, ...]
    """The operands that the run wrote into."""
    source: str = ""
    """What ran: ``fake``, ``kernel`` or ``reference`` on fakes, or ``probe``."""
    fresh: bool = False
    """Whether there are sizes in it that are the result's own, since they depend on values."""


def observe(runner: Runner, operands: Sequence[Any]) -> tuple[OutputSpec, list[Tensor]]:
    """Run a forward with ``operands`` of which it may do as it likes; what it returned.

    Raises:
        UnsupportedValue: If no op can do what it does.
        Exception: Whatever it raises.
    """
    before = [_version(v) for v in operands]
    tensors, output = flatten_tensors(runner.observe(operands))
    written = tuple(i for i, v in enumerate(operands) if _version(v) != before[i])
    if not tensors:
        raise UnsupportedValue("the layer returns no tensor")
    results = tuple(TensorSpec(tuple(t.shape), t.dtype, t.device) for t in tensors)
    return OutputSpec(results, output, written), tensors


def _version(value: Any) -> int:
    return _torch.version_of(value) if isinstance(value, Tensor) else 0
