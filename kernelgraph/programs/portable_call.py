"""A form of call as plain data, which means the same where the model's code is not.

What an op runs its kernel on is an object that stands in for the layer (`kernelgraph.graph.calls.stand_in`).
A kernel is pure: it wants the attributes of the layer, and not its class. So a class of the
model's becomes one that is made for the purpose, on the nearest base that torch has; torch's own
classes and functions stay what they are, under their names. Everything else that a form holds is
tensors' places, numbers and constants, which JSON can write. Nothing in the data is run.
"""

from __future__ import annotations

import base64
import functools
import importlib
import inspect
import math
import types
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from kernelgraph.graph.calls import (
    CALL,
    Call,
    Constant,
    Container,
    Entries,
    Leaf,
    Node,
    Parts,
    Path,
    State,
    Template,
    UnsupportedValue,
    path_text,
    uses,
)
from kernelgraph.layers import original

Json = Any


class NotPortable(UnsupportedValue):
    """A call depends on code that only the model has."""


# --- constants ----------------------------------------------------------------------------------

_PLAIN = (type(None), bool, int, str)
_SEQUENCES: dict[str, type[Any]] = {"tuple": tuple, "list": list, "size": torch.Size}
_SETS: dict[str, type[Any]] = {"set": set, "frozenset": frozenset}
_DICTS: dict[str, type[Any]] = {"dict": dict, "OrderedDict": OrderedDict}
_KIND_OF = {cls: kind for kind, cls in (_SEQUENCES | _SETS | _DICTS).items()}
_NAMED = (torch.dtype, torch.layout, torch.memory_format)


def constant_to_json(value: Any) -> Json:
    """A constant as JSON.

    Raises:
        NotPortable: It is a function, class or enumeration of somebody's else than torch's.
    """
    cls = type(value)
    if cls in _PLAIN:
        return value
    if cls is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if cls in _KIND_OF:
        if cls in _DICTS.values():
            items = [[constant_to_json(k), constant_to_json(v)] for k, v in value.items()]
            return {_KIND_OF[cls]: items}
        parts = [constant_to_json(part) for part in value]
        # The order of a set is another one in each process.
        return {_KIND_OF[cls]: sorted(parts, key=repr) if cls in _SETS.values() else parts}
    if cls is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if cls is complex:
        return {"complex": [repr(value.real), repr(value.imag)]}
    if cls is torch.device:
        return {"device": str(value)}
    if cls in _NAMED:
        return {"torch": f"torch:{str(value).removeprefix('torch.')}"}
    return {"torch": _name_in_torch(value)}


def constant_from_json(data: Json) -> Any:
    """The inverse of `constant_to_json`.

    Raises:
        ValueError: It is not such JSON.
    """
    if type(data) in (*_PLAIN, float):
        return data
    ((kind, body),) = data.items()
    if kind == "float":
        return float(body)
    if kind in _DICTS:
        return _DICTS[kind]((constant_from_json(k), constant_from_json(v)) for k, v in body)
    if kind in _SEQUENCES or kind in _SETS:
        return {**_SEQUENCES, **_SETS}[kind](map(constant_from_json, body))
    if kind == "bytes":
        return base64.b64decode(body)
    if kind == "complex":
        return complex(*map(float, body))
    if kind == "device":
        return torch.device(body)
    if kind == "torch":
        return _of_torch(body)
    raise ValueError(f"{kind!r} is no kind of constant")


def _name_in_torch(value: Any) -> str:
    """``module:name`` of a function or class that torch has under this name."""
    name = getattr(value, "__qualname__", "") or getattr(value, "__name__", "")
    for module in (getattr(value, "__module__", None), "torch", "torch.nn.functional"):
        for spelled in (name, getattr(value, "__name__", "")):
            if isinstance(module, str) and spelled:
                try:
                    if _of_torch(f"{module}:{spelled}") is value:
                        return f"{module}:{spelled}"
                except ValueError:
                    continue
    raise NotPortable(
        f"{value!r} is neither data nor torch's own, and only the model's code has it"
    )


def _of_torch(name: str) -> Any:
    module, _, path = name.partition(":")
    if module != "torch" and not module.startswith("torch."):
        raise ValueError(f"{name!r} is no name in torch")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = vars(found)[part] if isinstance(found, type) else getattr(found, part)
    except (ImportError, AttributeError, KeyError) as error:
        raise ValueError(f"this torch has no {module}.{path}") from error
    # A module of torch's has others among its attributes: torch.os, say.
    home = getattr(found, "__module__", None)
    known = isinstance(found, (*_NAMED, type, types.FunctionType, types.BuiltinFunctionType))
    if not known or not (isinstance(found, _NAMED) or home is None or _is_torchs(home)):
        raise ValueError(f"{name!r} is neither a function nor a class of torch's")
    return found


def _is_torchs(module: str) -> bool:
    return module == "torch" or module.startswith("torch.")


# --- paths and templates ------------------------------------------------------------------------


def path_to_json(path: Path) -> Json:
    """A path as JSON."""
    return [step if isinstance(step, str) else list(step) for step in path]


def path_from_json(data: Json) -> Path:
    """The inverse of `path_to_json`.

    Raises:
        ValueError: It is not such JSON.
    """
    steps = []
    for step in data:
        if isinstance(step, list):
            (key,) = step
        else:
            key = step
        if type(key) not in ((str, int) if isinstance(step, list) else (str,)):
            raise ValueError(f"{step!r} is no step of a path")
        steps.append((key,) if isinstance(step, list) else key)
    return tuple(steps)


def template_to_json(template: Template) -> Json:
    """A template as JSON.

    Raises:
        NotPortable: There is a class of the model's in it.
    """
    match template:
        case Leaf(index):
            return ["leaf", index]
        case Constant(value):
            return ["const", constant_to_json(value)]
        case Entries(cls, parts) if cls in _KIND_OF:
            return [_KIND_OF[cls], [[key, template_to_json(part)] for key, part in parts]]
        case Parts(cls, parts) if cls in _KIND_OF:
            return [_KIND_OF[cls], [template_to_json(part) for part in parts]]
        case Entries(cls) | Parts(cls):
            raise NotPortable(f"a {cls.__qualname__} is passed or returned, a class of its own")
    raise AssertionError(template)


def template_from_json(data: Json) -> Template:
    """The inverse of `template_to_json`.

    Raises:
        ValueError: It is not such JSON.
    """
    kind, body = data
    if kind == "leaf" and type(body) is int:
        return Leaf(body)
    if kind == "const":
        return Constant(constant_from_json(body))
    if kind in _DICTS and all(type(key) in (str, int) for key, _ in body):
        return Entries(_DICTS[kind], tuple((key, template_from_json(part)) for key, part in body))
    if kind in _SEQUENCES:
        return Parts(_SEQUENCES[kind], tuple(map(template_from_json, body)))
    raise ValueError(f"{kind!r} is no kind of template")


# --- classes ------------------------------------------------------------------------------------


def _node_to_json(node: Node) -> Json:
    if node is None:
        return None
    if isinstance(node, Container):
        if node.type not in _KIND_OF:
            raise NotPortable(f"the layer has a {node.type.__qualname__}, a class of its own")
        return {"container": _KIND_OF[node.type], "keys": list(node.keys)}
    if not issubclass(node, nn.Module):
        return {"object": node.__name__}
    base = next(cls for cls in node.__mro__ if cls is nn.Module or _has_in_torch(cls))
    return {"module": node.__name__, "base": _name_in_torch(base)}


def _has_in_torch(cls: type) -> bool:
    return _is_torchs(cls.__module__) and cls.__module__ != "torch.nn.modules.module"


def _node_from_json(data: Json) -> Node:
    if data is None:
        return None
    if "container" in data:
        cls = {**_SEQUENCES, **_DICTS}[data["container"]]
        if not all(type(key) in (str, int) for key in data["keys"]):
            raise ValueError(f"{data['keys']!r} are no keys")
        return Container(cls, tuple(data["keys"]))
    if "object" in data:
        return _stand_in(str(data["object"]), object)
    base = _of_torch(data["base"])
    if not (isinstance(base, type) and issubclass(base, nn.Module)):
        raise ValueError(f"{data['base']!r} is no class of modules")
    named: Any = base
    return named if named.__name__ == data["module"] else _stand_in(str(data["module"]), named)


@functools.cache
def _stand_in(name: str, base: type) -> type:
    """A class in the place of one that the model has."""
    return type(name, (base,), {"__module__": __name__})


# --- calls --------------------------------------------------------------------------------------


def call_to_json(call: Call, needed: Collection[Path]) -> Json:
    """A form of call as JSON.

    Args:
        call: The form.
        needed: The constants that the kernel reads. Of what only the layer's own forward reads,
            which never runs on the stand-in, what is not data is left out.

    Raises:
        NotPortable: It depends on code of the model's.
    """
    state = call.state
    constants = []
    for path, value in state.constants:
        try:
            constants.append([path_to_json(path), constant_to_json(value)])
        except NotPortable as error:
            if path in needed:
                raise NotPortable(f"self.{path_text(path)}: {error}") from None
    return {
        "arguments": template_to_json(call.arguments),
        "operands": [[t, n] for t, n in zip(call.types, call.names, strict=True)],
        "autocast": call.autocast and [call.autocast[0], constant_to_json(call.autocast[1])],
        "tensors": [path_to_json(path) for path in state.tensors],
        "numbers": [[path_to_json(path), constant_to_json(v)] for path, v in state.numbers],
        "constants": constants,
        "nodes": [[path_to_json(path), _node_to_json(node)] for path, node in state.nodes],
        "registered": [[path_to_json(path), home] for path, home in state.registered],
    }


def call_from_json(data: Json) -> Call:
    """The inverse of `call_to_json`, with classes that stand in for the model's.

    Raises:
        ValueError: It is not such JSON.
    """
    types_ = tuple(kind for kind, _ in data["operands"])
    names = tuple(name for _, name in data["operands"])
    if not set(types_) <= {"Tensor", "float", "SymInt"} or not all(map(str.isidentifier, names)):
        raise ValueError(f"{data['operands']!r} are no operands")
    autocast = data["autocast"]
    if autocast is not None:
        kind, dtype = autocast
        autocast = (torch.device(kind).type, constant_from_json(dtype))
    registered = [(path_from_json(path), home) for path, home in data["registered"]]
    if not {home for _, home in registered} <= {"_parameters", "_buffers"}:
        raise ValueError("a tensor is registered as neither a parameter nor a buffer")
    state = State(
        tuple(path_from_json(path) for path in data["tensors"]),
        tuple((path_from_json(path), constant_from_json(v)) for path, v in data["numbers"]),
        tuple((path_from_json(path), constant_from_json(v)) for path, v in data["constants"]),
        tuple((path_from_json(path), _node_from_json(node)) for path, node in data["nodes"]),
        tuple(registered),
    )
    return Call(state, template_from_json(data["arguments"]), names, types_, autocast)


# --- what a kernel wants of the model's code ----------------------------------------------------


def check_needs_no_code(module: nn.Module, forward: Callable[..., Any]) -> None:
    """See that a kernel uses no method of the layer, or of its submodules, but torch's.

    As far as its source tells. What it does not tell, the op itself shows where it was exported:
    there too it runs the kernel on objects that stand in for the model's.

    Raises:
        NotPortable: It uses one.
    """
    for names in sorted(uses(original(forward)).reads):
        value: Any = module
        for i, name in enumerate(names):
            cls = type(value)
            if name == CALL:
                member: Any = cls.forward if isinstance(value, nn.Module) else cls
            else:
                member = inspect.getattr_static(cls, name, None)
            if _is_code(member) and not _is_torchs(getattr(_code(member), "__module__", "")):
                chain = ".".join(n for n in names[: i + 1] if n != CALL)
                raise NotPortable(
                    f"the kernel uses self.{chain}, which is code of the model's "
                    f"({cls.__module__}.{cls.__qualname__})"
                )
            if name == CALL or _is_code(member):
                break
            try:
                value = getattr(value, name)
            except AttributeError:
                break
            if not isinstance(value, nn.Module):
                break


def _is_code(member: Any) -> bool:
    return isinstance(member, (types.FunctionType, property, staticmethod, classmethod))


def _code(member: Any) -> Any:
    if isinstance(member, property):
        return member.fget
    return getattr(member, "__func__", member)
