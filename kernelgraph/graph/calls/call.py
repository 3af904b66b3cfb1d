"""The signature of a call of a layer: which values are operands, and how to make the call again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import keyword
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernelgraph.graph.calls.state import State, describe
from kernelgraph.graph.calls.trees import (
    Constant,
    Entries,
    Parts,
    Path,
    Template,
    flatten,
    path_name,
    read,
)
from kernelgraph.layers import Extensible, program_data_kept


def constants_in(arguments: Template, layer: Extensible) -> dict[str, object]:
    """Return the constants among the arguments of a call, by parameter name."""
    parameters = _parameters(layer.reference)
    ends = arguments.ends()
    return {
        _argument_name(path, parameters): end.value
        for path, end in ends
        if isinstance(end, Constant)
    }


@dataclass(frozen=True)
class Call:
    """The signature of a call: all that the calls of one custom op have in common."""

    state: State
    arguments: Template
    """``(args, kwargs)`` with its leaves taken out. They are the first operands; those of the state
    follow."""
    names: tuple[str, ...]
    """The names of the operands in the op's schema."""
    types: tuple[str, ...]
    """The types of the operands in the op's schema: ``Tensor``, ``float`` or ``SymInt``."""
    autocast: tuple[str, torch.dtype] | None = None
    """The device type and dtype of the autocast region around the call. A compiled graph runs
    outside of that region, so the op enters it again."""

    @classmethod
    def of(
        cls, state: State, values: Sequence[object], layer: Extensible, args: Any, kwargs: Any
    ) -> tuple[Call, list[Any]]:
        """Return the signature of a call, and its operands.

        Args:
            state: The state that the call reads.
            values: The values of ``state.tensors``.
            layer: The layer that is called, for the names of its parameters.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            UnsupportedValue: If an argument is neither an operand nor a constant.
        """
        parameters = _parameters(layer.reference)
        operands, arguments = flatten((tuple(args), dict(kwargs)))
        names = [_argument_name(path, parameters) for path in arguments.paths()]
        names += [path_name(path) for path in state.operands]
        operands += [*values, *(number for _, number in state.numbers)]
        types = tuple(_schema_type(value) for value in operands)
        return cls(state, arguments, _unique(names), types, _autocast(operands)), operands

    @property
    def schema(self) -> str:
        """The operands, as the op's schema writes them."""
        return ", ".join(f"{t} {n}" for t, n in zip(self.types, self.names, strict=True))

    @property
    def tensors(self) -> tuple[int, ...]:
        """The numbers of the operands that are tensors."""
        return tuple(i for i, t in enumerate(self.types) if t == "Tensor")

    @property
    def first_state(self) -> int:
        """The number of the first operand that is state; those before it are arguments."""
        return len(self.types) - len(self.state.operands)

    def counterparts(
        self, operands: Sequence[Any], make: Callable[[int, torch.Tensor], torch.Tensor]
    ) -> list[Any]:
        """Return ``operands`` with each tensor replaced by ``make(i, tensor)``.

        Tied weights get one counterpart, since a forward may iterate over ``parameters()``. Each
        argument gets its own: ``x`` and ``x.detach()`` differ for autograd, and are the same
        tensor in a compiled graph. A counterpart has the attributes that the tensor carries, such
        as the state of its quantisation.
        """
        first, tied = self.first_state, {}

        def new(i: int, value: torch.Tensor) -> torch.Tensor:
            made = make(i, value)
            if type(value) in (torch.Tensor, nn.Parameter) and made is not value:
                vars(made).update(vars(value))
            return made

        def counterpart(i: int, value: Any) -> object:
            if not isinstance(value, torch.Tensor):
                return value
            if i < first:
                return new(i, value)
            if id(value) not in tied:
                tied[id(value)] = new(i, value)
            return tied[id(value)]

        return [counterpart(i, value) for i, value in enumerate(operands)]

    def operands_of(self, module: nn.Module, args: Any, kwargs: Any) -> list[Any]:
        """Return the operands of another call that has this signature."""
        operands, _ = flatten((tuple(args), dict(kwargs)))
        return operands + [read(module, path) for path in self.state.operands]

    @property
    def positional(self) -> tuple[Template, ...]:
        """The positional arguments."""
        args = self._args_and_kwargs[0]
        assert isinstance(args, Parts)
        return args.parts

    @property
    def keywords(self) -> tuple[tuple[str, Template], ...]:
        """The keyword arguments with their names."""
        kwargs = self._args_and_kwargs[1]
        assert isinstance(kwargs, Entries)
        return tuple((str(name), part) for name, part in kwargs.parts)

    @property
    def _args_and_kwargs(self) -> tuple[Template, ...]:
        assert isinstance(self.arguments, Parts)
        return self.arguments.parts

    @property
    def argument_paths(self) -> list[Path]:
        """The paths from ``(args, kwargs)`` to each operand that is an argument."""
        return self.arguments.paths()

    def program_data_kept(
        self, layer: Extensible
    ) -> contextlib.AbstractContextManager[Callable[[], bool]]:
        """Run the call aside, and then undo what the layer has counted and noted in Python.

        The context is a function that tells whether it has.

        Args:
            layer: The layer that is called.
        """
        classes = [cls for _, cls in self.state.nodes if isinstance(cls, type)]
        return program_data_kept(classes, [layer.reference])

    def describe(self) -> str:
        """Return text that is the same in every process for equal signatures."""
        return repr((describe(self.state), self.arguments.text(), self.schema, self.autocast))


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
def _parameters(forward: Callable[..., object]) -> tuple[str, ...]:
    """Return the names of a forward's positional parameters after ``self``."""
    found = inspect.signature(forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in found if p.kind in positional)[1:]


def _argument_name(path: Path, parameters: Sequence[str]) -> str:
    where, first = path[0][0], path[1][0]
    if where == 0 and isinstance(first, int):
        first = parameters[first] if first < len(parameters) else f"arg{first}"
    return path_name((str(first), *path[2:]))


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Return distinct identifiers, close to ``names``, that torch's schema parser accepts."""
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


# The schema parser reserves these: names of torch's op wrappers, and the name of a type.
_RESERVED = frozenset({"self", "out", "NoneType"})
