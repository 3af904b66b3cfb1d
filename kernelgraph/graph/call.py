"""One call of a layer as data: which of its values are operands, and how to make it again."""

from __future__ import annotations

import functools
import hashlib
import inspect
import keyword
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernelgraph.graph.state import State, describe
from kernelgraph.layers import Extensible

Template = tuple[Any, ...]
"""A nested value with its leaves taken out, as constants that Dynamo can handle:
``("leaf", i)``, ``("const", value)``, ``("tuple" | "list" | "size", templates)``,
``("dict", ((key, template), ...))``."""

_SEQUENCES: dict[str, type[Any]] = {"tuple": tuple, "list": list, "size": torch.Size}
_CONSTANTS = (bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class UnsupportedValue(Exception):
    """An argument or output can be neither an operand, a constant nor a container of them."""


def take_leaves(value: Any, leaves: list[Any]) -> Template:
    """Move the tensors and numbers of a nested value to ``leaves``; what is left of it."""
    if _is_leaf(value):
        leaves.append(value)
        return ("leaf", len(leaves) - 1)
    for name, sequence in _SEQUENCES.items():
        if type(value) is sequence:
            return (name, tuple(take_leaves(v, leaves) for v in value))
    if type(value) is dict and all(type(k) in (str, int) for k in value):
        return ("dict", tuple((k, take_leaves(v, leaves)) for k, v in value.items()))
    # Exactly these types: of a subclass the rest would be lost, and repr() must tell them apart.
    if value is None or type(value) in _CONSTANTS:
        return ("const", value)
    raise UnsupportedValue(  # a SymFloat is one: no op takes it
        f"a {type(value).__name__} is passed or returned: an op takes and gives tensors, numbers "
        "and plain constants, in tuples, lists and dicts"
    )


def put_leaves(template: Template, leaves: Sequence[Any]) -> Any:
    """The inverse of `take_leaves`. Dynamo traces this: it holds to the simplest of Python."""
    kind = template[0]
    if kind == "leaf":
        return leaves[template[1]]
    if kind == "const":
        return template[1]
    if kind == "dict":
        made = {}
        for key, part in template[1]:
            made[key] = put_leaves(part, leaves)
        return made
    parts = []
    for part in template[1]:
        parts.append(put_leaves(part, leaves))
    if kind == "list":
        return parts
    return tuple(parts) if kind == "tuple" else torch.Size(parts)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, torch.SymInt)) or type(value) in (int, float)


def paths_of(template: Template, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each leaf, in the leaves' order."""
    kind, body = template[0], template[1]
    if kind == "leaf":
        return [prefix]
    if kind == "const":
        return []
    items = body if kind == "dict" else enumerate(body)
    return [path for key, part in items for path in paths_of(part, (*prefix, key))]


@dataclass(frozen=True)
class Call:
    """The form of a call: all that one custom op's overload has in common."""

    state: State
    arguments: Template
    """Of ``(args, kwargs)``; its leaves are the first operands, the state's the rest."""
    names: tuple[str, ...]
    """The operands' names in the op's schema."""
    types: tuple[str, ...]
    """The operands' types in the op's schema."""
    autocast: tuple[str, torch.dtype] | None = None
    """The device type and dtype of the autocast region around the call. The graph that is
    compiled runs outside of it, and the layer must not notice."""

    @classmethod
    def of(
        cls, state: State, values: Sequence[Any], layer: Extensible, args: Any, kwargs: Any
    ) -> tuple[Call, list[Any]]:
        """The form of a call, and its operands.

        Args:
            state: The state it reads.
            values: The values of ``state.tensors``.
            layer: The layer that is called, for the names of its parameters.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            UnsupportedValue: If an argument can be neither an operand nor a constant.
        """
        operands: list[Any] = []
        parameters = _parameters(layer.reference)
        arguments = take_leaves((tuple(args), dict(kwargs)), operands)
        names = [_argument_name(path, parameters) for path in paths_of(arguments)]
        names += ["_".join(path) for path in state.operands]
        operands += [*values, *(number for _, number in state.numbers)]
        types = tuple(_schema_type(value) for value in operands)
        return cls(state, arguments, _unique(names), types, _autocast(operands)), operands

    @property
    def schema(self) -> str:
        """The operands as they stand in the op's schema."""
        return ", ".join(f"{t} {n}" for t, n in zip(self.types, self.names, strict=True))

    @property
    def tensors(self) -> tuple[int, ...]:
        """Which of the operands are tensors."""
        return tuple(i for i, t in enumerate(self.types) if t == "Tensor")

    @property
    def argument_keys(self) -> list[tuple[Any, ...]]:
        """The keys from ``(args, kwargs)`` to each operand that is an argument."""
        return paths_of(self.arguments)

    def describe(self) -> str:
        """Text that is the same for the same form of call in every process."""
        return repr((describe(self.state), self.arguments, self.schema, self.autocast))


def _autocast(operands: Sequence[Any]) -> tuple[str, torch.dtype] | None:
    for value in operands:
        if isinstance(value, torch.Tensor):
            kind = value.device.type
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                return kind, torch.get_autocast_dtype(kind)
            return None
    return None


def _schema_type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "Tensor"
    return "float" if isinstance(value, float) else "SymInt"


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's positional parameters after ``self``."""
    found = inspect.signature(forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in found if p.kind in positional)[1:]


def _argument_name(path: tuple[Any, ...], parameters: Sequence[str]) -> str:
    where, first, *rest = path
    if where == 0:
        first = parameters[first] if first < len(parameters) else f"arg{first}"
    return "_".join(str(part) for part in (first, *rest))


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Distinct identifiers like ``names`` that the schema parser takes."""
    made: list[str] = []
    for name in names:
        plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name).strip("_") or "x"
        plain = f"x_{plain}" if plain[0].isdigit() else plain
        plain = f"{plain}_" if keyword.iskeyword(plain) or plain in _RESERVED else plain
        candidate, n = plain, 2
        while candidate in made:
            candidate, n = f"{plain}_{n}", n + 1
        made.append(candidate)
    return tuple(made)


# A name that torch's op wrappers use, and a type that the schema parser has no argument called by.
_RESERVED = frozenset({"self", "out", "NoneType"})


def digest(*parts: str) -> str:
    """Eight hex digits of ``parts``."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
