"""The one decision that every path shares: which kernel, if any, stands in for a layer."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kernelgraph.layers import Extensible, check_hub_layer
from kernelgraph.report import Reason
from kernelgraph.selection import KernelMapping, Mode, Rejection, Selection, selections

if TYPE_CHECKING:
    from torch import nn

    from kernelgraph.builds import Origin
    from kernelgraph.selection import Target


logger = logging.getLogger("kernelgraph")


@dataclass(frozen=True)
class Kernel:
    """A hub layer that was selected, loaded and checked against the layer it stands in for."""

    layer: type[nn.Module]
    origin: Origin
    selection: Selection

    @property
    def forward(self) -> Callable[..., Any]:
        return self.layer.forward

    def __str__(self) -> str:
        return f"{self.origin.repository}@{self.origin.revision[:8]}: {self.layer.__name__}"


class Gradients(NamedTuple):
    """What is asked of the gradients of kernels."""

    verify: bool = True
    """Whether they are compared with the reference's."""
    wrong: str = "recompute"
    """What is done where they are wrong."""

    @classmethod
    def parse(cls, verify: object, wrong: object) -> Gradients:
        """Check the arguments ``verify_gradients`` and ``wrong_gradient``.

        Raises:
            TypeError: If one is of the wrong type.
            ValueError: If there is no such thing to do.
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
    """A kernel's ``forward`` bound to a layer, in the place of the instance's own.

    A ``functools.partial`` costs a call nothing, and Dynamo traces it.
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
    """The kernel that ``mapping`` has for ``layer`` on ``target`` in ``mode``, or why none.

    Where a repository cannot be loaded, that is an error, or with ``keep_unloadable`` a rejection.

    Raises:
        ValueError: If the kernel was registered for a mode that it says it does not support.
        TypeError: If the hub layer is impure, or its ``forward`` does not fit the layer's.
        Exception: Whatever the repository raises where it cannot be loaded.
    """
    found = _select(layer, target, mode, mapping)
    if isinstance(found, Rejection):
        return found
    return _kernel(layer, found[0], target, mode, keep_unloadable)


def decide_all(
    layer: Extensible, target: Target, mode: Mode, mapping: KernelMapping
) -> tuple[Kernel, ...] | Rejection:
    """As `decide`, with all other kernels behind the chosen one that may be used as well.

    Of those others, what cannot be used is left out, and the log says why.

    Raises:
        ValueError, TypeError, Exception: As `decide` raises.
    """
    found = _select(layer, target, mode, mapping)
    if isinstance(found, Rejection):
        return found
    first = _kernel(layer, found[0], target, mode, False)
    if isinstance(first, Rejection):
        return first
    kernels = [first]
    for selection in found[1:]:
        try:
            kernel = _kernel(layer, selection, target, mode, False)
        except Exception as error:
            logger.info("%s is no candidate for %s: %s", selection, layer.layer_name, error)
            continue
        if isinstance(kernel, Kernel):
            kernels.append(kernel)
    return tuple(kernels)


def _select(
    layer: Extensible, target: Target, mode: Mode, mapping: KernelMapping
) -> tuple[Selection, ...] | Rejection:
    if os.environ.get("DISABLE_KERNEL_MAPPING", "0").lower() in ("1", "true", "yes", "on"):
        return Rejection(Reason.DISABLED, "")
    return selections(mapping, layer.layer_name, target, mode)


def _kernel(
    layer: Extensible, selection: Selection, target: Target, mode: Mode, keep_unloadable: bool
) -> Kernel | Rejection:
    try:
        hub_layer = _load(selection, target)
    except Exception as error:
        if not keep_unloadable:
            raise
        return Rejection(Reason.CANNOT_LOAD, str(error))
    check_hub_layer(hub_layer, layer.reference, selection.repository)
    _check_registered_mode(hub_layer, selection)
    if Mode.TRAINING in mode and not getattr(hub_layer, "has_backward", True):
        return Rejection(Reason.NO_BACKWARD, str(selection.repository))

    from kernelgraph.builds import origin_of

    return Kernel(hub_layer, origin_of(hub_layer), selection)


def decide_again(
    layer: Extensible, selection: Selection, target: Target, mode: Mode
) -> Kernel | Rejection:
    """`decide` for a layer whose repository another process has selected.

    Raises:
        TypeError, ValueError, Exception: As `decide` raises.
    """
    chosen = {selection.mode: selection.repository}
    mapping = KernelMapping.parse({layer.layer_name: {selection.device: chosen}})
    return decide(layer, target, mode, mapping)


def _load(selection: Selection, target: Target) -> type[nn.Module]:
    from kernelgraph.builds import load_foreign
    from kernelgraph.hub import KernelRepository

    repository = selection.repository
    if isinstance(repository, KernelRepository):  # ours know builds for several devices
        return repository.load(target)
    return load_foreign(repository)


def _check_registered_mode(hub_layer: type[nn.Module], selection: Selection) -> None:
    for flag, mode in (("has_backward", Mode.TRAINING), ("can_torch_compile", Mode.TORCH_COMPILE)):
        # Only what the layer says counts: one that says nothing of torch.compile runs as an
        # opaque op in a compiled graph.
        if mode in selection.mode and getattr(hub_layer, flag, None) is False:
            raise ValueError(
                f"{selection.repository} is registered for mode {selection.mode}, but its layer "
                f"{hub_layer.__name__} says {flag} = False: register it for another mode"
            )
