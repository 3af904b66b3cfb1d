"""Matching: which of the registered kernels may serve a layer on a device in a mode."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from kernelgraph.report import Reason
from kernelgraph.selection.devices import Device, Target
from kernelgraph.selection.mapping import KernelMapping, LayerSource
from kernelgraph.selection.modes import Mode, serving_modes


@dataclass(frozen=True)
class Selection:
    """A kernel that may serve a layer, with the mode and the device it is registered for."""

    repository: LayerSource
    mode: Mode
    device: Device


@dataclass(frozen=True)
class Rejection:
    """Why no kernel serves a layer, and what is registered instead."""

    reason: Reason
    detail: str


def selections(
    mapping: KernelMapping, layer_name: str, target: Target, mode: Mode
) -> tuple[Selection, ...] | Rejection:
    """Choose the kernels that may serve a layer.

    Among the layer's registrations for the device the one with the narrowest interval of
    capabilities wins, and of equally narrow ones the newest. The mode decides within that
    registration alone: no wider registration replaces it.

    Args:
        mapping: All that is registered.
        layer_name: The name that the layer is tagged with.
        target: The device that the layer runs on.
        mode: What the layer is about to be used for.

    Returns:
        The kernels, the best first; or why there are none.

    Raises:
        TypeError: If ``mode`` is not a ``Mode``.
        ValueError: If ``mode`` has neither ``INFERENCE`` nor ``TRAINING``.
    """
    modes = serving_modes(mode)
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
