"""What a repository object takes of a kernel: one of its layers, or a function made a layer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kernelgraph.layers import class_of_function

if TYPE_CHECKING:
    from torch import nn

# The classes made of functions. Making one anew for each load would make each a different kernel.
_made: weakref.WeakKeyDictionary[ModuleType, dict[str, type[nn.Module]]]
_made = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def take_layer(kernel: ModuleType, name: str, repository: str) -> type[nn.Module]:
    """The layer ``<kernel>.layers.<name>``.

    Raises:
        ValueError: The kernel defines no layers, or none of that name.
    """
    layers = getattr(kernel, "layers", None)
    if layers is None:
        raise ValueError(f"{repository}: the kernel defines no layers")
    if not hasattr(layers, name):
        there = _names(layers, lambda value: isinstance(value, type))
        raise ValueError(f"{repository}: the kernel has no layer {name!r}; it has: {there}")
    layer: type[nn.Module] = getattr(layers, name)
    return layer


def take_function(kernel: ModuleType, name: str, repository: str) -> type[nn.Module]:
    """The function ``<kernel>.<name>`` as a layer without parameters, one class for each function.

    Raises:
        ValueError: The kernel has no function of that name.
    """
    function = getattr(kernel, name, None)
    if not callable(function):
        there = _names(kernel, lambda value: callable(value) and not isinstance(value, type))
        raise ValueError(f"{repository}: the kernel has no function {name!r}; it has: {there}")
    with _lock:
        made = _made.setdefault(kernel, {})
        if name not in made:
            made[name] = layer_of_function(function, name, kernel.__name__)
        return made[name]


def _names(holder: object, wanted: Callable[[object], bool]) -> str:
    found = [name for name, value in vars(holder).items() if name[0] != "_" and wanted(value)]
    return ", ".join(sorted(found)) or "none"


def layer_of_function(function: Callable[..., Any], name: str, module: str) -> type[nn.Module]:
    """A hub layer called ``name`` in ``module`` that calls ``function``, with its flags."""
    flags = ("can_torch_compile", "has_backward")
    said = {flag: getattr(function, flag) for flag in flags if hasattr(function, flag)}
    return class_of_function(function, name, module, __doc__=function.__doc__, **said)
