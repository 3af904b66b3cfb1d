"""Hashes of Python functions, by what they compute: their code, defaults and closures.

Two hashes are made here:

- `code_hash` is the revision of a function that is in no kernel repository. `builds` uses it as
  the revision of a hub layer of such a class, `keys` as a part of the keys of kernels and layers,
  and `graph` for the names of ops and for functions that are constants in a call.
- `digest` shortens texts to eight hex digits: `graph.ops` and `programs` end the names of ops
  with it.
"""

from __future__ import annotations

import hashlib
import weakref
from types import CodeType, FunctionType


def digest(*parts: str) -> str:
    """Eight hex digits that identify ``parts``."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


_revisions: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()


def code_hash(forward: object) -> str:
    """A hex hash of what a function computes, as far as code, defaults and closure show it."""
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
        # A set of strings has another order in each process.
        return f"({','.join(parts if isinstance(value, tuple) else sorted(parts))})"
    if isinstance(value, slice):
        return f"slice{_fingerprint((value.start, value.stop, value.step), seen)}"
    if isinstance(value, CodeType):
        shape = (value.co_flags, value.co_argcount, value.co_kwonlyargcount, value.co_varnames)
        handlers = getattr(value, "co_exceptiontable", b"")  # part of the bytecode before 3.11
        inner = (value.co_code, handlers, shape, value.co_names, value.co_consts)
        return f"code{_fingerprint(inner, seen)}"
    if isinstance(value, FunctionType):
        cells = tuple(_content(cell) for cell in value.__closure__ or ())
        keywords = tuple(sorted((value.__kwdefaults__ or {}).items()))
        return (
            f"function{_fingerprint((value.__code__, value.__defaults__, keywords, cells), seen)}"
        )
    cls = value if isinstance(value, type) else type(value)
    if cls.__module__ == "torch" and cls.__name__ in ("dtype", "device", "layout"):
        return str(value)
    if cls is type(value) and isinstance(name := getattr(value, "__name__", None), str):
        return f"{getattr(value, '__module__', None)}.{name}"  # a builtin, or an op of torch
    return f"{cls.__module__}.{cls.__qualname__}"


def _content(cell: object) -> object:
    """The content of a closure's cell; None of a cell that is not filled yet."""
    try:
        return getattr(cell, "cell_contents", None)
    except ValueError:
        return None
