"""Hashes of Python functions by what they compute: their code, defaults and closures."""

from __future__ import annotations

import hashlib
import weakref
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def digest(*parts: str) -> str:
    """Eight hex digits of ``parts``."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


_revisions: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()


def code_hash(forward: object) -> str:
    """A hash of what a function computes, as far as its code, defaults and closure tell, in hex."""
    # Kept, because a closure may change: a function's revision is that at its first use.
    if isinstance(forward, FunctionType) and forward in _revisions:
        return _revisions[forward]
    revision = hashlib.sha256(_fingerprint(forward, set()).encode()).hexdigest()
    if isinstance(forward, FunctionType):
        _revisions[forward] = revision
    return revision


def _fingerprint(value: object, seen: set[int]) -> str:
    """A text that differs where ``value`` computes something else, and holds no addresses."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return ascii(value)
    if id(value) in seen:
        return "..."
    seen = seen | {id(value)}
    if isinstance(value, (tuple, frozenset)):
        parts = [_fingerprint(part, seen) for part in value]
        # The order of a set of strings is another one in each process.
        return f"({','.join(parts if isinstance(value, tuple) else sorted(parts))})"
    if isinstance(value, slice):
        return f"slice{_fingerprint((value.start, value.stop, value.step), seen)}"
    if isinstance(value, CodeType):
        shape = (value.co_flags, value.co_argcount, value.co_kwonlyargcount, value.co_varnames)
        handlers = getattr(value, "co_exceptiontable", b"")  # part of the bytecode before 3.11
        inner = (value.co_code, handlers, shape, value.co_names, value.co_consts)
        return f"code{_fingerprint(inner, seen)}"
    if isinstance(value, FunctionType):
        cells = tuple(_cell(cell) for cell in value.__closure__ or ())
        keywords = tuple(sorted((value.__kwdefaults__ or {}).items()))
        return (
            f"function{_fingerprint((value.__code__, value.__defaults__, keywords, cells), seen)}"
        )
    kind = value if isinstance(value, type) else type(value)
    if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device", "layout"):
        return str(value)
    if kind is type(value) and isinstance(name := getattr(value, "__name__", None), str):
        return f"{getattr(value, '__module__', None)}.{name}"  # built in, or an op of torch
    return f"{kind.__module__}.{kind.__qualname__}"


def _cell(cell: object) -> object:
    try:
        return getattr(cell, "cell_contents", None)
    except ValueError:  # not filled yet
        return None
