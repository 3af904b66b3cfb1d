"""Which kernel is registered for which layer, device and mode, and the choice among them.

A ``KernelMapping`` never changes. Registering and entering a scope make a new one and replace a
reference to it, so whoever holds a mapping may read it without a lock.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kernelgraph.report import Reason
from kernelgraph.selection.devices import Device, Target, type_name
from kernelgraph.selection.modes import REGISTRABLE, Mode, tried

if TYPE_CHECKING:
    from torch import nn


class Repository(Protocol):
    """Where a kernel comes from: any hashable and comparable object with ``load``."""

    def load(self) -> type[nn.Module]:
        """The hub layer. Nothing is fetched nor imported before this is called."""
        ...


# The keys are Any because a Mapping is invariant in its keys: with ``str | Device`` here a
# caller's ``dict[str, ...]`` would be a type error. ``KernelMapping.parse`` checks them.
MappingLike: TypeAlias = Mapping[str, Mapping[Any, Repository | Mapping[Any, Repository]]]
"""layer name -> ``Device`` or device type -> a repository, or a dict from ``Mode`` to one.

The ``kernels`` package's objects of these names will do as well.
"""


@dataclass(frozen=True)
class Entry:
    """What one registration gave for one layer name and device: all its modes."""

    device: Device
    repositories: tuple[tuple[Mode, Repository], ...]

    def contains(self, capability: int | None) -> bool:
        """Whether the entry is for this capability; an unknown one is None."""
        bounds = self.device.properties
        return bounds is None or (capability is not None and capability in bounds)

    @property
    def width(self) -> float:
        """How many capabilities lie between the bounds."""
        bounds = self.device.properties
        return math.inf if bounds is None else bounds.max_capability - bounds.min_capability


@dataclass(frozen=True)
class KernelMapping:
    """The registered kernels: for each layer name its entries, the last registered last."""

    layers: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __hash__(self) -> int:
        return hash(frozenset(self.layers.items()))

    @classmethod
    def parse(cls, mapping: MappingLike) -> KernelMapping:
        """Check a caller's dicts and copy what they hold.

        Two keys of one dict may name one device (``"metal"`` and ``"mps"``) or one mode; they
        count as registered in the dict's order.

        Args:
            mapping: layer name -> ``Device`` or device type -> a repository, which is registered
                under ``Mode.FALLBACK``, or a dict from ``Mode`` to repository.

        Raises:
            TypeError: a key or a value has the wrong type; the message says which.
            ValueError: there is no such device type, or no kernel is ever sought under the mode.
        """
        layers = {}
        for name, devices in _items("mapping", mapping, "layer name to devices"):
            if not isinstance(name, str):
                raise TypeError(f"mapping: expected layer names (str) as keys, got {_key(name)}")
            where = f'mapping["{name}"]'
            entries: tuple[Entry, ...] = ()
            for key, value in _items(where, devices, "device to repository"):
                try:
                    device = Device.parse(key)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{where}: {error}") from None
                chosen = dict(_repositories(f"{where}[{_key(key)}]", value))
                entries = _with_entry(entries, Entry(device, tuple(chosen.items())))
            layers[name] = entries
        return cls(layers)

    def merge(self, newer: KernelMapping) -> KernelMapping:
        """This mapping with the entries of ``newer`` registered after its own."""
        layers = dict(self.layers)
        for name, entries in newer.layers.items():
            merged = layers.get(name, ())
            for entry in entries:
                merged = _with_entry(merged, entry)
            layers[name] = merged
        return KernelMapping(layers)


def _with_entry(entries: tuple[Entry, ...], new: Entry) -> tuple[Entry, ...]:
    return (*(entry for entry in entries if entry.device != new.device), new)


def _repositories(where: str, value: object) -> Iterator[tuple[Mode, Repository]]:
    if not isinstance(value, Mapping):
        expected = "a repository (an object with load()) or a dict from Mode to repository"
        yield Mode.FALLBACK, _repository(where, value, expected)
        return
    for key, repository in value.items():
        try:
            mode = Mode.parse(key)
        except TypeError:
            raise TypeError(f"{where}: expected Mode keys, got {_key(key)}") from None
        if mode not in REGISTRABLE:
            raise ValueError(
                f"{where}: a kernel under mode {mode} would never be used:"
                " name INFERENCE or TRAINING with it, or FALLBACK alone"
            )
        yield (
            mode,
            _repository(f"{where}[{mode}]", repository, "a repository (an object with load())"),
        )


def _repository(where: str, value: Any, expected: str) -> Repository:
    if isinstance(value, type):
        raise TypeError(
            f"{where}: expected {expected}, got the class {value.__qualname__};"
            " pass an instance of it"
        )
    if not callable(getattr(value, "load", None)):
        raise TypeError(f"{where}: expected {expected}, got {type_name(value)}")
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{where}: a repository must be hashable, and {type_name(value)} is not"
        ) from None
    repository: Repository = value
    return repository


def _items(where: str, value: object, kind: str) -> Iterable[tuple[Any, Any]]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}: expected a dict from {kind}, got {type_name(value)}")
    return value.items()


def _key(key: object) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)


# The mapping in force is the top of the context's scopes or, outside any, the process's own.
# ``_LOCK`` is held where ``_process_mapping`` is replaced, so that no registration gets lost.
_LOCK = threading.Lock()
_process_mapping = KernelMapping()
_SCOPES: ContextVar[tuple[tuple[use_kernel_mapping, KernelMapping], ...]] = ContextVar(
    "kernelgraph_mapping_scopes", default=()
)


def current_mapping() -> KernelMapping:
    """The mapping in force in this thread or asyncio task."""
    scopes = _SCOPES.get()
    return scopes[-1][1] if scopes else _process_mapping


def register_kernel_mapping(mapping: MappingLike, inherit_mapping: bool = True) -> None:
    """Register kernels in the innermost scope or, outside any, for the whole process.

    The mapping is checked whole first: after an error everything is as it was. What is kernelized
    or compiled already keeps its kernels, until ``kernelize`` or, for compiled graphs,
    ``torch.compiler.reset()``.

    Args:
        mapping: layer name -> ``Device`` or device type -> a repository, or a dict from
            ``Mode`` to repository.
        inherit_mapping: add to what is registered; False replaces all of it.

    Raises:
        TypeError: a key or a value of ``mapping`` has the wrong type; the message says which.
        ValueError: a device type or a mode in ``mapping`` cannot be registered for.
    """
    global _process_mapping
    newer = KernelMapping.parse(mapping)
    scopes = _SCOPES.get()
    if scopes:
        owner, base = scopes[-1]
        merged = base.merge(newer) if inherit_mapping else newer
        _SCOPES.set((*scopes[:-1], (owner, merged)))
        return
    with _LOCK:
        _process_mapping = _process_mapping.merge(newer) if inherit_mapping else newer


class use_kernel_mapping(contextlib.ContextDecorator):  # noqa: N801
    """Register kernels for the body of a ``with`` statement, or of a decorated function.

    Scopes nest. A scope holds in its own thread or asyncio task, and in tasks created inside it.
    One object may be entered many times, and from several threads at once. What was kernelized or
    compiled inside keeps its kernels outside, and the other way round.

    Args:
        mapping: layer name -> ``Device`` or device type -> a repository, or a dict from
            ``Mode`` to repository. It is read here, once.
        inherit_mapping: add to what is registered where the scope is entered; False replaces
            all of it.

    Raises:
        TypeError: a key or a value of ``mapping`` has the wrong type; the message says which.
        ValueError: a device type or a mode in ``mapping`` cannot be registered for.
        RuntimeError: on leaving, in a context where the scope was not entered.
    """

    def __init__(self, mapping: MappingLike, inherit_mapping: bool = True) -> None:
        self._mapping = KernelMapping.parse(mapping)
        self._inherit = inherit_mapping

    def __enter__(self) -> None:
        mapping = current_mapping().merge(self._mapping) if self._inherit else self._mapping
        _SCOPES.set((*_SCOPES.get(), (self, mapping)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Its own scope and not just the innermost: generators that hold scopes may be closed in
        # another order than they were opened in.
        scopes = _SCOPES.get()
        for i in reversed(range(len(scopes))):
            if scopes[i][0] is self:
                _SCOPES.set(scopes[:i] + scopes[i + 1 :])
                return
        raise RuntimeError("use_kernel_mapping: left in a context where it was not entered")


@dataclass(frozen=True)
class Selection:
    """The kernel that was chosen, with the mode and the device it was registered under."""

    repository: Repository
    mode: Mode
    device: Device


@dataclass(frozen=True)
class Rejection:
    """Why there is no kernel, and what was registered instead."""

    reason: Reason
    detail: str


def select(
    mapping: KernelMapping, layer_name: str, target: Target, mode: Mode
) -> Selection | Rejection:
    """Choose the kernel for a layer: the first of `selections`, which see."""
    found = selections(mapping, layer_name, target, mode)
    return found if isinstance(found, Rejection) else found[0]


def selections(
    mapping: KernelMapping, layer_name: str, target: Target, mode: Mode
) -> tuple[Selection, ...] | Rejection:
    """The kernels that may stand in for a layer, the one to choose first.

    Among the layer's entries for the device the one with the narrowest interval of capabilities
    wins, and of equally narrow ones the last registered. The mode decides within that entry
    alone: no wider entry stands in for it.

    Args:
        mapping: what is registered.
        layer_name: the name that the layer is tagged with.
        target: the device that the layer runs on.
        mode: what the layer is about to be used for.

    Raises:
        TypeError: ``mode`` is not a ``Mode``.
        ValueError: ``mode`` has neither ``INFERENCE`` nor ``TRAINING``.
    """
    modes = tried(mode)
    entries = mapping.layers.get(layer_name)
    if entries is None:
        return Rejection(Reason.NO_LAYER, f"registered layers: {_listing(mapping.layers)}")

    of_type = [entry for entry in entries if entry.device.type == target.type]
    if not of_type:
        return Rejection(Reason.NO_DEVICE, f"registered for: {_listing(e.device for e in entries)}")

    fitting = [entry for entry in of_type if entry.contains(target.capability)]
    if not fitting:
        unknown = "the device's capability is unknown; " if target.capability is None else ""
        devices = _listing(entry.device for entry in of_type)
        return Rejection(Reason.NO_CAPABILITY, f"{unknown}registered for: {devices}")

    # ``min`` keeps the first of equals, which in reverse is the last registered.
    entry = min(reversed(fitting), key=lambda entry: entry.width)
    repositories = dict(entry.repositories)
    found: list[Selection] = []
    for candidate in modes:
        repository = repositories.get(candidate)
        if repository is not None and all(repository != one.repository for one in found):
            found.append(Selection(repository, candidate, entry.device))
    return tuple(found) or Rejection(Reason.NO_MODE, f"registered modes: {_listing(repositories)}")


def _listing(things: Iterable[object], limit: int = 8) -> str:
    """``things`` in words; a mapping may have hundreds of layers, so only the first ones."""
    iterator = iter(things)
    words = [str(thing) for thing in itertools.islice(iterator, limit)]
    more = sum(1 for _ in iterator)
    return (", ".join(words) or "none") + (f" and {more} more" if more else "")
