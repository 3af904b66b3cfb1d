"""One call of a layer as data: which of its values are operands, and how to make it again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import keyword
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernelgraph.graph.constants import class_text, is_constant, is_named_tuple, stable_text
from kernelgraph.graph.paths import Path, path_name
from kernelgraph.graph.state import State, describe
from kernelgraph.layers import Extensible

Template = tuple[Any, ...]
"""A nested value with its leaves taken out:
``("leaf", i)``, ``("const", value)``, ``("tuple" | "list" | "size", templates)``,
``("dict" | "OrderedDict", ((key, template), ...))``, ``("namedtuple", templates, cls)`` and
``("dataclass", ((field, template), ...), cls)``."""

_SEQUENCES: dict[type[Any], str] = {tuple: "tuple", list: "list", torch.Size: "size"}
_DICTS: dict[type[Any], str] = {dict: "dict", OrderedDict: "OrderedDict"}


class UnsupportedValue(Exception):
    """An argument or output can be neither an operand, a constant nor a container of them."""


def take_leaves(value: Any, leaves: list[Any]) -> Template:
    """Move the tensors and numbers of a nested value to ``leaves``; what is left of it.

    Raises:
        UnsupportedValue: If there is anything else in it but constants, in containers that
            `put_leaves` can make again.
    """
    return _take(value, leaves, (int, float, torch.SymInt))


def take_tensors(value: Any, tensors: list[Any]) -> Template:
    """`take_leaves`, for results of an op: numbers stay, and must be the same in each call."""
    return _take(value, tensors, ())


def _take(value: Any, leaves: list[Any], numbers: tuple[type[Any], ...]) -> Template:
    cls: type = type(value)
    if cls in numbers or isinstance(value, torch.Tensor):
        leaves.append(value)
        return ("leaf", len(leaves) - 1)
    if cls in _SEQUENCES:
        return (_SEQUENCES[cls], tuple([_take(part, leaves, numbers) for part in value]))
    if cls in _DICTS and all(type(key) in (str, int) for key in value):
        items = [(key, _take(part, leaves, numbers)) for key, part in value.items()]
        return (_DICTS[cls], tuple(items))
    if is_named_tuple(cls):
        return ("namedtuple", tuple([_take(part, leaves, numbers) for part in value]), cls)
    if (names := field_names(cls)) is not None:
        items = [(name, _take(getattr(value, name), leaves, numbers)) for name in names]
        return ("dataclass", tuple(items), cls)
    if is_constant(value) or (cls in (int, float) and not numbers):
        return ("const", value)
    raise UnsupportedValue(
        f"a {cls.__name__} is passed or returned: an op takes and gives tensors, numbers and "
        "plain constants, in tuples, lists, dicts and dataclasses"
    )


def put_leaves(template: Template, leaves: Sequence[Any]) -> Any:
    """The inverse of `take_leaves`."""
    kind = template[0]
    if kind == "leaf":
        return leaves[template[1]]
    if kind == "const":
        return template[1]
    if kind == "dict" or kind == "OrderedDict" or kind == "dataclass":
        made = {}
        for key, part in template[1]:
            made[key] = put_leaves(part, leaves)
        if kind == "dataclass":
            return template[2](**made)
        return made if kind == "dict" else OrderedDict(made)
    parts = []
    for part in template[1]:
        parts.append(put_leaves(part, leaves))
    if kind == "list":
        return parts
    if kind == "namedtuple":
        return tuple.__new__(template[2], parts)  # as its own __new__, which wants a source
    return tuple(parts) if kind == "tuple" else torch.Size(parts)


@functools.cache
def field_names(cls: type) -> tuple[str, ...] | None:
    """The fields of a dataclass that is made from just these; None of any other class."""
    # What a __post_init__ does might not be right twice. transformers' ModelOutput, a dict too,
    # has one that only makes its fields its keys.
    if not dataclasses.is_dataclass(cls) or (
        hasattr(cls, "__post_init__") and not issubclass(cls, dict)
    ):
        return None
    fields = dataclasses.fields(cls)
    return tuple(f.name for f in fields) if all(f.init for f in fields) else None


def paths_of(template: Template) -> list[Path]:
    """The paths that lead to each leaf, in the leaves' order."""
    return [path for path, (kind, _) in _ends(template, ()) if kind == "leaf"]


def constants_in(arguments: Template, layer: Extensible) -> dict[str, Any]:
    """The constants among the arguments of a call, by the names of a layer's parameters."""
    parameters = _parameters(layer.reference)
    ends = [(path, value) for path, (kind, value) in _ends(arguments, ()) if kind == "const"]
    return {_argument_name(path, parameters): value for path, value in ends}


def _ends(template: Template, prefix: Path) -> Iterator[tuple[Path, tuple[str, Any]]]:
    """The leaves and constants, and the paths that lead to them."""
    kind, body = template[:2]
    if kind in ("leaf", "const"):
        yield prefix, (kind, body)
        return
    if kind == "dataclass":
        steps = [(name, part) for name, part in body]
    elif kind in ("dict", "OrderedDict"):
        steps = [((key,), part) for key, part in body]
    else:
        steps = [((i,), part) for i, part in enumerate(body)]
    for step, part in steps:
        yield from _ends(part, (*prefix, step))


def template_text(template: Template) -> str:
    """Text that is the same for the same template in every process."""
    kind, body = template[:2]
    if kind in ("leaf", "const"):
        return f"{kind} {stable_text(body)}"
    if kind in ("dict", "OrderedDict", "dataclass"):
        inside = ", ".join(f"{key!r}: {template_text(part)}" for key, part in body)
    else:
        inside = ", ".join(map(template_text, body))
    return f"{kind}({inside}){''.join(map(class_text, template[2:]))}"


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
        names += [path_name(path) for path in state.operands]
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
    def first_state(self) -> int:
        """How many of the operands are arguments; the state's follow."""
        return len(self.types) - len(self.state.operands)

    def counterparts(
        self, operands: Sequence[Any], make: Callable[[int, torch.Tensor], torch.Tensor]
    ) -> list[Any]:
        """What ``make(i, tensor)`` gives for each tensor among ``operands``, others as they are.

        Weights that are tied have one counterpart, for a forward that goes over its parameters().
        Arguments have one each: what autograd tells apart, such as ``x`` and ``x.detach()``, is
        the same tensor in a compiled graph.
        """
        first, tied = self.first_state, {}

        def counterpart(i: int, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if i < first:
                return make(i, value)
            if id(value) not in tied:
                tied[id(value)] = make(i, value)
            return tied[id(value)]

        return [counterpart(i, value) for i, value in enumerate(operands)]

    @property
    def argument_paths(self) -> list[Path]:
        """The paths from ``(args, kwargs)`` to each operand that is an argument."""
        return paths_of(self.arguments)

    def describe(self) -> str:
        """Text that is the same for the same form of call in every process."""
        return repr(
            (describe(self.state), template_text(self.arguments), self.schema, self.autocast)
        )


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


def _argument_name(path: Path, parameters: Sequence[str]) -> str:
    where, first = path[0][0], path[1][0]
    if where == 0 and isinstance(first, int):
        first = parameters[first] if first < len(parameters) else f"arg{first}"
    return path_name((str(first), *path[2:]))


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
