"""Tags: which classes are extensible, and under which layer name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    Condition = Callable[[nn.Module], bool]
    """Says of an instance whether a kernel may replace its ``forward``."""
    Fake = Callable[..., object]
    """A shape function, with the signature of ``forward``."""

NAME = "kernel_layer_name"
"""The class attribute with the layer name."""
CONDITION = "kernel_condition"
"""The class attribute with the condition."""
FAKE = "kernel_fake"
"""The class attribute with the shape function."""
FUNCTIONS = "_kernel_funcs"
"""The attribute with the extensible functions that are attached to a class or an instance."""
FUNCTION = "__kernelgraph_function__"
"""The attribute of a ``forward`` that calls a function, with that function."""

REFERENCE = "__kernelgraph_reference__"
"""The attribute of a wrapper around a ``forward``, with that ``forward``."""


@dataclass(frozen=True)
class Extensible:
    """An extensible class, as `extensible` finds it."""

    owner: type[nn.Module]
    """The class whose ``forward`` is tagged: the class itself, or one that it inherits from."""
    layer_name: str
    """The name under which mappings register kernels for the layer."""
    condition: Condition | None = None
    fake: Fake | None = None

    @property
    def reference(self) -> Callable[..., object]:
        """The layer's own ``forward`` function, as its author wrote it."""
        return reference_of(self.owner)


def reference_of(cls: type[nn.Module]) -> Callable[..., object]:
    """The ``forward`` of ``cls`` without the wrapper that captures its calls in compiled graphs."""
    return original(cls.forward)


def original(function: Callable[..., object]) -> Callable[..., object]:
    """``function`` without the wrapper that captures its calls or names its parameters anew."""
    return getattr(function, REFERENCE, function)


def extensible(cls: type) -> Extensible | None:
    """Find the tag of ``cls`` or of a class that it inherits from; None if it is not extensible.

    A subclass is extensible under the inherited name as long as it inherits ``forward`` too: a
    ``forward`` of its own that is not tagged may compute something else. A class opts out of an
    inherited name with ``kernel_layer_name = None``.
    """
    from torch import nn

    forward = getattr(cls, "forward", None)
    if forward in (None, nn.Module.forward):  # nothing to replace
        return None
    for base in cls.__mro__:
        members = vars(base)
        if NAME in members:
            name, tagged = members[NAME], getattr(base, "forward", None)
            # A mixin without a forward tags the one that its subclasses inherit beside it.
            owner = cls if tagged in (None, nn.Module.forward) else base
            if not isinstance(name, str) or not name or getattr(owner, "forward", None) != forward:
                return None
            condition, fake = _plain(members.get(CONDITION)), _plain(members.get(FAKE))
            return Extensible(owner, name, None if _is_default(condition) else condition, fake)
        if "forward" in members:
            return None
    return None


def _plain(member: Any) -> Any:
    """The function in a ``staticmethod``, or ``member`` itself."""
    return member.__func__ if isinstance(member, staticmethod) else member


_DEFAULT_CONDITION = "replace_kernel_forward_from_hub.<locals>.<lambda>"
"""The condition that the ``kernels`` package gives to a class that is tagged without one."""


def _is_default(condition: object) -> bool:
    """Whether the ``kernels`` package made ``condition``, which accepts every instance.

    It is not called, because a call ties a compiled graph to the instance that was passed.
    """
    return getattr(condition, "__qualname__", "") == _DEFAULT_CONDITION


# --- listeners: what is called with each extensible class -----------------------------------

_listeners: list[Callable[[type], object]] = []


def announce(cls: type) -> None:
    """Call each listener with ``cls``, which was tagged just now."""
    for listener in tuple(_listeners):
        listener(cls)


def on_extensible(listener: Callable[[type], object]) -> None:
    """Call ``listener`` with each extensible class.

    It is called now with those that any package has tagged, and later with each that this package
    tags.
    """
    _listeners.append(listener)
    for cls in tagged_subclasses():
        listener(cls)


def tagged_subclasses() -> Iterator[type]:
    """Yields each class in the process whose own ``forward`` is tagged, by whatever package."""
    from torch import nn

    seen: set[type] = set()
    todo = [nn.Module]
    while todo:
        for cls in todo.pop().__subclasses__():
            if cls not in seen:
                seen.add(cls)
                todo.append(cls)
                if hasattr(cls, NAME) and (layer := extensible(cls)) and layer.owner is cls:
                    yield cls
