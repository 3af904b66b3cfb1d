"""What a repository object takes of a kernel: one of its layers, or a function made a layer."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
            made[name] = _layer_of(function, name, kernel.__name__)
        return made[name]


def _names(holder: object, wanted: Callable[[object], bool]) -> str:
    found = [name for name, value in vars(holder).items() if name[0] != "_" and wanted(value)]
    return ", ".join(sorted(found)) or "none"


def _layer_of(function: Callable[..., Any], name: str, module: str) -> type[nn.Module]:
    from torch import nn

    def forward(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    if (signature := _with_self(function)) is not None:
        forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = function.__doc__
    forward.__module__ = module
    forward.__qualname__ = f"{name}.forward"
    members = {"forward": forward, "__module__": module, "__doc__": function.__doc__}
    for flag in ("can_torch_compile", "has_backward"):
        if hasattr(function, flag):
            members[flag] = getattr(function, flag)
    return type(name, (nn.Module,), members)


def _with_self(function: Callable[..., Any]) -> inspect.Signature | None:
    """The function's signature as a method's; None where it cannot be told."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    parameters = list(signature.parameters.values())
    own = inspect.Parameter(
        "self" if "self" not in signature.parameters else "_self",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    if parameters and parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY:
        own = own.replace(kind=parameters[0].kind)  # nothing of another kind may come before one
    return signature.replace(parameters=[own, *parameters])
