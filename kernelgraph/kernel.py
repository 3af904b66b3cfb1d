"""The one decision that every path shares: which kernel, if any, replaces a layer's forward.

`decide` is three steps: select what the mapping has for the layer (`selection`), load it (`hub`,
or `builds` for the repositories of other packages), and check that it fits (`layers`).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from kernelgraph.layers import Extensible, check_hub_layer, named_forward
from kernelgraph.report import Reason
from kernelgraph.selection import KernelMapping, Mode, Rejection, Selection, selections

if TYPE_CHECKING:
    from torch import nn

    from kernelgraph.builds import Origin
    from kernelgraph.selection import Target


logger = logging.getLogger("kernelgraph")


@dataclass(frozen=True)
class Kernel:
    """A hub layer that was selected, loaded and checked against the layer that it replaces."""

    layer: type[nn.Module]
    """The hub layer: a class whose ``forward`` is the kernel."""
    origin: Origin
    selection: Selection
    named: Callable[..., object] | None = field(default=None, compare=False)
    """The kernel under the names of the layer's parameters, where it gives them others."""

    @property
    def forward(self) -> Callable[..., object]:
        """The function that runs on an instance of the layer that is replaced."""
        return self.named or self.layer.forward

    def __str__(self) -> str:
        return f"{self.origin.repository}@{self.origin.revision[:8]}: {self.layer.__name__}"


class Gradients(NamedTuple):
    """The arguments about gradients that ``kernelize`` and the other paths take."""

    verify: bool = True
    """Whether they are compared with the reference's."""
    wrong: str = "recompute"
    """The replacement for a wrong one: ``"recompute"``, the reference's gradient after the kernel's
    forward; or ``"reference"``, the reference as a whole."""

    @classmethod
    def parse(cls, verify: object, wrong: object) -> Gradients:
        """Check the arguments ``verify_gradients`` and ``wrong_gradient``.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If ``wrong`` is a string with no meaning.
        """
        if not isinstance(verify, bool):
            raise TypeError(f"verify_gradients is True or False, not {verify!r}")
        choices = 'wrong_gradient is "recompute" or "reference"'
        if not isinstance(wrong, str):
            raise TypeError(f"{choices}, not {wrong!r}")
        if wrong not in ("recompute", "reference"):
            raise ValueError(f"{choices}, not {wrong!r}")
        return cls(verify, wrong)


class BoundForward(functools.partial[Any]):
    """A kernel's ``forward`` bound to a layer, set on the instance in place of its own.

    It is a ``functools.partial`` because that costs a call nothing, and Dynamo traces it.
    """

    mode: Mode
    """The mode that the layer was kernelized for."""
    gradients: Gradients


def decide(
    layer: Extensible,
    target: Target,
    mode: Mode,
    mapping: KernelMapping,
    *,
    keep_unloadable: bool = False,
) -> Kernel | Rejection:
    """Decide which kernel of ``mapping`` replaces ``layer`` on ``target`` in ``mode``.

    Args:
        layer: The layer.
        target: The device that it runs on.
        mode: What it is about to be used for.
        mapping: The kernels that are registered.
        keep_unloadable: Whether a repository that cannot be loaded is a rejection, not an error.

    Returns:
        The kernel, or why the layer keeps its reference.

    Raises:
        ValueError: If the kernel was registered for a mode that it says it does not support.
        TypeError: If the hub layer is impure, or its ``forward`` does not fit the layer's.
        Exception: Any error that the repository raises where it cannot be loaded.
    """
    selected = _select(layer, target, mode, mapping)
    if isinstance(selected, Rejection):
        return selected
    best = selected[0]
    try:
        hub_layer = _load(best, target)
    except Exception as error:
        if not keep_unloadable:
            raise
        return Rejection(Reason.CANNOT_LOAD, str(error))
    return _check(layer, hub_layer, best, mode)


def decide_all(
    layer: Extensible, target: Target, mode: Mode, mapping: KernelMapping
) -> tuple[Kernel, ...] | Rejection:
    """Decide as `decide` does, and append the other kernels that may be used instead.

    Another kernel that cannot be loaded or does not fit is left out, and the log says why.

    Returns:
        The kernels, the one that `decide` chooses first; or why the layer keeps its reference.

    Raises:
        ValueError, TypeError, Exception: As `decide` raises.
    """
    selected = _select(layer, target, mode, mapping)
    if isinstance(selected, Rejection):
        return selected
    best, *others = selected
    first = _check(layer, _load(best, target), best, mode)
    if isinstance(first, Rejection):
        return first
    kernels = [first]
    for selection in others:
        try:
            kernel = _check(layer, _load(selection, target), selection, mode)
        except Exception as error:
            logger.info("%s is no candidate for %s: %s", selection, layer.layer_name, error)
            continue
        if isinstance(kernel, Kernel):
            kernels.append(kernel)
    return tuple(kernels)


def decide_again(
    layer: Extensible, selection: Selection, target: Target, mode: Mode
) -> Kernel | Rejection:
    """Decide for a layer whose repository another process has already selected.

    Raises:
        TypeError, ValueError, Exception: As `decide` raises.
    """
    chosen = {selection.mode: selection.repository}
    mapping = KernelMapping.parse({layer.layer_name: {selection.device: chosen}})
    return decide(layer, target, mode, mapping)


def _select(
    layer: Extensible, target: Target, mode: Mode, mapping: KernelMapping
) -> tuple[Selection, ...] | Rejection:
    """The kernels registered for the layer, the best first; or why there are none."""
    if os.environ.get("DISABLE_KERNEL_MAPPING", "0").lower() in ("1", "true", "yes", "on"):
        return Rejection(Reason.DISABLED, "")
    return selections(mapping, layer.layer_name, target, mode)


def _load(selection: Selection, target: Target) -> type[nn.Module]:
    """Load the hub layer that was selected."""
    from kernelgraph.builds import load_foreign
    from kernelgraph.hub import KernelRepository

    repository = selection.repository
    if isinstance(repository, KernelRepository):  # it has builds for several devices
        return repository.load(target)
    return load_foreign(repository)


def _check(
    layer: Extensible, hub_layer: type[nn.Module], selection: Selection, mode: Mode
) -> Kernel | Rejection:
    """Check that a hub layer may replace ``layer`` in ``mode``."""
    check_hub_layer(hub_layer, layer.reference, selection.repository)
    _check_registered_mode(hub_layer, selection)
    if Mode.TRAINING in mode and not getattr(hub_layer, "has_backward", True):
        return Rejection(Reason.NO_BACKWARD, str(selection.repository))

    from kernelgraph.builds import origin_of

    forward = named_forward(hub_layer.forward, layer.reference)
    named = None if forward is hub_layer.forward else forward
    return Kernel(hub_layer, origin_of(hub_layer), selection, named)


def _check_registered_mode(hub_layer: type[nn.Module], selection: Selection) -> None:
    for flag, mode in (("has_backward", Mode.TRAINING), ("can_torch_compile", Mode.TORCH_COMPILE)):
        # Only an explicit False counts: a layer without can_torch_compile runs as an opaque op in
        # a compiled graph.
        if mode in selection.mode and getattr(hub_layer, flag, None) is False:
            raise ValueError(
                f"{selection.repository} is registered for mode {selection.mode}, but its layer "
                f"{hub_layer.__name__} says {flag} = False: register it for another mode"
            )
