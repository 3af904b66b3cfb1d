"""The mapping: which kernels are registered for which layer, device and mode.

A ``KernelMapping`` never changes: `KernelMapping.parse` makes one of a caller's dicts, and
`KernelMapping.merge` a new one of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from kernelgraph.selection.devices import Device, type_name
from kernelgraph.selection.modes import REGISTRABLE, Mode

if TYPE_CHECKING:
    from torch import nn


class LayerSource(Protocol):
    """The origin of a kernel: any hashable and comparable object with ``load``.

    The repository classes of this package and of the ``kernels`` package are such objects.
    """

    def load(self) -> type[nn.Module]:
        """Return the hub layer. Nothing is downloaded or imported before this is called."""
        ...


# The keys are Any because a Mapping is invariant in its keys: with ``str | Device`` here a
# caller's ``dict[str, ...]`` would be a type error. ``KernelMapping.parse`` checks them.
MappingLike: TypeAlias = Mapping[str, Mapping[Any, LayerSource | Mapping[Any, LayerSource]]]
"""The argument of the public functions: layer name -> ``Device`` or device type -> a repository, or
a dict from ``Mode`` to one. The ``kernels`` package's objects of these names are taken as well."""


@dataclass(frozen=True)
class Registration:
    """The repositories registered for one layer name and device, one for each mode."""

    device: Device
    repositories: tuple[tuple[Mode, LayerSource], ...]

    def contains(self, capability: int | None) -> bool:
        """Whether the registration is for this capability, which is None where it is unknown."""
        bounds = self.device.properties
        return bounds is None or (capability is not None and capability in bounds)

    @property
    def width(self) -> float:
        """The distance between the bounds of the capability; infinite without bounds."""
        bounds = self.device.properties
        return math.inf if bounds is None else bounds.max_capability - bounds.min_capability


@dataclass(frozen=True)
class KernelMapping:
    """All registered kernels: for each layer name its registrations, the newest last."""

    layers: Mapping[str, tuple[Registration, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __hash__(self) -> int:
        return hash(frozenset(self.layers.items()))

    @classmethod
    def parse(cls, mapping: MappingLike) -> KernelMapping:
        """Check a caller's dicts and copy their contents.

        Two keys of one dict may name one device (``"metal"`` and ``"mps"``) or one mode; they
        count as registered in the dict's order.

        Args:
            mapping: layer name -> ``Device`` or device type -> a repository, which is registered
                under ``Mode.FALLBACK``, or a dict from ``Mode`` to repository.

        Raises:
            TypeError: If a key or a value has the wrong type; the message says which.
            ValueError: If there is no such device type, or no kernel is ever sought under a mode.
        """
        layers = {}
        for name, devices in _items("mapping", mapping, "layer name to devices"):
            if not isinstance(name, str):
                raise TypeError(f"mapping: expected layer names (str) as keys, got {_key(name)}")
            where = f'mapping["{name}"]'
            registrations: tuple[Registration, ...] = ()
            for key, value in _items(where, devices, "device to repository"):
                try:
                    device = Device.parse(key)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{where}: {error}") from None
                chosen = dict(_repositories(f"{where}[{_key(key)}]", value))
                registrations = _with(registrations, Registration(device, tuple(chosen.items())))
            layers[name] = registrations
        return cls(layers)

    def merge(self, newer: KernelMapping) -> KernelMapping:
        """Return this mapping with the registrations of ``newer`` after its own."""
        layers = dict(self.layers)
        for name, registrations in newer.layers.items():
            merged = layers.get(name, ())
            for registration in registrations:
                merged = _with(merged, registration)
            layers[name] = merged
        return KernelMapping(layers)


def _with(registered: tuple[Registration, ...], new: Registration) -> tuple[Registration, ...]:
    return (*(one for one in registered if one.device != new.device), new)


def _repositories(where: str, value: object) -> Iterator[tuple[Mode, LayerSource]]:
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


def _repository(where: str, value: object, expected: str) -> LayerSource:
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
    return cast(LayerSource, value)


def _items(where: str, value: object, content: str) -> Iterable[tuple[object, object]]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}: expected a dict from {content}, got {type_name(value)}")
    return value.items()


def _key(key: object) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)
