"""The ops of exported programs: made from plain data and a kernel, and found in graphs.

An exported program runs without the model's code. So such an op is made from nothing but its kernel
and its `ProgramOpSpec`, which can be written as JSON: the signature of the call
(`kernelgraph.programs.portable_call`), the sizes of the results
(`kernelgraph.programs.portable_sizes`) and what the call writes into. Where a model is exported its
ops are made from the same data, so that what runs there is what will run elsewhere.

The name of an op holds a digest of the data and of the kernel's revision: data that was changed
names another op.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from kernelgraph.builds import Origin
from kernelgraph.fingerprint import digest
from kernelgraph.graph import _torch, ops
from kernelgraph.graph.calls import Call, Path, Template
from kernelgraph.graph.infer import Effects, InferOutput, OutputSpec, TensorSpec
from kernelgraph.graph.ops import Body, ByReference
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible
from kernelgraph.programs.baked_kernels import KernelRecords, LateKernel
from kernelgraph.programs.portable_call import call_from_json, call_to_json
from kernelgraph.programs.portable_json import (
    Json,
    as_array,
    as_object,
    as_pair,
    as_text,
    is_index,
    template_from_json,
    template_to_json,
)
from kernelgraph.programs.portable_sizes import Sizes
from kernelgraph.programs.references import Reference, run_reference

SPEC_VERSION = "1"
"""Increased, with the version of the manifest, when the same data comes to mean another op."""


# --- what an op is made from --------------------------------------------------------------------


class KernelMember(NamedTuple):
    """The layer or function of a kernel that an op runs."""

    kind: str
    """``layer_name`` or ``func_name``."""
    name: str

    @classmethod
    def from_json(cls, data: Json) -> KernelMember:
        """Return the member from a pair of strings.

        Raises:
            ValueError: If it is not such JSON.
        """
        kind, name = map(as_text, as_pair(data))
        if kind not in ("layer_name", "func_name"):
            raise ValueError(f"{kind!r} is neither layer_name nor func_name")
        return cls(kind, name)


class GradientFlow(NamedTuple):
    """The operands and results of an op for training that gradients flow through."""

    operands: tuple[bool, ...]
    """For each operand, whether a gradient was wanted of it when the op was exported."""
    results: tuple[bool, ...]
    """For each result, whether it then has a gradient."""


@dataclass(frozen=True)
class ProgramOpSpec:
    """The plain data that an op is made from, besides its kernel."""

    layer_name: str
    """The name of the layer that the kernel replaces."""
    member: KernelMember
    call: Call
    output: Template
    """The structure of what the layer returns."""
    sizes: Sizes
    writes: Effects
    flow: GradientFlow | None = None
    """The flow of gradients through an op for training; None for inference."""

    def to_json(self, needed: Collection[Path]) -> Json:
        """Return the spec as JSON.

        Args:
            needed: The paths of the constants that the kernel reads, see `call_to_json`.

        Raises:
            NotPortable: If it depends on the model's code.
        """
        return {
            "layer": self.layer_name,
            "take": list(self.member),
            "call": call_to_json(self.call, needed),
            "output": template_to_json(self.output),
            "sizes": self.sizes.to_json(),
            "writes": {"kernel": list(self.writes.kernel), "layer": list(self.writes.layer)},
            "training": self.flow is not None,
            "flows": self.flow and [list(flags) for flags in self.flow],
        }

    @classmethod
    def from_json(cls, data: Json) -> ProgramOpSpec:
        """Return the spec from what `to_json` returned, with stand-ins for the model's classes.

        Raises:
            ValueError: If it is not such JSON.
        """
        try:
            parts = as_object(data)
            flow = _flow_from_json(parts["flows"])
            if parts["training"] is not (flow is not None):
                raise ValueError(f"training is {parts['training']!r}, with flows {flow!r}")
            writes = as_object(parts["writes"])
            return cls(
                as_text(parts["layer"]),
                KernelMember.from_json(parts["take"]),
                call_from_json(parts["call"]),
                template_from_json(parts["output"]),
                Sizes.from_json(parts["sizes"]),
                Effects(_numbers(writes["kernel"]), _numbers(writes["layer"])),
                flow,
            )
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"no op has this data: {type(error).__name__}: {error}") from error

    @property
    def device(self) -> str:
        """The type of device that the op runs on."""
        return self.sizes.results[0].device

    @property
    def output_spec(self) -> OutputSpec:
        """The part of the output's spec that all calls have in common, with None for each size."""
        results = tuple(
            TensorSpec((None,) * len(r.size), r.dtype, torch.device(r.device), r.order)
            for r in self.sizes.results
        )
        return OutputSpec(results, self.output, self.writes.kernel, "recorded")

    @property
    def source(self) -> InferOutput:
        """The function that infers the output of a call."""
        return self.sizes.source(self.output, self.writes.kernel)


def _numbers(data: Json) -> tuple[int, ...]:
    numbers = tuple(number for number in as_array(data) if is_index(number))
    if len(numbers) != len(as_array(data)):
        raise ValueError(f"{data!r} are no numbers of operands")
    return numbers


def _flow_from_json(data: Json) -> GradientFlow | None:
    if data is None:
        return None
    operands, results = (tuple(map(bool, as_array(flags))) for flags in as_pair(data))
    return GradientFlow(operands, results)


@dataclass(frozen=True)
class ProgramOp:
    """The identity of an op: its data and the origin of its kernel, as a manifest has them."""

    stem: str
    """The name in `ops.NAMESPACE` that follows from data and kernel; that of an op for training has
    ``_training`` behind it."""
    spec: Mapping[str, Json]
    """A `ProgramOpSpec` as JSON."""
    origin: Origin
    """The origin of the kernel where the program was exported."""

    @classmethod
    def of(cls, spec: Json, origin: Origin) -> ProgramOp:
        """Return the op that is made from ``spec``, a `ProgramOpSpec` as JSON, and a kernel."""
        data = as_object(spec)
        name = KernelMember.from_json(data["take"]).name
        readable = ops.readable_name(origin.name, name, origin.revision)
        text = json.dumps(data, sort_keys=True)
        # LOWERING_VERSION is not in it: it is for caches, and later versions have to read files.
        suffix = digest("exported", SPEC_VERSION, origin.revision, text)
        return cls(f"{readable}_{suffix}", data, origin)

    @property
    def member(self) -> KernelMember:
        """The layer or function that the op runs."""
        return KernelMember.from_json(self.spec["take"])

    @property
    def name(self) -> str:
        """The name of the op in graphs."""
        return f"{self.stem}_training" if self.spec["training"] else self.stem


# --- registered ops -----------------------------------------------------------------------------

ReferenceFunction = Callable[[Sequence[object]], Sequence[Tensor]]
"""A function from the operands of an op to its results."""


@dataclass
class InstalledOp:
    """An op of an exported program that is registered in this process."""

    op: ProgramOp
    spec: ProgramOpSpec
    body: Body
    kernel: Kernel | None
    late_kernel: LateKernel | None
    """The stand-in that runs the kernel, where the op was registered without one."""
    reference: ReferenceFunction | None = None
    """The function that computes the reference, once one is known."""
    references: Sequence[Reference] = ()
    """Traces of the reference for calls of different sizes."""
    untraced: str = ""
    """Why some call has no reference; empty if each has one."""
    records: KernelRecords | None = None
    """The records of the kernel, if a program that was loaded has it."""


_installed: dict[str, InstalledOp] = {}
_lock = threading.RLock()


def installed_ops() -> Mapping[str, InstalledOp]:
    """Return the ops of exported programs in this process, by their names in graphs."""
    return _installed


def install(op: ProgramOp, kernel: Kernel | None) -> InstalledOp:
    """Register an op if it is new, and give it its kernel if it has none.

    Args:
        op: The op.
        kernel: The kernel; None for an op that raises when it is called.

    Raises:
        ValueError: If the op's data is malformed.
    """
    with _lock:
        if op.name not in _installed:
            _installed[op.name] = _register(op, kernel)
        installed = _installed[op.name]
        if installed.kernel is None and kernel is not None:
            assert installed.late_kernel is not None
            installed.kernel = installed.late_kernel.kernel = kernel
        return installed


def _register(op: ProgramOp, kernel: Kernel | None) -> InstalledOp:
    spec = ProgramOpSpec.from_json(op.spec)
    late_kernel, runs = None, kernel
    if runs is None:
        late_kernel = LateKernel(op.member.name, op.origin)
        runs = late_kernel.stand_in
    layer = _layer_of(op, spec)
    parts = (runs, layer, spec.call, spec.source, spec.output_spec, spec.writes)
    body = ByReference(*spec.flow, *parts) if spec.flow else Body(*parts)
    ops.register(op.stem, spec.call, body)
    return InstalledOp(op, spec, body, kernel, late_kernel)


def _layer_of(op: ProgramOp, spec: ProgramOpSpec) -> Extensible:
    """Return an extensible layer whose forward runs the op's reference."""

    def forward(module: nn.Module, *args: object, **kwargs: object) -> object:
        reference = _installed[op.name].reference
        if reference is None:
            raise RuntimeError(
                f"op {op.name} has no gradient here: the forward of layer {spec.layer_name}, whose "
                "gradient it would be, is not known"
            )
        return spec.output.unflatten(reference(spec.call.operands_of(module, args, kwargs)))

    owner = type(spec.layer_name, (nn.Module,), {"forward": forward})
    return Extensible(owner, spec.layer_name)


# --- references in the place of ops -------------------------------------------------------------


def use_references(installed: InstalledOp) -> None:
    """Use the references of an op for its gradient, and in ``torch.onnx.export``."""
    if installed.references:
        name, references = installed.op.name, installed.references
        installed.reference = lambda operands: run_reference(name, references, operands)
        decomposition = _decomposition(installed, references)
        _torch.register_decomposition(ops.overload(name), installed.body.fake, decomposition)


def replace_with_references(
    program: ExportedProgram, replaced: Iterable[tuple[InstalledOp, Sequence[Reference]]]
) -> ExportedProgram:
    """Return ``program`` with ops replaced by references.

    Args:
        program: The program, which stays as it is.
        replaced: The ops, each with its references.

    Raises:
        NoReference: If a call of such an op fits none of its references.
    """
    table: dict[Any, Callable[..., object]] = {
        ops.overload(installed.op.name): _decomposition(installed, references)
        for installed, references in replaced
    }
    made: ExportedProgram = program.run_decompositions(table)
    return made


def _decomposition(
    installed: InstalledOp, references: Sequence[Reference]
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """Return a function from the arguments of an op to what it returns, by its references."""
    packed = ops.packed_operands(installed.spec.call)

    def decompose(*arguments: object) -> Tensor | tuple[Tensor, ...]:
        results = run_reference(installed.op.name, references, ops.unpack(arguments, packed))
        return results[0] if len(results) == 1 else tuple(results)

    return decompose


# --- ops in the graphs of a program -------------------------------------------------------------

_ADVICE = "this is an op of kernelgraph: load the file with kernelgraph.load"


def add_advice(program: ExportedProgram) -> None:
    """Note at each call of an op of ours how to load the program.

    torch shows the note in its error when the program is loaded with torch alone, which does not
    know the op.
    """
    for _, node in ops_in(program):
        node.meta["custom"] = {**(node.meta.get("custom") or {}), "kernelgraph": _ADVICE}


def ops_in(program: ExportedProgram) -> Iterator[tuple[str, fx.Node]]:
    """Yield the name and the node of each call of an op of ours, subgraphs included."""
    for namespace, name, node in _calls_in(program):
        if namespace == ops.NAMESPACE:
            yield name.removesuffix(".default"), node


def namespaces_in(program: ExportedProgram) -> set[str]:
    """Return the namespaces of all ops that a program calls."""
    return {namespace for namespace, _, _ in _calls_in(program)}


def _calls_in(program: ExportedProgram) -> Iterator[tuple[str, str, fx.Node]]:
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                name = getattr(node.target, "_name", "")
                if node.op == "call_function" and isinstance(name, str) and "::" in name:
                    namespace, _, rest = name.partition("::")
                    yield namespace, rest, node
