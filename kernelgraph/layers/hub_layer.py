"""Hub layers: whether a class that a repository loaded can replace a layer's ``forward``.

A hub layer is pure: a class with a ``forward`` that runs on the state of the layer it replaces, and
with no ``__init__``, methods or state of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Generic

from kernelgraph.layers.tags import REFERENCE

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
            its own, or takes another number or other kinds of parameters than ``reference``, or has
            another default.
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
    if other := _other_default(layer.forward, reference):
        raise TypeError(
            f"{repository}: forward of hub layer {layer.__name__} has the default {other}: a "
            "call without it would compute something else"
        )


def _parameter_kinds(forward: Callable[..., object]) -> list[object]:
    return [parameter.kind for parameter in inspect.signature(forward).parameters.values()]


def _other_default(forward: Callable[..., object], reference: Callable[..., object]) -> str:
    """Describe the first default in which two forwards differ; empty if there is none."""
    for ours, theirs in _pairs(forward, reference):
        if _NONE not in (ours.default, theirs.default) and not _same(ours.default, theirs.default):
            return (
                f"{ours.name}={ours.default!r}, and the layer that it would replace "
                f"{theirs.name}={theirs.default!r}"
            )
    return ""


def _same(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))


# --- calls by position --------------------------------------------------------------------------

_NONE = inspect.Parameter.empty
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _pairs(
    forward: Callable[..., object], reference: Callable[..., object]
) -> list[tuple[inspect.Parameter, inspect.Parameter]]:
    """The parameters of a forward with those of a reference, in their order, without ``self``."""
    both = (inspect.signature(f).parameters.values() for f in (forward, reference))
    return list(zip(*both, strict=True))[1:]


@functools.lru_cache(maxsize=1024)
def named_forward(
    forward: Callable[..., object], reference: Callable[..., object]
) -> Callable[..., object]:
    """``forward`` with the names and defaults of the parameters of ``reference``.

    Callers pass arguments by the names that the layer gives them, and leave out those that have a
    default there.

    Args:
        forward: The ``forward`` of a hub layer that `check_hub_layer` has accepted.
        reference: The ``forward`` that it replaces.

    Returns:
        ``forward`` itself where it has them; otherwise a function that calls it.
    """
    pairs = _pairs(forward, reference)
    if all(
        ours.kind not in _BY_NAME
        or (ours.name == theirs.name and (ours.default is not _NONE or theirs.default is _NONE))
        for ours, theirs in pairs
    ):
        return forward
    self, *parameters = inspect.signature(reference).parameters.values()
    plain = [
        p.replace(annotation=_NONE, default=_NONE if p.default is _NONE else _Name(f"d{i}"))
        for i, p in enumerate(parameters)
    ]
    signature = inspect.Signature([self.replace(annotation=_NONE), *plain])
    passed = [_passed(ours, theirs.name) for ours, theirs in pairs]
    defaults = {f"d{i}": p.default for i, p in enumerate(parameters)}
    source = "\n".join(
        [
            f"def make({', '.join(['kernelgraph_forward', *defaults])}):",
            f"    def forward{signature}:",
            f"        return kernelgraph_forward({', '.join([self.name, *passed])})",
            "    return forward",
        ]
    )
    namespace: dict[str, Callable[..., Callable[..., object]]] = {}
    exec(source, {}, namespace)
    made = namespace["make"](forward, **defaults)
    made.__qualname__, made.__module__ = forward.__qualname__, forward.__module__
    # Who asks for the source of the forward is shown the hub layer's own.
    setattr(made, REFERENCE, forward)
    return made


def _passed(parameter: inspect.Parameter, value: str) -> str:
    """An argument for ``parameter``, as a call writes it."""
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return f"*{value}"
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return f"**{value}"
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        return f"{parameter.name}={value}"
    return value


class _Name(str):
    """The name of a variable, which the text of a signature shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
