"""Hub layers: whether a class that a repository loaded can replace a layer's ``forward``.

A hub layer is pure: a class with a ``forward`` that runs on the state of the layer it replaces, and
with no ``__init__``, methods or state of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Generic

_MEMBERS = frozenset({"forward", "has_backward", "can_torch_compile"})
# The members that Python itself writes into classes, in any of its versions.
_PYTHON_MEMBERS = frozenset(
    {
        "__module__",
        "__qualname__",
        "__doc__",
        "__dict__",
        "__weakref__",
        "__annotations__",
        "__annotations_cache__",
        "__annotate__",
        "__annotate_func__",
        "__conditional_annotations__",
        "__firstlineno__",
        "__static_attributes__",
        "__parameters__",
        "__type_params__",
        "__orig_bases__",
    }
)


def check_hub_layer(layer: object, reference: Callable[..., object], repository: object) -> None:
    """Refuse a hub layer that is not pure, or whose ``forward`` cannot replace ``reference``.

    Args:
        layer: The class that a repository loaded.
        reference: The ``forward`` function to replace; ``self`` is its first parameter.
        repository: The repository, for the error message.

    Raises:
        TypeError: If ``layer`` is not an ``nn.Module`` class, has an ``__init__`` or members of
            its own, or takes another number or other kinds of parameters than ``reference``.
    """
    from torch import nn

    if not (inspect.isclass(layer) and issubclass(layer, nn.Module)):
        raise TypeError(f"{repository}: a hub layer is a subclass of nn.Module, not {layer!r}")
    for base in layer.__mro__:
        if base in (nn.Module, Generic, object):
            continue
        if "__init__" in vars(base):
            raise TypeError(
                f"{repository}: hub layer {layer.__name__} has an __init__; it must be pure, "
                "since it runs on the state of the layer that it replaces"
            )
        if extra := sorted(vars(base).keys() - _MEMBERS - _PYTHON_MEMBERS):
            raise TypeError(
                f"{repository}: hub layer {layer.__name__} has members other than forward, "
                f"has_backward and can_torch_compile: {', '.join(extra)}"
            )
    if _parameter_kinds(layer.forward) != _parameter_kinds(reference):
        raise TypeError(
            f"{repository}: forward of hub layer {layer.__name__} takes "
            f"{inspect.signature(layer.forward)}, and the layer that it would replace takes "
            f"{inspect.signature(reference)}: the parameters differ in number or kind"
        )


def _parameter_kinds(forward: Callable[..., object]) -> list[object]:
    return [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
