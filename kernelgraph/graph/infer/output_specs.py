"""Specs of a layer's output: shapes, dtypes and devices of its results, before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Runner, Template, UnsupportedValue, flatten_tensors


class UnknownShape(Exception):
    """The shape of a layer's output cannot be inferred."""


class TensorSpec(NamedTuple):
    """Shape, dtype and device of one tensor of an output."""

    shape: tuple[Any, ...]
    """Ints and symbolic ints."""
    dtype: torch.dtype
    device: torch.device


def make_fakes(results: Sequence[TensorSpec]) -> list[Tensor]:
    """Return new empty tensors like ``results``; fakes, where a fake mode is active."""
    return [torch.empty(r.shape, dtype=r.dtype, device=r.device) for r in results]


class OutputSpec(NamedTuple):
    """The output of a call, inferred from a run."""

    results: tuple[TensorSpec, ...]
    output: Template
    """The structure that the layer returns, with its tensors taken out."""
    written: tuple[int, ...]
    """The numbers of the operands that the run wrote into."""
    source: str = ""
    """The run: ``fake``, ``kernel`` or ``reference`` on fakes, ``probe``, or ``recorded``."""
    fresh: bool = False
    """Whether there are new data-dependent sizes in the results."""


def observe(runner: Runner, operands: Sequence[Any]) -> tuple[OutputSpec, list[Tensor]]:
    """Run a forward and describe what it returned.

    Args:
        runner: Runs the forward.
        operands: The operands, which the forward may write into.

    Returns:
        The spec of the output, and its tensors.

    Raises:
        UnsupportedValue: If the forward does something that no op can do.
        Exception: Whatever the forward raises.
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
