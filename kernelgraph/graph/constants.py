"""The Python values that a custom op's identity may rest on, as text that names them for good."""

from __future__ import annotations

import enum
import functools
import sys
import types
import weakref
from typing import Any

import torch
from torch import nn

from kernelgraph.hub.loading import code_hash
from kernelgraph.layers import CONDITION, FAKE, NAME

_SIMPLE = (
    type(None),
    bool,
    str,
    bytes,
    complex,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_INT64 = range(-(2**63), 2**63)


def is_number(value: Any) -> bool:
    """Whether ``value`` can be an int or float operand."""
    if isinstance(value, (bool, enum.Enum)):
        return False
    return isinstance(value, float) or (isinstance(value, int) and value in _INT64)


def is_constant(value: Any) -> bool:
    """Whether ``value`` never changes, and `stable_text` tells it from every other."""
    if isinstance(value, tuple):
        return all(is_constant(v) or is_number(v) for v in value)
    if type(value) is functools.partial:
        return is_constant(_parts(value))
    if isinstance(value, types.FunctionType):
        return _is_importable(value) or _has_constant_closure(value)
    if isinstance(value, types.BuiltinFunctionType):
        # One that is bound to an object would be that object's state.
        return isinstance(value.__self__, (type(None), types.ModuleType, type))
    if isinstance(value, type):
        return _is_importable(value)
    return isinstance(value, _SIMPLE) or (type(value) is int)


def stable_text(value: Any) -> str:
    """A constant as text that is the same in every process."""
    if isinstance(value, tuple):
        name = "" if type(value) is tuple else type(value).__qualname__
        return f"{name}({', '.join(map(stable_text, value))})"
    if type(value) is functools.partial:
        return f"partial{stable_text(_parts(value))}"
    if isinstance(value, types.FunctionType):
        return f"{_name(value)}#{code_hash(value)}"
    if isinstance(value, (types.BuiltinFunctionType, type)):
        return _name(value)
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}({value.value!r})"
    return repr(value)


def _parts(partial: functools.partial[Any]) -> tuple[Any, ...]:
    return (partial.func, partial.args, tuple(sorted(partial.keywords.items())))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _is_importable(value: Any) -> bool:
    """Whether another process finds ``value`` under its name, so that the name stands for it."""
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
    return all(v is not function and (is_constant(v) or is_number(v)) for v in inside)


_class_texts: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


def class_text(cls: type) -> str:
    """The name of a module class, and a digest of what its methods compute.

    A name alone is not enough: a notebook defines one class many times over.
    """
    if cls not in _class_texts:
        _class_texts[cls] = _describe_class(cls)
    return _class_texts[cls]


def _describe_class(cls: type) -> str:
    parts = [_name(cls)]
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if base.__module__.partition(".")[0] == "torch" and _is_importable(base):
            parts.append(_name(base))  # its code goes with torch's version
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
        # What capture wraps around a forward is not the layer's own.
        return code_hash(getattr(member, "__kernelgraph_reference__", member))[:16]
    if name.startswith("__") or not (is_constant(member) or is_number(member)):
        return ""
    return stable_text(member)
