"""The ops of exported programs: as those of compiled graphs, but made from plain data alone.

An exported program runs where the model's code is not. So all that such an op is made from is its
kernel and its `Form`, which JSON can write: the form of the call (`kernelgraph.programs.portable_call`) and
the sizes of its results (`kernelgraph.programs.portable_sizes`). Where a program is exported the op is made
from just this too, so that what runs there is what will run elsewhere.

The name holds a digest of the data and of the kernel's revision: data that was changed names
another op.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraph.builds import Checked, Origin, read_metadata
from kernelgraph.fingerprint import digest
from kernelgraph.graph import ops
from kernelgraph.graph.calls import Call, Template
from kernelgraph.graph.infer import Effects, OutputSpec, Source, TensorSpec
from kernelgraph.graph.ops import Body, ByReference
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible
from kernelgraph.programs.baked_kernels import Baked
from kernelgraph.programs.portable_call import (
    NotPortable,
    call_from_json,
    call_to_json,
    template_from_json,
    template_to_json,
)
from kernelgraph.programs.portable_sizes import Sizes
from kernelgraph.selection import Device, Mode, Selection

FORM_VERSION = "1"
"""Counted up, with that of the manifest, when the same form comes to mean another op."""


@dataclass(frozen=True)
class Form:
    """What an op is made from, besides its kernel."""

    layer_name: str
    """The layer that the kernel stands in for."""
    member: tuple[str, str]
    """What is taken of the kernel: ``layer_name`` or ``func_name``, and the name."""
    call: Call
    output: Template
    sizes: Sizes
    writes: Effects
    training: bool
    flows: tuple[tuple[bool, ...], tuple[bool, ...]] | None = None
    """Where the op is for training: which operands wanted gradients when it was exported, and
    which results then have one."""

    def to_json(self, needed: Sequence[Any]) -> Any:
        """As JSON; see `call_to_json`.

        Raises:
            NotPortable: It depends on code of the model's.
        """
        return {
            "layer": self.layer_name,
            "take": list(self.member),
            "call": call_to_json(self.call, needed),
            "output": template_to_json(self.output),
            "sizes": self.sizes.to_json(),
            "writes": {"kernel": list(self.writes.kernel), "layer": list(self.writes.layer)},
            "training": self.training,
            "flows": self.flows and [list(part) for part in self.flows],
        }

    @classmethod
    def from_json(cls, data: Any) -> Form:
        """The inverse of `to_json`, with classes that stand in for the model's.

        Raises:
            ValueError: It is not such JSON.
        """
        try:
            kind, name = data["take"]
            if kind not in ("layer_name", "func_name") or type(data["training"]) is not bool:
                raise ValueError(f"{data['take']!r} is nothing to take of a kernel")
            writes = Effects(*(tuple(map(int, data["writes"][w])) for w in ("kernel", "layer")))
            flows = data["flows"] and tuple(tuple(map(bool, part)) for part in data["flows"])
            return cls(
                str(data["layer"]),
                (kind, str(name)),
                call_from_json(data["call"]),
                template_from_json(data["output"]),
                Sizes.from_json(data["sizes"]),
                writes,
                data["training"],
                flows,
            )
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"it is no form of an op: {type(error).__name__}: {error}") from error

    @property
    def device(self) -> str:
        """The type of device that it runs on."""
        return self.sizes.results[0].device

    @property
    def told(self) -> OutputSpec:
        """What is known of the results before there is a call."""
        results = tuple(
            TensorSpec((None,) * len(r.size), r.dtype, torch.device(r.device))
            for r in self.sizes.results
        )
        return OutputSpec(results, self.output, self.writes.kernel, "recorded")

    @property
    def source(self) -> Source:
        """What tells the results of a call."""
        return self.sizes.source(self.output, self.writes.kernel)


@dataclass(frozen=True)
class Entry:
    """An op, as the manifest of a program has it."""

    name: str
    """In `ops.NAMESPACE`."""
    form: Any
    """As JSON."""
    origin: Origin
    """The kernel's, where the program was exported."""

    @classmethod
    def of(cls, form: Any, origin: Origin) -> Entry:
        """The entry for a form; the name follows from both."""
        stem = ops.readable_name(origin.name, form["take"][1], origin.revision)
        written = json.dumps(form, sort_keys=True)
        # Not the version of lowering, which is for caches: files are to be read by later ones.
        made = digest("exported", FORM_VERSION, origin.revision, written)
        return cls(f"{stem}_{made}", form, origin)

    @property
    def op(self) -> str:
        """The op's name as graphs have it."""
        return f"{self.name}_training" if self.form["training"] else self.name


# --- the ops that there are ---------------------------------------------------------------------


@dataclass
class Installed:
    """An op of an exported program that is registered in this process."""

    entry: Entry
    form: Form
    body: Body
    awaited: _Awaited | None
    """What is to get the kernel, where there was none."""
    kernel: Kernel | None
    reference: Callable[[Sequence[Any]], Sequence[Tensor]] | None = None
    """The reference, from the operands to the results."""
    references: Sequence[Any] = ()
    """The `kernelgraph.programs.references.Reference` of calls of different sizes."""
    untraced: str = ""
    """Why there is no reference for some call."""
    kernels: Noted | None = None
    """Where the kernel is from, if a program with it was loaded."""


_installed: dict[str, Installed] = {}
_lock = threading.RLock()


def installed() -> Mapping[str, Installed]:
    """The ops of exported programs in this process, by the names that graphs have them under."""
    return _installed


def install(entry: Entry, kernel: Kernel | None) -> Installed:
    """Register an op, if it is not yet; without a ``kernel``, one that raises when it is called.

    Raises:
        ValueError: The entry's form cannot be understood.
    """
    with _lock:
        if entry.op not in _installed:
            _installed[entry.op] = _install(entry, kernel)
        there = _installed[entry.op]
        if there.kernel is None and kernel is not None:
            assert there.awaited is not None
            there.kernel = there.awaited.kernel = kernel
        return there


def _install(entry: Entry, kernel: Kernel | None) -> Installed:
    form = Form.from_json(entry.form)
    awaited = None if kernel else _Awaited(entry)
    name = entry.op

    def reference(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = _installed[name].reference
        if function is None:
            raise RuntimeError(f"op {name} has no gradient here: its reference is not known")
        return form.output.unflatten(function(form.call.operands_of(module, args, kwargs)))

    owner = type(form.layer_name, (nn.Module,), {"forward": reference})
    parts = (
        kernel or awaited.stand_in,  # type: ignore[union-attr]
        Extensible(owner, form.layer_name),
        form.call,
        form.source,
        form.told,
        form.writes,
    )
    body = ByReference(*form.flows, *parts) if form.flows else Body(*parts)
    ops.register(entry.name, form.call, body)
    return Installed(entry, form, body, awaited, kernel)


@dataclass(frozen=True)
class Nowhere:
    """What stands for a repository where there is only the layer."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer


class _Awaited:
    """A kernel that is not there, or not yet."""

    def __init__(self, entry: Entry) -> None:
        self.kernel: Kernel | None = None

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.kernel is None:
                raise RuntimeError("it is not on this machine: the program was loaded without it")
            return self.kernel.forward(module, *args, **kwargs)

        layer = type(str(entry.form["take"][1]), (nn.Module,), {"forward": forward})
        selection = Selection(Nowhere(layer), Mode.FALLBACK, Device("cpu"))
        self.stand_in = Kernel(layer, entry.origin, selection)


# --- kernels that are traced ---------------------------------------------------------------------

Noted = tuple[str, Mapping[str, Baked], Mapping[str, Checked]]
"""A kernel's key; and by their keys, it and those that it uses: what there is to note of them, and
what they are on this machine."""

_traced: dict[str, tuple[Noted, str]] = {}


def traced() -> Mapping[str, tuple[Noted, str]]:
    """The kernels whose own ops are in programs, by the ops' namespace, and for which device."""
    return _traced


def note_traced(noted: Noted, device: str) -> str:
    """Note that a kernel's own ops are in a program; the namespace that they are in.

    Raises:
        ValueError: The kernel does not say in which.
    """
    key, _, here = noted
    namespace = read_metadata(here[key].directory).id
    if namespace is None:
        raise NotPortable(
            f"kernel {key} does not say what its ops are called: its metadata has no id"
        )
    _traced[namespace] = noted, device
    return namespace
