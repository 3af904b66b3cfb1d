"""Constants: Python values that may be part of an op's identity, and their text.

The text of a constant is the same in every process, and differs between constants.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import sys
import types
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from kernelgraph.fingerprint import code_hash
from kernelgraph.layers import CONDITION, FAKE, NAME, original


@functools.cache
def field_names(cls: type) -> tuple[str, ...] | None:
    """Return the fields of a dataclass whose objects are made from exactly these, else None."""
    # Running a __post_init__ a second time might be wrong. transformers' ModelOutput, a dict too,
    # has one that only copies its fields to its keys.
    if not dataclasses.is_dataclass(cls) or (
        hasattr(cls, "__post_init__") and not issubclass(cls, dict)
    ):
        return None
    fields = dataclasses.fields(cls)
    return tuple(f.name for f in fields) if all(f.init for f in fields) else None


_SIMPLE = (
    type(None),
    bool,
    str,
    bytes,
    complex,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_INT64 = range(-(2**63), 2**63)


def is_number(value: object) -> bool:
    """Whether ``value`` can be an int or float operand."""
    if isinstance(value, (bool, enum.Enum)):
        return False
    return isinstance(value, float) or (isinstance(value, int) and value in _INT64)


def is_named_tuple(cls: type) -> bool:
    """Whether ``cls`` was made by `collections.namedtuple` or `typing.NamedTuple`."""
    return issubclass(cls, tuple) and hasattr(cls, "_make")


def is_constant(value: object) -> bool:
    """Whether ``value`` never changes, and `stable_text` tells it from every other."""
    if isinstance(value, tuple):
        return all(map(_may_lie_inside, value))
    if isinstance(value, types.FunctionType):
        return _is_importable(value) or _has_constant_closure(value)
    if isinstance(value, functools.partial):
        return type(value) is functools.partial and all(map(_may_lie_inside, _inside(value)))
    if isinstance(value, types.BuiltinFunctionType):
        # A method that is bound to an object depends on that object's state.
        return isinstance(value.__self__, (type(None), types.ModuleType, type))
    if isinstance(value, type):
        return _is_importable(value)
    # The text of an object of a subclass, of str for example, would lose its attributes.
    return type(value) in _SIMPLE or isinstance(value, enum.Enum) or type(value) is int


def _may_lie_inside(value: object) -> bool:
    return is_constant(value) or is_number(value)


def _inside(function: functools.partial[Any]) -> list[object]:
    return [function.func, *function.args, *function.keywords.values()]


_MUTABLE = (list, dict, OrderedDict, set, frozenset)


def is_data(value: object) -> bool:
    """Whether ``value`` is a number, a constant, or a container of these, which may be mutable."""
    if type(value) in _MUTABLE or type(value) is tuple:
        return all(map(is_data, parts_of(value)))
    return _may_lie_inside(value)


def parts_of(container: Any) -> list[Any]:
    """Return the parts of a container; for a dict its keys, then its values."""
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def copy_of(value: Any) -> Any:
    """Return a copy of data, in containers of its own."""
    if isinstance(value, dict):
        return type(value)((key, copy_of(part)) for key, part in value.items())
    if type(value) in _MUTABLE or type(value) is tuple:
        return type(value)(map(copy_of, value))
    return value


def same(one: Any, other: Any) -> bool:
    """Whether data is equal and of the same types: 1, 1.0 and True differ."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (set, frozenset)):
        return one == other and {type(v) for v in one} == {type(v) for v in other}
    if isinstance(one, (tuple, list, dict)):
        ours, theirs = parts_of(one), parts_of(other)
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(one, functools.partial):
        return same(*((f.func, f.args, f.keywords) for f in (one, other)))
    return one is other or one == other or (one != one and other != other)


def stable_text(value: Any) -> str:
    """Return text for a constant or data that is the same in every process."""
    if isinstance(value, dict):
        items = (f"{stable_text(key)}: {stable_text(part)}" for key, part in value.items())
        return f"{type(value).__qualname__}({', '.join(items)})"
    if isinstance(value, (set, frozenset)):  # the order of strings differs between processes
        return f"{type(value).__qualname__}({', '.join(sorted(map(stable_text, value)))})"
    if isinstance(value, (tuple, list)):
        name = "" if type(value) is tuple else type(value).__qualname__
        return f"{name}({', '.join(map(stable_text, value))})"
    if isinstance(value, functools.partial):
        keywords = stable_text(value.keywords)
        return f"partial({', '.join(map(stable_text, (value.func, *value.args)))}, {keywords})"
    if isinstance(value, types.FunctionType):
        return f"{_name(value)}#{code_hash(value)}"
    if isinstance(value, (types.BuiltinFunctionType, type)):
        return _name(value)
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    return repr(value)


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _is_importable(value: Any) -> bool:
    """Whether another process finds ``value`` under its name, so that the name identifies it."""
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def _has_constant_closure(function: types.FunctionType) -> bool:
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # not filled yet
        return False
    inside = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return all(v is not function and _may_lie_inside(v) for v in inside)


_class_texts: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


def class_text(cls: type) -> str:
    """Return the name of a class and hashes of its methods.

    The name alone does not identify it: a notebook may define one class many times.
    """
    if cls not in _class_texts:
        _class_texts[cls] = _describe_class(cls)
    return _class_texts[cls]


def _describe_class(cls: type) -> str:
    parts = [_name(cls)]
    for base in cls.__mro__:
        if base in (nn.Module, object):
            break
        if base.__module__.partition(".")[0] == "torch" and _is_importable(base):
            parts.append(_name(base))  # torch's version, which is in every key, stands for its code
            continue
        for name, member in sorted(vars(base).items()):
            if name not in (NAME, CONDITION, FAKE) and (text := _member_text(name, member)):
                parts.append(f"{name}:{text}")
    return " ".join(parts)


def _member_text(name: str, member: Any) -> str:
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    elif isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    if isinstance(member, types.FunctionType):
        # The wrapper that capture puts around a forward is not part of the layer.
        return code_hash(original(member))[:16]
    if name.startswith("__") or not _may_lie_inside(member):
        return ""
    return stable_text(member)
