"""What the kernels of an exported program stand in for: the layers' own forwards, as graphs.

A reference is a small exported program of its own, from the operands of an op to its results. It
is traced with all sizes dynamic, as far as the layer allows; what it was traced for instead, and
the numbers among the operands, which a trace takes as they are, are noted beside it. An op that is
called with operands of several such forms has a reference for each.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, Runner
from kernelgraph.graph.ops import NAMESPACE, overload, packed_operands, unpack
from kernelgraph.layers import Extensible
from kernelgraph.programs.program_ops import Installed

_ADVICE = "this is an op of kernelgraph: load the file with kernelgraph.load"
"""For those who load a program with torch alone, whose error shows the node that it fails at."""


def advise(program: ExportedProgram) -> None:
    """Have what torch says of an op that it does not know, say what to do."""
    for _, node in ops_in(program):
        node.meta["custom"] = {**(node.meta.get("custom") or {}), "kernelgraph": _ADVICE}


def know_references(there: Installed) -> None:
    """Have the references of an op used: for its gradient, and by ``torch.onnx.export``."""
    if there.references:
        name, references = there.entry.op, there.references
        there.reference = lambda operands: run(name, references, operands)
        instead = decomposition(there, references)
        _torch.register_decomposition(overload(name), there.body.fake, instead)


Json = Any


@dataclass(frozen=True)
class Reference:
    """One trace of a layer's own forward."""

    operands: tuple[Json, ...]
    """Of each operand what it has to be: of a tensor its sizes, numbers or names that stand for the
    same number each time; of a number, itself or such a name."""
    ranges: Mapping[str, tuple[int, int | None]]
    """The least and the greatest number that a name may stand for."""
    data: bytes
    """The program, as torch writes it."""

    def fits(self, operands: Sequence[Any]) -> bool:
        """Whether the trace is right for ``operands``; nothing symbolic is guarded."""
        known: dict[str, Any] = {}
        return len(operands) == len(self.operands) and all(
            len(wanted) == value.dim()
            and all(map(self._fits, wanted, value.shape, [known] * value.dim()))
            if isinstance(value, Tensor)
            else self._fits(wanted, value, known)
            for wanted, value in zip(self.operands, operands, strict=True)
        )

    def _fits(self, wanted: Json, value: Any, known: dict[str, Any]) -> bool:
        value = _torch.expression(value)
        if not isinstance(wanted, str):
            return type(wanted) is type(value) and bool(wanted == value)
        least, greatest = self.ranges[wanted]
        if isinstance(value, int) and (value < least or (greatest or value) < value):
            return False
        return bool(known.setdefault(wanted, value) == value)

    def __call__(self, operands: Sequence[Any]) -> list[Tensor]:
        """The results of a call with ``operands``."""
        return self._run(operands)

    @cached_property
    def _run(self) -> Callable[[Sequence[Any]], list[Tensor]]:
        with _torch.out_of_export():  # the call may be one that is traced
            program = torch.export.load(io.BytesIO(self.data))
        held = {**program.state_dict, **program.constants}
        inputs = [spec.target and held[spec.target] for spec in program.graph_signature.input_specs]

        def run(operands: Sequence[Any]) -> list[Tensor]:
            given = iter(operands)
            values = [next(given) if value is None else value for value in inputs]
            return list(program.graph_module(*values))

        return run

    def to_json(self) -> Json:
        """What there is to note of it."""
        ranges = {name: list(bounds) for name, bounds in sorted(self.ranges.items())}
        return {"operands": list(self.operands), "ranges": ranges}

    @classmethod
    def from_json(cls, noted: Json, data: bytes) -> Reference:
        """The inverse of `to_json`.

        Raises:
            ValueError, TypeError, KeyError: It is not such JSON.
        """
        ranges = {str(name): (int(a), b and int(b)) for name, (a, b) in noted["ranges"].items()}
        return cls(tuple(noted["operands"]), ranges, data)


# --- tracing ------------------------------------------------------------------------------------


def trace(
    layer: Extensible, call: Call, operands: Sequence[Any], written: Sequence[int]
) -> Reference:
    """The reference of a call.

    Args:
        layer: The layer.
        call: The form of the call, as the model makes it.
        operands: Operands like those of the call, see `_torch.symbolic_like`.
        written: Those that the layer writes into.

    Raises:
        Exception: Whatever comes of tracing a layer that cannot be traced.
    """
    made = _torch.fakes_for_export(operands)
    dynamic = [
        dict.fromkeys(range(value.dim()), Dim.AUTO)
        if isinstance(value, Tensor)
        else Dim.AUTO
        if isinstance(given, torch.SymInt)
        else None
        for value, given in zip(made, operands, strict=True)
    ]
    module = _Reference(layer, call, written)
    with torch.enable_grad():
        program = torch.export.export(module, tuple(made), dynamic_shapes=(tuple(dynamic),))
    program._example_inputs = None  # they are fakes, of which nobody could make tensors again
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return Reference(*_form(program, made), stream.getvalue())


class _Reference(nn.Module):
    """From operands to results."""

    def __init__(self, layer: Extensible, call: Call, written: Sequence[int]) -> None:
        super().__init__()
        self._written = tuple(written)
        self._runner = Runner(layer.reference, call)

    def forward(self, *operands: Any) -> list[Tensor]:
        return self._runner.results(operands, self._written)


def _form(
    program: ExportedProgram, operands: Sequence[Any]
) -> tuple[tuple[Json, ...], dict[str, tuple[int, int | None]]]:
    """`Reference.operands` and `Reference.ranges`."""
    names = [s.arg.name for s in program.graph_signature.input_specs if s.target is None]
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    ranges: dict[str, tuple[int, int | None]] = {}

    def form(value: Any) -> Json:
        expression = _torch.expression(value)
        if isinstance(expression, _torch.Expression):
            bounds = program.range_constraints.get(expression)
            least, greatest = _torch.bounds(bounds)
            ranges[str(expression)] = (least, greatest)
            return str(expression)
        return expression

    forms = []
    for name, operand in zip(names, operands, strict=True):
        value = values[name]
        if isinstance(operand, Tensor):
            forms.append([form(size) for size in value.shape])
        else:
            forms.append(form(operand if value is None else value))
    return tuple(forms), ranges


def trace_all(
    calls: Iterable[tuple[Extensible, Call, Sequence[Any]]],
    written: Sequence[int],
    there: Sequence[Reference] = (),
) -> tuple[list[Reference], str]:
    """References for the calls of one op, with those that are ``there`` already; and why there is
    none for some call, if so."""
    found = list(there)
    for layer, call, operands in calls:
        if not any(reference.fits(operands) for reference in found):
            try:
                with _torch.quiet():
                    found.append(trace(layer, call, operands, written))
            except Exception as error:
                return found, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return found, ""


# --- in the place of ops ------------------------------------------------------------------------


class NoReference(ValueError):
    """There is no reference for a call."""


def run(name: str, references: Sequence[Reference], operands: Sequence[Any]) -> list[Tensor]:
    """The results of a call of op ``name``, by the reference that fits.

    Raises:
        NoReference: None does.
    """
    for reference in references:
        if reference.fits(operands):
            return reference(operands)
    sizes = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else str(v) for v in operands)
    raise NoReference(f"there is no reference of op {name} for operands {sizes}")


def decomposition(installed: Installed, references: Sequence[Reference]) -> Callable[..., Any]:
    """A function that computes what an op does, by references."""
    packed = packed_operands(installed.form.call)

    def decompose(*arguments: Any) -> Any:
        results = run(installed.entry.op, references, unpack(arguments, packed))
        return results[0] if len(results) == 1 else tuple(results)

    return decompose


def without_ops(
    program: ExportedProgram, there: Iterable[tuple[Installed, Sequence[Reference]]]
) -> ExportedProgram:
    """``program`` with some of its ops replaced by references.

    Raises:
        NoReference: There is none for a call.
    """
    table: dict[Any, Callable[..., Any]] = {
        overload(installed.entry.op): decomposition(installed, references)
        for installed, references in there
    }
    replaced: ExportedProgram = program.run_decompositions(table)
    return replaced


def ops_in(program: ExportedProgram) -> Iterator[tuple[str, torch.fx.Node]]:
    """The calls of ops of ours in a program, also in the graphs that its graph calls."""
    for namespace, name, node in _all_ops_in(program):
        if namespace == NAMESPACE:
            yield name.removesuffix(".default"), node


def namespaces_in(program: ExportedProgram) -> set[str]:
    """The namespaces of the ops in a program."""
    return {namespace for namespace, _, _ in _all_ops_in(program)}


def _all_ops_in(program: ExportedProgram) -> Iterator[tuple[str, str, torch.fx.Node]]:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                name = getattr(node.target, "_name", "")
                if node.op == "call_function" and isinstance(name, str) and "::" in name:
                    namespace, _, rest = name.partition("::")
                    yield namespace, rest, node
