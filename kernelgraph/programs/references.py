"""The references of ops: the layers' own forwards, traced as programs of their own.

A reference is a small exported program from the operands of an op to its results. It is traced with
all sizes dynamic, as far as the layer allows. The sizes that had to be fixed, and the numbers among
the operands, which a trace takes as constants, are recorded beside it. An op that is called in
several such ways has a reference for each.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, Runner
from kernelgraph.layers import Extensible
from kernelgraph.programs.portable_json import Json, as_array, as_object, as_pair, is_int
from kernelgraph.report import error_text

Ranges = Mapping[str, tuple[int, int | None]]
"""The least and the greatest value of each size that may vary, by name; None for no upper limit."""


@dataclass(frozen=True)
class Reference:
    """One trace of a layer's own forward."""

    operands: tuple[Json, ...]
    """The operands that the trace is valid for: for a tensor an array of its sizes, for a number
    the number. A name in the place of a size or number stands for one that may vary, and for the
    same value each time."""
    ranges: Ranges
    """The values that the names may stand for."""
    data: bytes
    """The program, as ``torch.export.save`` writes it."""

    def fits(self, operands: Sequence[object]) -> bool:
        """Whether the trace is valid for ``operands``; nothing symbolic is guarded."""
        values: dict[str, object] = {}
        return len(operands) == len(self.operands) and all(
            self._fits_tensor(expected, operand, values)
            if isinstance(operand, Tensor)
            else self._fits(expected, operand, values)
            for expected, operand in zip(self.operands, operands, strict=True)
        )

    def _fits_tensor(self, expected: Json, operand: Tensor, values: dict[str, object]) -> bool:
        sizes = as_array(expected)
        return len(sizes) == operand.dim() and all(
            self._fits(size, value, values)
            for size, value in zip(sizes, operand.shape, strict=True)
        )

    def _fits(self, expected: Json, value: object, values: dict[str, object]) -> bool:
        value = _torch.expression(value)
        if not isinstance(expected, str):
            return type(expected) is type(value) and bool(expected == value)
        least, greatest = self.ranges[expected]
        if isinstance(value, int) and (value < least or (greatest or value) < value):
            return False
        return bool(values.setdefault(expected, value) == value)

    def __call__(self, operands: Sequence[object]) -> list[Tensor]:
        """Return the results of a call with ``operands``."""
        return self._run(operands)

    @cached_property
    def _run(self) -> Callable[[Sequence[object]], list[Tensor]]:
        with _torch.out_of_export():  # the call may be part of an export
            program = torch.export.load(io.BytesIO(self.data))
        held = {**program.state_dict, **program.constants}
        inputs = [spec.target and held[spec.target] for spec in program.graph_signature.input_specs]

        def run(operands: Sequence[object]) -> list[Tensor]:
            rest = iter(operands)
            values = [next(rest) if value is None else value for value in inputs]
            return list(program.graph_module(*values))

        return run

    def to_json(self) -> Json:
        """Return all but the program as JSON."""
        ranges = {name: list(bounds) for name, bounds in sorted(self.ranges.items())}
        return {"operands": list(self.operands), "ranges": ranges}

    @classmethod
    def from_json(cls, json: Json, data: bytes) -> Reference:
        """Return the reference from what `to_json` returned, and its program.

        Raises:
            ValueError: If it is not such JSON.
            KeyError: If a part of it is missing.
        """
        parts = as_object(json)
        ranges = {name: _bounds_from_json(b) for name, b in as_object(parts["ranges"]).items()}
        return cls(tuple(as_array(parts["operands"])), ranges, data)


def _bounds_from_json(data: Json) -> tuple[int, int | None]:
    least, greatest = as_pair(data)
    if is_int(least) and (greatest is None or is_int(greatest)):
        return least, greatest
    raise ValueError(f"{data!r} is no range of sizes")


# --- tracing ------------------------------------------------------------------------------------


class ExportedCall(NamedTuple):
    """A call in a model that is being exported."""

    layer: Extensible
    call: Call
    """The signature of the call, as the model makes it."""
    operands: Sequence[object]
    """Fakes like the operands, with symbols for the sizes that are symbolic in the model; see
    `_torch.symbolic_like`."""


def trace_references(
    calls: Iterable[ExportedCall], written: Sequence[int], known: Sequence[Reference] = ()
) -> tuple[list[Reference], str]:
    """Trace the references that the calls of one op need.

    Args:
        calls: The calls.
        written: The operands that the layer writes into.
        known: The references that the op has already.

    Returns:
        The known and new references; and why some call has none, empty if each has one.
    """
    found = list(known)
    for call in calls:
        if not any(reference.fits(call.operands) for reference in found):
            try:
                with _torch.quiet():
                    found.append(_trace(call, written))
            except Exception as error:
                return found, error_text(error)
    return found, ""


def _trace(call: ExportedCall, written: Sequence[int]) -> Reference:
    """Trace the reference of a call.

    Raises:
        Exception: Whatever tracing a layer that cannot be traced raises.
    """
    fakes = _torch.fakes_for_export(call.operands)
    dynamic = [
        dict.fromkeys(range(fake.dim()), Dim.AUTO)
        if isinstance(fake, Tensor)
        else Dim.AUTO
        if isinstance(operand, torch.SymInt)
        else None
        for fake, operand in zip(fakes, call.operands, strict=True)
    ]
    module = _Reference(call, written)
    with torch.enable_grad():
        program = torch.export.export(module, tuple(fakes), dynamic_shapes=(tuple(dynamic),))
    program._example_inputs = None  # fakes, which could not be saved
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return Reference(*_recorded_operands(program, fakes), stream.getvalue())


class _Reference(nn.Module):
    """A layer's own forward as a module from operands to results."""

    def __init__(self, call: ExportedCall, written: Sequence[int]) -> None:
        super().__init__()
        self._written = tuple(written)
        self._runner = Runner(call.layer.reference, call.call)

    def forward(self, *operands: object) -> list[Tensor]:
        return self._runner.results(operands, self._written)


def _recorded_operands(
    program: ExportedProgram, operands: Sequence[object]
) -> tuple[tuple[Json, ...], Ranges]:
    """Return `Reference.operands` and `Reference.ranges` of a trace."""
    names = [s.arg.name for s in program.graph_signature.input_specs if s.target is None]
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    ranges: dict[str, tuple[int, int | None]] = {}

    def recorded(value: object) -> Json:
        expression = _torch.expression(value)
        if isinstance(expression, _torch.Expression):
            ranges[str(expression)] = _torch.bounds(program.range_constraints.get(expression))
            return str(expression)
        number: Json = expression
        return number

    found: list[Json] = []
    for name, operand in zip(names, operands, strict=True):
        value = values[name]
        if isinstance(operand, Tensor):
            found.append([recorded(size) for size in value.shape])
        else:
            found.append(recorded(operand if value is None else value))
    return tuple(found), ranges


# --- running ------------------------------------------------------------------------------------


class NoReference(ValueError):
    """No reference of an op fits a call."""


def run_reference(
    name: str, references: Sequence[Reference], operands: Sequence[object]
) -> list[Tensor]:
    """Return the results of a call of the op ``name``, from the first reference that fits.

    Raises:
        NoReference: If none fits.
    """
    for reference in references:
        if reference.fits(operands):
            return reference(operands)
    sizes = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else str(v) for v in operands)
    raise NoReference(f"there is no reference of op {name} for operands {sizes}")
