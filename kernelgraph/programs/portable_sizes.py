"""The sizes of an op's results as data: expressions over the sizes of its operands.

They are recorded while a model is exported (`kernelgraph.programs.export_ops`). After that they can
be computed anywhere, without the layer and the kernel. As JSON an expression is

- a number;
- ``["operand", i, d]``: size ``d`` of operand ``i``; for an operand that is a number, ``d`` is 0;
- ``["new", k]``: the ``k``-th size of the call that depends on values;
- ``[function, *expressions]``, where the function is one of `FUNCTIONS`.
"""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Template
from kernelgraph.graph.infer import InferOutput, Order, OutputSpec, TensorSpec
from kernelgraph.programs.portable_json import Json, as_array, as_object, as_text, is_index, is_int

# --- expressions --------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[..., object]] = {
    "+": lambda *terms: functools.reduce(operator.add, terms),
    "*": lambda *terms: functools.reduce(operator.mul, terms),
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
    "max": lambda *terms: functools.reduce(torch.sym_max, terms),
    "min": lambda *terms: functools.reduce(torch.sym_min, terms),
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "and": lambda *parts: all(parts),
    "or": lambda *parts: any(parts),
    "not": operator.not_,
}


class SizeExpression(ABC):
    """A size, or a condition on sizes, in terms of a call's operands."""

    __slots__ = ()

    @abstractmethod
    def evaluate(self, operands: Sequence[object], new: dict[int, object]) -> object:
        """Return the value for ``operands``, whose sizes may be symbolic.

        Args:
            operands: The operands of the call.
            new: The sizes that depend on values, by number. A missing one is created and added.
        """

    @abstractmethod
    def to_json(self) -> Json:
        """Return the expression as JSON."""

    @property
    def depends_on_values(self) -> bool:
        """Whether a `NewSize` is in it."""
        return False


@dataclass(frozen=True, slots=True)
class Number(SizeExpression):
    """A constant."""

    value: int

    def evaluate(self, operands: Sequence[object], new: dict[int, object]) -> int:
        return self.value

    def to_json(self) -> Json:
        return self.value

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True)
class OperandSize(SizeExpression):
    """One size of an operand, or the value of an operand that is a number."""

    operand: int
    dim: int

    def evaluate(self, operands: Sequence[object], new: dict[int, object]) -> object:
        value = operands[self.operand]
        return value.shape[self.dim] if isinstance(value, Tensor) else value

    def to_json(self) -> Json:
        return ["operand", self.operand, self.dim]

    def __str__(self) -> str:
        return f"operand {self.operand}'s size {self.dim}"


@dataclass(frozen=True, slots=True)
class NewSize(SizeExpression):
    """A size that depends on values: each call has its own."""

    index: int

    def evaluate(self, operands: Sequence[object], new: dict[int, object]) -> object:
        if self.index not in new:
            with _torch.forgetting_unbacked_symbols():
                new[self.index] = torch.library.get_ctx().new_dynamic_size()
        return new[self.index]

    def to_json(self) -> Json:
        return ["new", self.index]

    @property
    def depends_on_values(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"u{self.index}"


@dataclass(frozen=True, slots=True)
class Operation(SizeExpression):
    """A function of `FUNCTIONS`, applied to expressions."""

    function: str
    parts: tuple[SizeExpression, ...]

    def evaluate(self, operands: Sequence[object], new: dict[int, object]) -> object:
        return FUNCTIONS[self.function](*(part.evaluate(operands, new) for part in self.parts))

    def to_json(self) -> Json:
        return [self.function, *(part.to_json() for part in self.parts)]

    @property
    def depends_on_values(self) -> bool:
        return any(part.depends_on_values for part in self.parts)

    def __str__(self) -> str:
        if self.function in ("max", "min", "not"):
            return f"{self.function}({', '.join(map(str, self.parts))})"
        return f" {self.function} ".join(
            f"({part})" if isinstance(part, Operation) else str(part) for part in self.parts
        )


def expression_from_json(data: Json) -> SizeExpression:
    """Return the expression from what `SizeExpression.to_json` returned.

    Raises:
        ValueError: If it is not such JSON.
    """
    if is_int(data):
        return Number(data)
    match data:
        case ["operand", operand, dim] if is_index(operand) and is_index(dim):
            return OperandSize(operand, dim)
        case ["new", index] if is_index(index):
            return NewSize(index)
        case [str(function), _, *_] if function in FUNCTIONS:
            return Operation(function, tuple(map(expression_from_json, as_array(data)[1:])))
    raise ValueError(f"{data!r} is no expression over sizes")


# --- the results of an op -----------------------------------------------------------------------


@dataclass(frozen=True)
class ResultSizes:
    """One result of an op."""

    size: tuple[SizeExpression, ...]
    dtype: torch.dtype
    device: str
    """The type of device."""
    order: Order = ()
    """The order of its dimensions in memory."""

    def to_json(self) -> Json:
        """Return the result as JSON."""
        dtype = str(self.dtype).removeprefix("torch.")
        made: list[Json] = [[size.to_json() for size in self.size], dtype, self.device]
        return [*made, list(self.order)] if self.order else made

    @classmethod
    def from_json(cls, data: Json) -> ResultSizes:
        """Return the result from what `to_json` returned.

        Raises:
            ValueError, RuntimeError: If it is not such JSON.
        """
        size, dtype_name, device, *order = as_array(data)
        dtype = getattr(torch, as_text(dtype_name), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{dtype_name!r} is no dtype")
        expressions = tuple(map(expression_from_json, as_array(size)))
        dims = tuple(dim for dim in (as_array(order[0]) if order else []) if is_index(dim))
        if order and (len(order) > 1 or sorted(dims) != [*range(len(expressions))]):
            raise ValueError(f"{order!r} is no order of {len(expressions)} dimensions")
        return cls(expressions, dtype, torch.device(as_text(device)).type, dims)


@dataclass(frozen=True)
class Sizes:
    """The sizes of all results of an op."""

    results: tuple[ResultSizes, ...]
    conditions: tuple[SizeExpression, ...]
    """The conditions on the operands under which the results have these sizes."""

    def __call__(self, operands: Sequence[object]) -> tuple[TensorSpec, ...]:
        """Return the specs of the results of a call with ``operands``.

        Raises:
            ValueError: If a condition is not met.
        """
        for condition in self.conditions:
            if not condition.evaluate(operands, {}):
                raise ValueError(
                    f"the sizes of the results are known only where {condition}, which is not so: "
                    "export the model with such sizes"
                )
        new: dict[int, object] = {}
        return tuple(
            TensorSpec(
                tuple(size.evaluate(operands, new) for size in result.size),
                result.dtype,
                _device_like(operands, result.device),
                result.order,
            )
            for result in self.results
        )

    def source(self, output: Template, written: tuple[int, ...]) -> InferOutput:
        """Return a function from operands to output specs, as
        `kernelgraph.graph.infer.infer_output` does.

        Args:
            output: The structure of the output.
            written: The operands that the kernel writes into.
        """
        fresh = any(size.depends_on_values for result in self.results for size in result.size)

        def infer(operands: Sequence[object]) -> OutputSpec:
            return OutputSpec(self(operands), output, written, "recorded", fresh)

        return infer

    def to_json(self) -> Json:
        """Return the sizes as JSON."""
        return {
            "results": [result.to_json() for result in self.results],
            "conditions": [condition.to_json() for condition in self.conditions],
        }

    @classmethod
    def from_json(cls, data: Json) -> Sizes:
        """Return the sizes from what `to_json` returned.

        Raises:
            ValueError, RuntimeError: If it is not such JSON.
            KeyError: If a part of it is missing.
        """
        parts = as_object(data)
        return cls(
            tuple(map(ResultSizes.from_json, as_array(parts["results"]))),
            tuple(map(expression_from_json, as_array(parts["conditions"]))),
        )


def _device_like(operands: Sequence[object], device_type: str) -> torch.device:
    """Return the device of the first operand on a device of this type. Of several such devices, the
    program decides which."""
    for value in operands:
        if isinstance(value, Tensor) and value.device.type == device_type:
            return value.device
    return torch.device(device_type)
