"""What belongs to the last of some objects, without keeping that object alive."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class OfLast(Generic[T]):
    """A value that is there for as long as it is asked for by the object that it was put for."""

    def __init__(self) -> None:
        self._kept: tuple[Callable[[], object], T] | None = None

    def get(self, owner: object) -> T | None:
        """The value, if the last was put for ``owner``; of None nobody knows what it is."""
        if owner is None or self._kept is None:
            return None
        leads, value = self._kept
        last = leads()
        # Python makes a bound method anew each time it is looked up.
        same = last is owner or (isinstance(owner, types.MethodType) and last == owner)
        return value if same else None

    def put(self, owner: object, value: T) -> T:
        """Have ``value`` be there for ``owner``, and nothing for others."""
        if owner is None:
            self._kept = None
        elif isinstance(owner, types.MethodType):
            self._kept = (weakref.WeakMethod(owner), value)
        else:
            self._kept = (weakref.ref(owner), value)
        return value

    def clear(self) -> None:
        """Let go of the value."""
        self._kept = None
