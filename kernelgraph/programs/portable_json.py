"""Constants, paths and templates as JSON that means the same where the model's code is missing.

torch's own classes and functions are written by name. Code of anybody else raises `NotPortable`.
Reading runs nothing that the data names: a name outside of torch is refused.
"""

from __future__ import annotations

import base64
import importlib
import math
import types
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch

from kernelgraph.graph.calls import (
    Constant,
    Entries,
    Leaf,
    Parts,
    Path,
    Step,
    Template,
    UnsupportedValue,
)

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A value that `json` can write, or has read."""


class NotPortable(UnsupportedValue):
    """A call depends on code that only the model has."""


# --- parts of JSON, checked ---------------------------------------------------------------------


def as_object(data: Json) -> Mapping[str, Json]:
    """Return ``data``; raise a ValueError if it is no JSON object."""
    if isinstance(data, dict):
        return data
    raise ValueError(f"expected a JSON object, got {data!r}")


def as_array(data: Json) -> Sequence[Json]:
    """Return ``data``; raise a ValueError if it is no JSON array."""
    if isinstance(data, (list, tuple)):
        return data
    raise ValueError(f"expected a JSON array, got {data!r}")


def as_pair(data: Json) -> tuple[Json, Json]:
    """Return ``data`` as a tuple; raise a ValueError if it is no JSON array of two values."""
    pair = as_array(data)
    if len(pair) != 2:
        raise ValueError(f"expected a JSON array of two values, got {data!r}")
    return pair[0], pair[1]


def as_text(data: Json) -> str:
    """Return ``data``; raise a ValueError if it is no string."""
    if isinstance(data, str):
        return data
    raise ValueError(f"expected a string, got {data!r}")


def is_int(data: Json) -> TypeGuard[int]:
    """Whether ``data`` is an int, and not a bool."""
    return type(data) is int


def is_index(data: Json) -> TypeGuard[int]:
    """Whether ``data`` is an int from 0 on, such as the number of an operand."""
    return is_int(data) and data >= 0


def is_key(data: Json) -> TypeGuard[str | int]:
    """Whether ``data`` can be a key of a container: a string or an int."""
    return type(data) in (str, int)


# --- names in torch -----------------------------------------------------------------------------

_ATTRIBUTES = (torch.dtype, torch.layout, torch.memory_format)
"""The types of constants that torch has as attributes, such as ``torch.float32``."""


def torch_name(value: object) -> str:
    """Return ``module:name`` for a function or class that torch has under that name.

    Raises:
        NotPortable: If torch does not have it.
    """
    short_name = getattr(value, "__name__", "")
    qualname = getattr(value, "__qualname__", "") or short_name
    for module in (getattr(value, "__module__", None), "torch", "torch.nn.functional"):
        for name in (qualname, short_name):
            if isinstance(module, str) and name:
                try:
                    if from_torch(f"{module}:{name}") is value:
                        return f"{module}:{name}"
                except ValueError:
                    continue
    raise NotPortable(
        f"{value!r} is neither data nor torch's own, and only the model's code has it"
    )


def from_torch(name: str) -> object:
    """Return the function, class or constant that torch has under a name of `torch_name`.

    Raises:
        ValueError: If torch has none, or what it has there is not its own.
    """
    module, _, path = name.partition(":")
    if not is_torch_module(module):
        raise ValueError(f"{name!r} is no name in torch")
    try:
        found: object = importlib.import_module(module)
        for part in path.split("."):
            found = vars(found)[part] if isinstance(found, type) else getattr(found, part)
    except (ImportError, AttributeError, KeyError) as error:
        raise ValueError(f"this torch has no {module}.{path}") from error
    # Modules of torch have modules of others among their attributes, torch.os for example.
    home = getattr(found, "__module__", None)
    is_code = isinstance(found, (type, types.FunctionType, types.BuiltinFunctionType))
    if not isinstance(found, _ATTRIBUTES) and not (
        is_code and (home is None or is_torch_module(home))
    ):
        raise ValueError(f"{name!r} is neither a function nor a class of torch's")
    return found


def is_torch_module(name: str) -> bool:
    """Whether ``name`` is the name of torch or of a module in it."""
    return name == "torch" or name.startswith("torch.")


# --- constants ----------------------------------------------------------------------------------

_PLAIN = (type(None), bool, int, str)
SEQUENCES: dict[str, type[Any]] = {"tuple": tuple, "list": list, "size": torch.Size}
DICTS: dict[str, type[Any]] = {"dict": dict, "OrderedDict": OrderedDict}
_SETS: dict[str, type[Any]] = {"set": set, "frozenset": frozenset}
CONTAINER_NAMES = {cls: name for name, cls in (SEQUENCES | DICTS | _SETS).items()}
"""The names of the containers that JSON has for the model's containers."""


def constant_to_json(value: Any) -> Json:
    """Return a constant as JSON.

    Raises:
        NotPortable: If it is, or contains, a function, class or enumeration that is not torch's.
    """
    cls = type(value)
    if cls in _PLAIN:
        return value  # type: ignore[no-any-return]
    if cls is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if cls in DICTS.values():
        items = [[constant_to_json(k), constant_to_json(v)] for k, v in value.items()]
        return {CONTAINER_NAMES[cls]: items}
    if cls in CONTAINER_NAMES:
        parts = [constant_to_json(part) for part in value]
        # Sorted, since the order of a set differs between processes.
        return {CONTAINER_NAMES[cls]: sorted(parts, key=repr) if cls in _SETS.values() else parts}
    if cls is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if cls is complex:
        return {"complex": [repr(value.real), repr(value.imag)]}
    if cls is torch.device:
        return {"device": str(value)}
    if cls in _ATTRIBUTES:
        return {"torch": f"torch:{str(value).removeprefix('torch.')}"}
    return {"torch": torch_name(value)}


def constant_from_json(data: Json) -> object:
    """Return the constant from what `constant_to_json` returned.

    Raises:
        ValueError: If it is not such JSON.
    """
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    ((kind, body),) = as_object(data).items()
    if kind == "float":
        return float(as_text(body))
    if kind in DICTS:
        pairs = map(as_pair, as_array(body))
        return DICTS[kind]((constant_from_json(k), constant_from_json(v)) for k, v in pairs)
    if kind in SEQUENCES or kind in _SETS:
        return (SEQUENCES | _SETS)[kind](map(constant_from_json, as_array(body)))
    if kind == "bytes":
        return base64.b64decode(as_text(body))
    if kind == "complex":
        real, imaginary = map(as_text, as_pair(body))
        return complex(float(real), float(imaginary))
    if kind == "device":
        return torch.device(as_text(body))
    if kind == "torch":
        return from_torch(as_text(body))
    raise ValueError(f"{kind!r} is no kind of constant")


# --- paths and templates ------------------------------------------------------------------------


def path_to_json(path: Path) -> Json:
    """Return a path as JSON: attributes as strings, keys in arrays of their own."""
    return [step if isinstance(step, str) else list(step) for step in path]


def path_from_json(data: Json) -> Path:
    """Return the path from what `path_to_json` returned.

    Raises:
        ValueError: If it is not such JSON.
    """
    return tuple(map(_step_from_json, as_array(data)))


def _step_from_json(data: Json) -> Step:
    if isinstance(data, str):
        return data
    if isinstance(data, list) and len(data) == 1 and is_key(data[0]):
        return (data[0],)
    raise ValueError(f"{data!r} is no step of a path")


def template_to_json(template: Template) -> Json:
    """Return a template as JSON.

    Raises:
        NotPortable: If a class or another constant in it is not portable.
    """
    match template:
        case Leaf(index):
            return ["leaf", index]
        case Constant(value):
            return ["const", constant_to_json(value)]
        case Entries(cls, parts) if cls in CONTAINER_NAMES:
            return [CONTAINER_NAMES[cls], [[key, template_to_json(part)] for key, part in parts]]
        case Parts(cls, parts) if cls in CONTAINER_NAMES:
            return [CONTAINER_NAMES[cls], [template_to_json(part) for part in parts]]
        case Entries(cls) | Parts(cls):
            raise NotPortable(f"a {cls.__qualname__} is passed or returned, a class of its own")
    raise AssertionError(template)


def template_from_json(data: Json) -> Template:
    """Return the template from what `template_to_json` returned.

    Raises:
        ValueError: If it is not such JSON.
    """
    head, body = as_pair(data)
    kind = as_text(head)
    if kind == "leaf" and is_int(body):
        return Leaf(body)
    if kind == "const":
        return Constant(constant_from_json(body))
    if kind in DICTS:
        return Entries(DICTS[kind], tuple(map(_entry_from_json, as_array(body))))
    if kind in SEQUENCES:
        return Parts(SEQUENCES[kind], tuple(map(template_from_json, as_array(body))))
    raise ValueError(f"{kind!r} is no kind of template")


def _entry_from_json(data: Json) -> tuple[str | int, Template]:
    key, part = as_pair(data)
    if not is_key(key):
        raise ValueError(f"{key!r} is no key of a container")
    return key, template_from_json(part)
