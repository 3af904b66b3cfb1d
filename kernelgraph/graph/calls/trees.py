"""Nested values as trees: paths to their parts, and templates with the leaves taken out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelgraph.graph.calls.constants import (
    class_text,
    field_names,
    is_constant,
    is_named_tuple,
    stable_text,
)

# --- paths --------------------------------------------------------------------------------------

Step = str | tuple[str | int]
"""The name of an attribute, or a key for ``[]`` inside a tuple."""
Path = tuple[Step, ...]
"""The way from a value to one of its parts. From a layer, ``("experts", "weight")`` leads to
``self.experts.weight``, and ``("blocks", (0,))`` to ``self.blocks[0]``."""


def read(value: Any, path: Path) -> Any:
    """Return the part of ``value`` at ``path``."""
    for step in path:
        value = getattr(value, step) if isinstance(step, str) else value[step[0]]
    return value


def path_text(path: Path) -> str:
    """Return ``path`` as Python writes it, without the value that it starts from."""
    steps = (f".{step}" if isinstance(step, str) else f"[{step[0]!r}]" for step in path)
    return "".join(steps).removeprefix(".")


def path_name(path: Path) -> str:
    """Return ``path`` as one name, its steps joined by underscores."""
    return "_".join(step if isinstance(step, str) else str(step[0]) for step in path)


# --- templates ----------------------------------------------------------------------------------


class UnsupportedValue(Exception):
    """An argument or output is no operand, no constant and no container of these."""


class Template(ABC):
    """A nested value with its leaves taken out, as `flatten` returns it.

    Two templates are equal where the values have the same structure and the same constants.
    """

    __slots__ = ()

    @abstractmethod
    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Return a new nested value with ``leaves`` in their places."""

    @abstractmethod
    def ends(self, prefix: Path = ()) -> Iterator[tuple[Path, Leaf | Constant]]:
        """Yield each leaf and constant with its path, which begins with ``prefix``."""

    @abstractmethod
    def text(self) -> str:
        """Return text that is the same in every process for equal templates."""

    @abstractmethod
    def describe(self) -> str:
        """Return words for an error message, such as ``a tuple of 2 (a tensor, 1)``."""

    def paths(self) -> list[Path]:
        """Return the paths to the leaves, in the leaves' order."""
        return [path for path, end in self.ends() if isinstance(end, Leaf)]


@dataclass(frozen=True, slots=True)
class Leaf(Template):
    """The place of one leaf."""

    index: int

    def unflatten(self, leaves: Sequence[object]) -> object:
        return leaves[self.index]

    def ends(self, prefix: Path = ()) -> Iterator[tuple[Path, Leaf | Constant]]:
        yield prefix, self

    def text(self) -> str:
        return f"leaf {self.index}"

    def describe(self) -> str:
        return "a tensor"


@dataclass(frozen=True, slots=True)
class Constant(Template):
    """A constant of `kernelgraph.graph.calls.constants.is_constant`, or a number."""

    value: object

    def unflatten(self, leaves: Sequence[object]) -> object:
        return self.value

    def ends(self, prefix: Path = ()) -> Iterator[tuple[Path, Leaf | Constant]]:
        yield prefix, self

    def text(self) -> str:
        return f"const {stable_text(self.value)}"

    def describe(self) -> str:
        return repr(self.value)


@dataclass(frozen=True, slots=True)
class Parts(Template):
    """A container whose parts have positions: a tuple, list, torch.Size or named tuple."""

    cls: type[Any]
    parts: tuple[Template, ...]

    def unflatten(self, leaves: Sequence[object]) -> object:
        parts = []
        for part in self.parts:
            parts.append(part.unflatten(leaves))
        if self.cls is tuple:
            return tuple(parts)
        if self.cls is list:
            return parts
        if self.cls is torch.Size:
            return torch.Size(parts)
        return tuple.__new__(self.cls, parts)  # torch.return_types have a __new__ of their own

    def ends(self, prefix: Path = ()) -> Iterator[tuple[Path, Leaf | Constant]]:
        for i, part in enumerate(self.parts):
            yield from part.ends((*prefix, (i,)))

    def text(self) -> str:
        inside = ", ".join(part.text() for part in self.parts)
        named = self.cls not in _SEQUENCES
        return f"{self._kind}({inside}){class_text(self.cls) if named else ''}"

    def describe(self) -> str:
        inside = ", ".join(part.describe() for part in self.parts)
        return f"a {self._kind} of {len(self.parts)} ({inside})"

    @property
    def _kind(self) -> str:
        return _SEQUENCES.get(self.cls, "namedtuple")


@dataclass(frozen=True, slots=True)
class Entries(Template):
    """A container whose parts have keys or names: a dict, OrderedDict or dataclass."""

    cls: type[Any]
    parts: tuple[tuple[str | int, Template], ...]

    def unflatten(self, leaves: Sequence[object]) -> object:
        made: dict[Any, Any] = {}
        for key, part in self.parts:
            made[key] = part.unflatten(leaves)
        if self.cls is dict:
            return made
        return OrderedDict(made) if self.cls is OrderedDict else self.cls(**made)

    def ends(self, prefix: Path = ()) -> Iterator[tuple[Path, Leaf | Constant]]:
        by_name = self.cls not in _DICTS
        for key, part in self.parts:
            step: Any = key if by_name else (key,)
            yield from part.ends((*prefix, step))

    def text(self) -> str:
        inside = ", ".join(f"{key!r}: {part.text()}" for key, part in self.parts)
        if self.cls in _DICTS:
            return f"{_DICTS[self.cls]}({inside})"
        return f"dataclass({inside}){class_text(self.cls)}"

    def describe(self) -> str:
        inside = ", ".join(f"{key!r}: {part.describe()}" for key, part in self.parts)
        return f"a {self.cls.__name__} {{{inside}}}"


_SEQUENCES: dict[type[Any], str] = {tuple: "tuple", list: "list", torch.Size: "size"}
_DICTS: dict[type[Any], str] = {dict: "dict", OrderedDict: "OrderedDict"}


def flatten(value: Any) -> tuple[list[Any], Template]:
    """Take the tensors and numbers out of a nested value.

    Args:
        value: Tensors, numbers and constants in tuples, lists, dicts, named tuples and
            dataclasses.

    Returns:
        The leaves, and a template whose ``unflatten`` makes the value again.

    Raises:
        UnsupportedValue: If there is anything else in it.
    """
    leaves: list[Any] = []
    return leaves, _take(value, leaves, (int, float, torch.SymInt))


def flatten_tensors(value: object) -> tuple[list[Tensor], Template]:
    """`flatten` for the results of an op: numbers stay, and must be the same in each call."""
    tensors: list[Any] = []
    return tensors, _take(value, tensors, ())


def _take(value: Any, leaves: list[Any], numbers: tuple[type[Any], ...]) -> Template:
    cls: type = type(value)
    if cls in numbers or isinstance(value, Tensor):
        leaves.append(value)
        return Leaf(len(leaves) - 1)
    if cls in _SEQUENCES or is_named_tuple(cls):
        return Parts(cls, tuple([_take(part, leaves, numbers) for part in value]))
    if cls in _DICTS and all(type(key) in (str, int) for key in value):
        items = [(key, _take(part, leaves, numbers)) for key, part in value.items()]
        return Entries(cls, tuple(items))
    if (names := field_names(cls)) is not None:
        fields = [(name, _take(getattr(value, name), leaves, numbers)) for name in names]
        return Entries(cls, tuple(fields))
    if is_constant(value) or (cls in (int, float) and not numbers):
        return Constant(value)
    raise UnsupportedValue(
        f"a {cls.__name__} is passed or returned: an op takes and gives tensors, numbers and "
        "plain constants, in tuples, lists, dicts and dataclasses"
    )
