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

from kernelgraph.graph.state import State, describe, new_shell
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


class Runner:
    """Calls a ``forward`` with the operands of a `Call`: the body of an op.

    The object that plays ``self`` and the containers of the arguments are made once and kept in a
    pool, since making them costs more than a small kernel; each thread in a call has its own, and
    between calls they hold no tensor.
    """

    def __init__(self, forward: Callable[..., Any], call: Call) -> None:
        self._forward = _in_autocast(forward, call.autocast)
        self._call = call
        self._free: list[_Activation] = []

    def __call__(self, operands: Sequence[Any]) -> Any:
        try:
            activation = self._free.pop()
        except IndexError:
            activation = _Activation(self._call)
        slots = activation.slots
        try:
            for (container, key), value in zip(slots, operands):  # noqa: B905 (hot path)
                container[key] = value
            args, kwargs = activation.arguments()
            return self._forward(activation.shell.module, *args, **kwargs)
        finally:
            for container, key in slots:
                container[key] = None
            self._free.append(activation)

    def observe(self, operands: Sequence[Any]) -> Any:
        """Call, and see that the layer's attributes are afterwards what they were before.

        Raises:
            UnsupportedValue: If the call sets one: an op has no such effect.
        """
        activation = _Activation(self._call)
        for (container, key), value in zip(activation.slots, operands, strict=True):
            container[key] = value
        before = activation.shell.contents()
        args, kwargs = activation.arguments()
        result = self._forward(activation.shell.module, *args, **kwargs)
        changed = {name for (_, name), _ in before.items() ^ activation.shell.contents().items()}
        if changed:
            where = getattr(self._forward, "__qualname__", self._forward)
            raise UnsupportedValue(f"{where} sets {', '.join(sorted(changed))} of the layer")
        return result


def _in_autocast(
    forward: Callable[..., Any], region: tuple[str, torch.dtype] | None
) -> Callable[..., Any]:
    if region is None:
        return forward
    kind, dtype = region

    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        # Without its cache, which would keep casts of the weights.
        with torch.autocast(kind, dtype, cache_enabled=False):
            return forward(*args, **kwargs)

    return inside


class _Activation:
    """What a call needs and no other call may use at the same time."""

    def __init__(self, call: Call) -> None:
        self.shell = new_shell(call.state)
        template = call.arguments
        leaves = paths_of(template)
        _, (args, kwargs) = template
        # Containers among the arguments are made anew for each call, which may change them.
        parts = [*args[1], *(part for _, part in kwargs[1])]
        flat = all(kind in ("leaf", "const") for kind, _ in parts)
        self._values: list[Any] = [None] * len(leaves)
        self._template = None if flat else template
        self._args: list[Any] = []
        self._kwargs: dict[str, Any] = {}
        self.slots: list[tuple[Any, Any]]
        if flat:
            nothing = [None] * len(leaves)
            self._args = list(put_leaves(args, nothing))
            self._kwargs = put_leaves(kwargs, nothing)
            containers = (self._args, self._kwargs)
            self.slots = [(containers[where], key) for where, key in leaves]
        else:
            self.slots = [(self._values, i) for i in range(len(leaves))]
        self.slots += self.shell.slots

    def arguments(self) -> tuple[Sequence[Any], dict[str, Any]]:
        if self._template is None:
            return self._args, self._kwargs
        args, kwargs = put_leaves(self._template, self._values)
        return args, kwargs


def digest(*parts: str) -> str:
    """Eight hex digits of ``parts``."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
