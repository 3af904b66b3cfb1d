"""Specs of a layer's output: shapes, dtypes and devices of its results, before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Runner, Template, UnsupportedValue, flatten_tensors
from kernelgraph.graph.infer.aliasing import Order, dense_strides, order_of, overlap
from kernelgraph.graph.infer.run_effects import watching


class UnknownShape(UnsupportedValue):
    """The shape of a layer's output cannot be inferred."""


class TensorSpec(NamedTuple):
    """Shape, dtype, device and layout of one tensor of an output."""

    shape: tuple[Any, ...]
    """Ints and symbolic ints."""
    dtype: torch.dtype
    device: torch.device
    order: Order = ()
    """The order of its dimensions in memory, the same in all calls of one signature."""


def make_fakes(results: Sequence[TensorSpec]) -> list[Tensor]:
    """Return new empty tensors like ``results``; fakes, where a fake mode is active."""
    return [
        torch.empty_strided(
            r.shape, dense_strides(r.shape, r.order), dtype=r.dtype, device=r.device
        )
        if r.order
        else torch.empty(r.shape, dtype=r.dtype, device=r.device)
        for r in results
    ]


class OutputSpec(NamedTuple):
    """The output of a call, inferred from a run."""

    results: tuple[TensorSpec, ...]
    output: Template
    """The structure that the layer returns, with its tensors taken out."""
    written: tuple[int, ...]
    """The numbers of the operands that the run wrote into."""
    source: str = ""
    """The run: ``fake``, ``reference`` or ``kernel`` on fakes, ``probe`` of one of these two on
    sample inputs, or ``recorded``."""
    fresh: bool = False
    """Whether there are new data-dependent sizes in the results."""
    aliases: tuple[tuple[int, int], ...] = ()
    """The numbers of results that are operands themselves, with the numbers of these."""
    no_op: str = ""
    """Why no op can do what the run did; empty if one can."""

    @property
    def of_layer(self) -> bool:
        """Whether the run was one of the reference."""
        return self.source in ("reference", "probe of the reference")


def observe(runner: Runner, operands: Sequence[Any]) -> tuple[OutputSpec, list[Tensor]]:
    """Run a forward and describe what it returned, wrote and drew.

    Args:
        runner: Runs the forward.
        operands: The operands, which the forward may write into: real tensors, or fakes of a mode
            that is active.

    Returns:
        The spec of the output, and its tensors.

    Raises:
        UnsupportedValue: If the forward sets attributes or changes containers, or returns what no
            op can.
        Exception: Whatever the forward raises.
    """
    names = runner.call.names
    forms = [*map(_numbers, operands)]
    with watching(operands) as watch:
        tensors, output = flatten_tensors(runner.observe(operands))
    written = tuple(sorted(watch.written))
    if not (tensors or written):
        raise UnsupportedValue("the layer returns no tensor")
    results = tuple(TensorSpec(tuple(t.shape), t.dtype, t.device, _order(t)) for t in tensors)
    shared = _Shared.of(tensors, operands)
    no_op = "it draws random numbers" if watch.drew else shared.describe(names)
    for i, value in enumerate(operands):
        if _form(value) != [*map(_torch.expression, forms[i])]:
            no_op = f"it changes the shape or strides of {names[i]} in place"
    if not no_op and not written and len(shared.aliases) == len(tensors):
        no_op = "it returns what it is given"
    return OutputSpec(results, output, written, aliases=shared.aliases, no_op=no_op), tensors


def _order(tensor: Tensor) -> Order:
    return order_of(tensor) if tensor.layout is torch.strided else ()


def _numbers(value: object) -> tuple[object, ...]:
    """Return the sizes, strides and offset of a tensor."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return ()
    return (*value.shape, *value.stride(), value.storage_offset())


def _form(value: object) -> list[object]:
    """Return `_numbers` as expressions, which are compared without guards."""
    return [*map(_torch.expression, _numbers(value))]


class _Shared(NamedTuple):
    """The memory that results share with operands and with each other."""

    aliases: tuple[tuple[int, int], ...]
    views: tuple[tuple[int, int], ...]
    """Results that are views of operands, with the numbers of these."""
    overlapping: bool
    """Whether two results have elements in common."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor], operands: Sequence[Any]) -> _Shared:
        memories = [_memory(v) for v in operands]
        aliases, views = [], []
        own: list[Tensor] = []
        for k, tensor in enumerate(tensors):
            memory = _memory(tensor)
            owner = memories.index(memory) if memory is not None and memory in memories else None
            if owner is None:
                own.append(tensor)
            elif _form(tensor) == _form(operands[owner]) and _meaning(tensor) == _meaning(
                operands[owner]
            ):
                aliases.append((k, owner))
            else:
                views.append((k, owner))
        overlapping = any(
            _memory(one) is not None and _memory(one) == _memory(other) and overlap(one, other)
            for number, one in enumerate(own)
            for other in own[:number]
        )
        return cls(tuple(aliases), tuple(views), overlapping)

    def describe(self, names: Sequence[str]) -> str:
        """Return why an op cannot share memory like this; empty if it can."""
        for _, owner in self.views:
            return f"it returns a view of {names[owner]}"
        return "it returns tensors that share memory" if self.overlapping else ""


def _memory(value: object) -> object:
    """Return the identity of a tensor's memory; None where it has none."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return None if 0 in map(_torch.hint, value.shape) else _torch.storage_of(value)


def _meaning(tensor: Tensor) -> tuple[torch.dtype, bool, bool]:
    """Return what numbers the memory of ``tensor`` stands for."""
    return tensor.dtype, tensor.is_conj(), tensor.is_neg()
