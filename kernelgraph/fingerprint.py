"""Hashes of Python functions, by what they compute: code, defaults, closures and what they call.

Two hashes are made here:

- `code_hash` is the revision of a function that is in no kernel repository. `builds` uses it as
  the revision of a hub layer of such a class, `keys` as a part of the keys of kernels and layers,
  and `graph` for the names of ops and for functions that are constants in a call.
- `digest` shortens texts to eight hex digits: `graph.ops` and `programs` end the names of ops
  with it.

A value that no hash describes counts as itself: its hash is this process's own, so that nothing
that another process has kept is found under it.
"""

from __future__ import annotations

import ctypes
import dis
import enum
import functools
import hashlib
import itertools
import sys
import sysconfig
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any


def digest(*parts: str) -> str:
    """Eight hex digits that identify ``parts``."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


_revisions: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()


def code_hash(forward: object) -> str:
    """A hex hash of what a callable computes, as far as its code and all that it refers to show.

    Functions and classes of its own package are followed, those of others count by their names.
    """
    # Kept, because a closure may change: a function's revision is that at its first use.
    if isinstance(forward, FunctionType) and forward in _revisions:
        return _revisions[forward]
    home = _package(getattr(forward, "__module__", None) or type(forward).__module__)
    revision = hashlib.sha256(_Fingerprint(home).text(forward).encode()).hexdigest()
    if isinstance(forward, FunctionType):
        _revisions[forward] = revision
    return revision


def _package(module: str) -> str:
    return module.partition(".")[0]


_MOST_BYTES = 2**14
"""The size of the memory of a tensor up to which it is hashed."""
_PLAIN = (type(None), type(Ellipsis), bool, int, float, complex, str, bytes)
_ORDERED = (tuple, list)
_UNORDERED = (set, frozenset)
_WRITTEN = frozenset({"__module__", "__dict__", "__weakref__", "__doc__", "__firstlineno__"})
"""Members of classes that say nothing of what they compute."""


class _Fingerprint:
    """Makes a text that differs where a value computes something else, and holds no addresses.

    Args:
        home: The top-level package whose functions and classes are followed.
    """

    def __init__(self, home: str) -> None:
        self._home = home
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []
        """The values in ``_seen``, whose addresses are not used again while they are here."""

    def text(self, value: Any) -> str:
        """Return the text of a value."""
        if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
            return f"{type(value).__name__} {value!a}"
        if id(value) in self._seen:
            return f"again {self._seen[id(value)]}"
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        return self._container(value) or self._code(value) or self._named(value) or self._own(value)

    def _all(self, *values: object) -> str:
        return f"({', '.join(map(self.text, values))})"

    def _container(self, value: Any) -> str:
        cls = type(value)
        name = f"{cls.__module__}.{cls.__qualname__}"
        if isinstance(value, enum.Enum):
            return f"{name}.{value.name} {self.text(value.value)}"
        if isinstance(value, _ORDERED):
            return f"{name} {self._all(*value)}"
        if isinstance(value, _UNORDERED):  # strings have another order in each process
            return f"{name} {sorted(map(_Fingerprint(self._home).text, value))}"
        if isinstance(value, (dict, MappingProxyType)):
            return f"{name} {self._all(*itertools.chain(*value.items()))}"
        if isinstance(value, slice):
            return f"slice {self._all(value.start, value.stop, value.step)}"
        return ""

    def _code(self, value: Any) -> str:
        if isinstance(value, CodeType):
            shape = (value.co_flags, value.co_argcount, value.co_kwonlyargcount, value.co_varnames)
            handlers = getattr(value, "co_exceptiontable", b"")  # part of the bytecode before 3.11
            names = (value.co_names, value.co_freevars)
            return f"code {self._all(value.co_code, handlers, *shape, *names, *value.co_consts)}"
        if isinstance(value, FunctionType):
            cells = [_content(cell) for cell in value.__closure__ or ()]
            keywords = sorted((value.__kwdefaults__ or {}).items())
            named = [_global(value.__globals__, name) for name in _globals_of(value.__code__)]
            if _package(value.__module__ or "") == "torch":  # its version stands for its code
                data = [cell for cell in cells if _is_data(cell)]
                return f"{value.__module__}.{value.__qualname__} {self._all(*data)}"
            own = self._all(value.__code__, value.__defaults__, keywords, cells, named)
            return f"function {own}" if self._follows(value) else ""
        if isinstance(value, functools.partial):
            return f"partial {self._all(value.func, value.args, value.keywords)}"
        if isinstance(value, MethodType):
            return f"method {self._all(value.__func__, value.__self__)}"
        if isinstance(value, (staticmethod, classmethod, property, functools.cached_property)):
            inside = [getattr(value, name, None) for name in ("__func__", "fget", "func")]
            return f"{type(value).__name__} {self._all(*inside)}"
        return ""

    def _follows(self, value: Any) -> bool:
        module = getattr(value, "__module__", None) or ""
        return _package(module) in (self._home, "__main__", "") or "<locals>" in value.__qualname__

    def _named(self, value: Any) -> str:
        """Return the text of a value that its name stands for."""
        if value is _MISSING:
            return "missing"
        if isinstance(value, ModuleType):
            return f"module {value.__name__} {_file_hash(value)}"
        if isinstance(value, type):
            return self._class(value)
        if _package(type(value).__module__) == "torch" and type(value).__name__ in _BY_TEXT:
            return f"{type(value).__name__} {value}"
        if isinstance(value, (FunctionType, BuiltinFunctionType)):
            return f"{value.__module__}.{value.__qualname__}"
        return ""

    def _class(self, value: type) -> str:
        name = f"class {value.__module__}.{value.__qualname__}"
        if _is_importable(value) and _package(value.__module__) != "__main__":
            return f"{name} {_file_hash(sys.modules[value.__module__])}"
        members = sorted((k, v) for k, v in vars(value).items() if k not in _WRITTEN)
        return f"{name} {self._all(*value.__bases__, *itertools.chain(*members))}"

    def _own(self, value: Any) -> str:
        """Return the text of an object by what it consists of."""
        cls = type(value)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return self._tensor(value)
        found = getattr(value, "__dict__", None)
        if isinstance(found, dict) and all(map(_is_plain, cls.__mro__)):
            return f"object {self._all(cls, found)}"
        return _identity(value)

    def _tensor(self, value: Any) -> str:
        exact = value.device.type == "cpu" and type(value).__name__ == "Tensor"
        if not exact or str(value.layout) != "torch.strided" or value.is_conj() or value.is_neg():
            return _identity(value)
        storage = value.untyped_storage()
        if storage.nbytes() > _MOST_BYTES:
            return _identity(value)
        place = tuple(value.shape), value.stride(), value.storage_offset()
        # Not by an op: this may run while fakes take the place of tensors.
        memory = ctypes.string_at(storage.data_ptr(), storage.nbytes()).hex()
        return f"tensor {value.dtype} {place} {memory}"


def _global(names: dict[str, Any], name: str) -> object:
    """The value of a global that a function reads.

    Code and data count; of other objects, loggers and registries among them, the name.
    """
    value = names.get(name, _MISSING)
    if isinstance(value, (FunctionType, functools.partial, MethodType, type, ModuleType)):
        return value
    return value if value is _MISSING or _is_data(value) else f"{names.get('__name__')}.{name}"


def _is_data(value: Any) -> bool:
    if isinstance(value, dict):
        return _is_data([*value, *value.values()])
    if isinstance(value, (*_ORDERED, *_UNORDERED)):
        return all(map(_is_data, value))
    return isinstance(value, (*_PLAIN, enum.Enum))


_BY_TEXT = frozenset(
    {"dtype", "device", "layout", "memory_format", "Size", "OpOverload", "OpOverloadPacket"}
)
"""The classes of torch whose objects are identified by their text."""
_MISSING = object()
"""In place of a global that is not there."""


def _is_plain(cls: type) -> bool:
    """Whether objects of a class have all their state in their ``__dict__``, as far as it goes."""
    if cls is object:
        return True
    return not (vars(cls).get("__slots__") or {"__reduce__", "__reduce_ex__"} & vars(cls).keys())


def _is_importable(value: Any) -> bool:
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def _content(cell: object) -> object:
    """The content of a closure's cell; `_MISSING` for a cell that is not filled yet."""
    try:
        return getattr(cell, "cell_contents", _MISSING)
    except ValueError:
        return _MISSING


@functools.lru_cache(maxsize=4096)
def _globals_of(code: CodeType) -> tuple[str, ...]:
    """The names of the globals that a code reads, those of functions inside of it included."""
    return tuple(sorted(set(_global_names(code))))


def _global_names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


_INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


@functools.lru_cache(maxsize=4096)
def _file_hash(module: ModuleType) -> str:
    """A hash of the file of a module; empty for one that is installed, or has no file."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or file.startswith(_INSTALLED):
        return ""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return ""


# --- values that no hash describes ----------------------------------------------------------------

_PROCESS = uuid.uuid4().hex
_count = itertools.count()
_numbers: dict[int, int] = {}
"""The numbers of values that are alive, by their addresses."""
_immortal: list[object] = []
"""Values that do not say when they are freed."""


def _identity(value: object) -> str:
    """Return a text that is this value's own, in this process alone."""
    if id(value) not in _numbers:
        _numbers[id(value)] = next(_count)
        try:
            weakref.finalize(value, _numbers.pop, id(value), None)
        except TypeError:
            _immortal.append(value)
    return f"{type(value).__qualname__} {_numbers[id(value)]} of process {_PROCESS}"
