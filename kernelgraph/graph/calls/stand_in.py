"""The object that a kernel's forward receives as ``self`` inside of an op."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from typing import Any, NamedTuple

from torch import nn

from kernelgraph.graph.calls.constants import copy_of, is_named_tuple, parts_of
from kernelgraph.graph.calls.state import Container, State, blank, contents_of
from kernelgraph.graph.calls.trees import Path


class StandIn(NamedTuple):
    """An object with the classes and constants of a layer, and places for its tensors."""

    module: object
    """The object to pass as ``self``."""
    objects: tuple[object, ...]
    """That object, and all modules and objects that it refers to."""
    slots: list[tuple[Any, object]]
    """For each operand of the state, the container and the key to store its value under."""

    def contents(self) -> dict[tuple[int, str], object]:
        """Return the identity of each attribute, to find those that a call has set."""
        return {
            (number, name): _identity(value)
            for number, item in enumerate(self.objects)
            for name, value in contents_of(item).items()
        }

    def references(self) -> list[int]:
        """Return how often each object is referred to, strongly or weakly."""
        return [sys.getrefcount(item) + weakref.getweakrefcount(item) for item in self.objects]

    def is_kept(self, before: list[int]) -> bool:
        """Whether a call has left references to one of the objects.

        Args:
            before: The `references` before the call.
        """
        if self.references() == before:
            return False
        gc.collect()  # a cycle that is garbage
        return any(now > then for now, then in zip(self.references(), before, strict=True))


def _identity(value: object) -> object:
    if isinstance(value, (tuple, list, set, dict)):
        return id(value), *map(_identity, parts_of(value))
    return id(value)


class _Tuple:
    """Builds a tuple from parts that are set one by one, and stores it in its container."""

    def __init__(self, layout: Container, container: Any, key: Any) -> None:
        self._make = layout.type._make if is_named_tuple(layout.type) else layout.type
        self._parts: list[Any] = [None] * len(layout.keys)
        self._container, self._key = container, key

    def __setitem__(self, index: int, value: Any) -> None:
        self._parts[index] = value
        self._container[self._key] = self._make(self._parts)


def new_stand_in(state: State) -> StandIn:
    """Return a new object that stands in for a layer with this state."""
    objects: dict[Path, Any] = {}
    homes = dict(state.registered)

    def slot(path: Path, value: Any = None) -> tuple[Any, Any]:
        owner, step = objects[path[:-1]], path[-1]
        if not isinstance(step, str):
            return owner, step[0]
        if isinstance(value, nn.Module) and isinstance(owner, nn.Module):
            return owner._modules, step
        return vars(owner)[homes[path]] if path in homes else vars(owner), step

    for path, kind in state.nodes:
        node: Any
        if isinstance(kind, Container):
            container, key = slot(path)
            if issubclass(kind.type, tuple):
                node = _Tuple(kind, container, key)  # stores itself once its parts are set
            else:
                node = (
                    [None] * len(kind.keys) if kind.type is list else kind.type.fromkeys(kind.keys)
                )
                container[key] = node
        else:
            node = blank(kind or types.SimpleNamespace)
            if isinstance(node, nn.Module):
                nn.Module.__init__(node)
            if path:
                container, key = slot(path, node)
                container[key] = node
        objects[path] = node
    for path, home in state.registered:  # parameters() iterates in this order
        vars(objects[path[:-1]])[home][path[-1]] = None
    for path, value in state.constants:
        container, key = slot(path)
        container[key] = copy_of(value)
    attributed = tuple(
        objects[path] for path, kind in state.nodes if not isinstance(kind, Container)
    )
    return StandIn(objects[()], attributed, [slot(path) for path in state.operands])
