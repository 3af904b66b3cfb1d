"""The manifest of a saved program: its ops, their kernels, and a digest of each part of its file.

It is read and checked before anything that it describes is used. A digest shows that a file was
damaged, or changed by somebody who left the manifest as it was. It does not keep anybody from
making another file with another manifest: whether to trust its kernels is decided in
`kernelgraph.archive.supply`.
"""

from __future__ import annotations

import enum
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kernelgraph.archive.compatibility import release_of
from kernelgraph.programs import (
    Baked,
    Json,
    KernelMember,
    as_array,
    as_object,
    as_pair,
    as_text,
)
from kernelgraph.selection import Mode

FORMAT = "kernelgraph program"
VERSION = 1


class ProgramKind(enum.Enum):
    """How a program was saved. The values are those in the manifest."""

    EXPORTED = "program"
    """By `kernelgraph.save`."""
    COMPILED = "aot"
    """By `kernelgraph.aot_compile`."""


class KernelOnDevice(NamedTuple):
    """A kernel and the type of device that it runs on."""

    key: str
    """The key of the kernel in `Manifest.kernels`."""
    device: str


class RecordedCall(NamedTuple):
    """One call of an op in the program, described for people."""

    path: str
    """The path of the layer in the model."""
    operands: tuple[str, ...]
    """The dtype and sizes of each tensor; each other operand as text."""


@dataclass(frozen=True)
class Op:
    """One op of the program."""

    name: str
    """Its name in the graph, without the namespace."""
    kernel: str
    """The key of its kernel."""
    stem: str
    """The name that follows from ``kernel`` and ``form``; ``name`` may add ``_training``."""
    form: Mapping[str, Json]
    """The signature, see `kernelgraph.programs.program_ops.ProgramOpSpec`."""
    references: tuple[Json, ...]
    """See `kernelgraph.programs.references.Reference`."""
    untraced: str
    """Why some call has no reference; empty if each has one."""
    device: str
    """The type of device."""
    schema: str
    calls: tuple[RecordedCall, ...]

    @property
    def kernel_on_device(self) -> KernelOnDevice:
        """The kernel that the op calls, where it runs."""
        return KernelOnDevice(self.kernel, self.device)

    @property
    def layer(self) -> str:
        """The name of the layer that the kernel replaces."""
        return str(self.form["layer"])

    @property
    def member(self) -> KernelMember:
        """The layer or function of the kernel."""
        return KernelMember.from_json(self.form["take"])

    @property
    def mode(self) -> Mode:
        """The mode that the kernel was chosen for."""
        return Mode.TRAINING if self.form["training"] else Mode.INFERENCE

    @property
    def replaceable(self) -> bool:
        """Whether references can replace the op in all its calls."""
        return bool(self.references) and not self.untraced

    def to_json(self) -> Json:
        """Return the op as JSON."""
        return {
            "kernel": self.kernel,
            "stem": self.stem,
            "form": self.form,
            "references": list(self.references),
            "untraced": self.untraced,
            "device": self.device,
            "schema": self.schema,
            "calls": [[path, list(operands)] for path, operands in self.calls],
        }

    @classmethod
    def from_json(cls, name: str, data: Json) -> Op:
        """Return the op ``name`` from what `to_json` returned.

        Raises:
            ValueError, KeyError, TypeError: If it is not such JSON.
        """
        parts = as_object(data)
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no op")
        return cls(
            name,
            as_text(parts["kernel"]),
            as_text(parts["stem"]),
            as_object(parts["form"]),
            tuple(as_array(parts["references"])),
            as_text(parts["untraced"]),
            as_text(parts["device"]),
            as_text(parts["schema"]),
            tuple(map(_recorded_call, as_array(parts["calls"]))),
        )


def _recorded_call(data: Json) -> RecordedCall:
    path, operands = as_pair(data)
    return RecordedCall(as_text(path), tuple(map(as_text, as_array(operands))))


@dataclass(frozen=True)
class Manifest:
    """The description of a saved program."""

    kind: ProgramKind
    torch: str
    """The version of torch that made the program."""
    kernelgraph: str
    """The version of this package that saved it."""
    ops: Mapping[str, Op]
    """By name."""
    kernels: Mapping[str, Baked]
    """By key."""
    traced: Mapping[str, KernelOnDevice] = field(default_factory=dict)
    """The kernels whose own ops are in the program, by the namespace of these ops."""
    members: Mapping[str, str] = field(default_factory=dict)
    """The hex sha256 of each part of the archive but the manifest."""

    def to_json(self) -> dict[str, Json]:
        """Return the manifest as JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind.value,
            "torch": self.torch,
            "kernelgraph": self.kernelgraph,
            "ops": {name: op.to_json() for name, op in sorted(self.ops.items())},
            "kernels": {key: kernel.to_json() for key, kernel in sorted(self.kernels.items())},
            "traced": {name: list(kernel) for name, kernel in sorted(self.traced.items())},
            "members": dict(sorted(self.members.items())),
        }

    @classmethod
    def from_json(cls, data: Json, source: str) -> Manifest:
        """Return the manifest from what `to_json` returned.

        Raises:
            ValueError: If it is not such JSON, or of another version; the message names ``source``.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{source}: expected a {FORMAT}, got {reprlib.repr(data)}")
        if data.get("version") != VERSION:
            raise ValueError(
                f"{source}: its manifest is of version {data.get('version')}, and this kernelgraph "
                f"reads version {VERSION}: save the program again, or load it with "
                f"kernelgraph {data.get('kernelgraph')}"
            )
        try:
            records = as_object(data["kernels"]).items()
            kernels = {key: Baked.from_json(record, source) for key, record in records}
            ops = {name: Op.from_json(name, op) for name, op in as_object(data["ops"]).items()}
            pairs = {name: as_pair(pair) for name, pair in as_object(data["traced"]).items()}
            traced = {n: KernelOnDevice(as_text(k), as_text(d)) for n, (k, d) in pairs.items()}
            _check_keys(kernels, ops.values(), traced.values())
            release_of(as_text(data["torch"]))
            return cls(
                _kind_of(data["kind"]),
                as_text(data["torch"]),
                as_text(data["kernelgraph"]),
                ops,
                kernels,
                traced,
                {name: as_text(sha256) for name, sha256 in as_object(data["members"]).items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{source}: its manifest cannot be understood: {type(error).__name__}: {error}"
            ) from error


def _check_keys(
    kernels: Mapping[str, Baked], ops: Iterable[Op], traced: Iterable[KernelOnDevice]
) -> None:
    """Raise an error if a key names no kernel, or another kernel than its own."""
    used = {key for kernel in kernels.values() for _, key in kernel.uses}
    used |= {op.kernel for op in ops} | {kernel.key for kernel in traced}
    misnamed = [key for key, kernel in kernels.items() if kernel.key != key]
    if missing := [*(used - kernels.keys()), *misnamed]:
        raise ValueError(f"there is no kernel {missing[0]}")


def _kind_of(value: object) -> ProgramKind:
    try:
        return ProgramKind(value)
    except ValueError:
        raise ValueError(f"there is no kind {value!r}") from None
