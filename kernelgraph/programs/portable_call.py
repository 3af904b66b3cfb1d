"""A call signature as JSON that means the same where the model's code is missing.

An op runs its kernel on an object that stands in for the layer
(`kernelgraph.graph.calls.stand_in`). A kernel is pure: it needs the attributes of the layer and not
its class. So a class of the model becomes a class of the same name that is made for the purpose, on
the nearest base that torch has. torch's own classes and functions keep their identity and are
written by name. Everything else in a signature is paths, numbers and constants
(`kernelgraph.programs.portable_json`). Reading runs nothing that the data names.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import nn

from kernelgraph.graph.calls import CALL, Call, Container, Node, Path, State, path_text, uses
from kernelgraph.layers import original
from kernelgraph.programs.portable_json import (
    CONTAINER_NAMES,
    DICTS,
    SEQUENCES,
    Json,
    NotPortable,
    as_array,
    as_object,
    as_pair,
    as_text,
    constant_from_json,
    constant_to_json,
    from_torch,
    is_key,
    is_torch_module,
    path_from_json,
    path_to_json,
    template_from_json,
    template_to_json,
    torch_name,
)

T = TypeVar("T")

# --- calls --------------------------------------------------------------------------------------


def call_to_json(call: Call, needed: Collection[Path]) -> Json:
    """Return a call signature as JSON.

    Args:
        call: The signature.
        needed: The paths of the constants that the kernel reads. Other constants that are not
            portable are left out: only the layer's own forward reads them, and that never runs on
            the stand-in.

    Raises:
        NotPortable: If the signature depends on the model's code.
    """
    state = call.state
    constants: list[Json] = []
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
    """Return the signature from what `call_to_json` returned, with stand-ins for the model's
    classes.

    Raises:
        ValueError: If it is not such JSON.
        KeyError: If a part of it is missing.
    """
    parts = as_object(data)
    operands = [tuple(map(as_text, as_pair(pair))) for pair in as_array(parts["operands"])]
    schema_types = tuple(schema_type for schema_type, _ in operands)
    names = tuple(name for _, name in operands)
    if not {"Tensor", "float", "SymInt"}.issuperset(schema_types) or not all(
        map(str.isidentifier, names)
    ):
        raise ValueError(f"{operands!r} are no operands")
    state = State(
        tensors=tuple(map(path_from_json, as_array(parts["tensors"]))),
        numbers=_by_path(parts["numbers"], _number_from_json),
        constants=_by_path(parts["constants"], constant_from_json),
        nodes=_by_path(parts["nodes"], _node_from_json),
        registered=_by_path(parts["registered"], _registry_from_json),
    )
    arguments = template_from_json(parts["arguments"])
    return Call(state, arguments, names, schema_types, _autocast_from_json(parts["autocast"]))


def _by_path(data: Json, value_of: Callable[[Json], T]) -> tuple[tuple[Path, T], ...]:
    pairs = map(as_pair, as_array(data))
    return tuple((path_from_json(path), value_of(value)) for path, value in pairs)


def _number_from_json(data: Json) -> int | float:
    number = constant_from_json(data)
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        return number
    raise ValueError(f"{data!r} is no number")


def _registry_from_json(data: Json) -> str:
    if data in ("_parameters", "_buffers"):
        return as_text(data)
    raise ValueError("a tensor is registered as neither a parameter nor a buffer")


def _autocast_from_json(data: Json) -> tuple[str, torch.dtype] | None:
    if data is None:
        return None
    device, dtype = as_pair(data)
    found = constant_from_json(dtype)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{dtype!r} is no dtype for autocast")
    return torch.device(as_text(device)).type, found


# --- classes ------------------------------------------------------------------------------------


def _node_to_json(node: Node) -> Json:
    if node is None:
        return None
    if isinstance(node, Container):
        if node.type not in CONTAINER_NAMES:
            raise NotPortable(f"the layer has a {node.type.__qualname__}, a class of its own")
        return {"container": CONTAINER_NAMES[node.type], "keys": list(node.keys)}
    if not issubclass(node, nn.Module):
        return {"object": node.__name__}
    base = next(cls for cls in node.__mro__ if cls is nn.Module or _is_layer_of_torch(cls))
    return {"module": node.__name__, "base": torch_name(base)}


def _is_layer_of_torch(cls: type) -> bool:
    return is_torch_module(cls.__module__) and cls.__module__ != "torch.nn.modules.module"


def _node_from_json(data: Json) -> Node:
    if data is None:
        return None
    node = as_object(data)
    if "container" in node:
        cls = (SEQUENCES | DICTS)[as_text(node["container"])]
        keys = as_array(node["keys"])
        if not all(map(is_key, keys)):
            raise ValueError(f"{keys!r} are no keys of a container")
        return Container(cls, tuple(keys))
    if "object" in node:
        return _stand_in_class(as_text(node["object"]), object)
    named, name = from_torch(as_text(node["base"])), as_text(node["module"])
    if not (isinstance(named, type) and issubclass(named, nn.Module)):
        raise ValueError(f"{node['base']!r} is no class of modules")
    base: Any = named
    return named if base.__name__ == name else _stand_in_class(name, base)


@functools.cache
def _stand_in_class(name: str, base: type) -> type:
    """Return a class called ``name`` in the place of one of the model's; always the same one."""
    return type(name, (base,), {"__module__": __name__})


# --- kernels that need the model's code ---------------------------------------------------------


def check_needs_no_code(module: nn.Module, forward: Callable[..., object]) -> None:
    """Check that a kernel calls no method of the layer or its submodules, except torch's own.

    This covers what the source of the kernel shows. The rest shows where the model is exported,
    since the op runs the kernel on stand-ins there too.

    Args:
        module: The layer.
        forward: The forward of the kernel.

    Raises:
        NotPortable: If it calls one.
    """
    for names in sorted(uses(original(forward)).reads):
        _check_chain(module, names)


def _check_chain(module: nn.Module, names: tuple[str, ...]) -> None:
    """Check one chain of attributes that starts at the layer."""
    owner: Any = module
    for i, name in enumerate(names):
        cls = type(owner)
        if name == CALL:
            member: object = cls.forward if isinstance(owner, nn.Module) else cls
        else:
            member = inspect.getattr_static(cls, name, None)
        if _is_code(member) and not is_torch_module(_module_of(member)):
            chain = ".".join(n for n in names[: i + 1] if n != CALL)
            raise NotPortable(
                f"the kernel uses self.{chain}, which is code of the model's "
                f"({cls.__module__}.{cls.__qualname__})"
            )
        if name == CALL or _is_code(member):
            return
        try:
            owner = getattr(owner, name)
        except AttributeError:
            return
        if not isinstance(owner, nn.Module):
            return


def _is_code(member: object) -> bool:
    return isinstance(member, (types.FunctionType, property, staticmethod, classmethod))


def _module_of(member: Any) -> str:
    """Return the module that a function, property or method was defined in."""
    function = member.fget if isinstance(member, property) else member
    function = getattr(function, "__func__", function)
    return getattr(function, "__module__", "")
