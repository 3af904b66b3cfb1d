"""The sizes of an op's results as data: expressions over the sizes of its operands.

They are found by running the layer or its kernel once on fakes whose sizes are symbols, and can
then be told anywhere, without either. As JSON an expression is

- a number;
- ``["operand", i, d]``: size ``d`` of operand ``i``, or with 0 an operand that is a number;
- ``["new", k]``: a size that depends on values, the ``k``-th of the call's;
- ``[function, *expressions]``, with one of `_FUNCTIONS`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Template
from kernelgraph.graph.infer import OutputSpec, Source, TensorSpec, UnknownShape

Expression = Any
"""As JSON."""


class _NotData(Exception):
    """An expression has no form as data."""


_FUNCTIONS: dict[str, Callable[..., Any]] = {
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
_SPELLED = {
    "Add": "+",
    "Mul": "*",
    "FloorDiv": "//",
    "CleanDiv": "//",
    "Mod": "%",
    "PythonMod": "%",
    "Pow": "**",
    "PowByNatural": "**",
    "Max": "max",
    "Min": "min",
    "Equality": "==",
    "Unequality": "!=",
    "StrictLessThan": "<",
    "LessThan": "<=",
    "StrictGreaterThan": ">",
    "GreaterThan": ">=",
    "And": "and",
    "Or": "or",
    "Not": "not",
}
"""sympy's names for them, and torch's."""


@dataclass(frozen=True)
class ResultSizes:
    """One result of an op."""

    size: tuple[Expression, ...]
    dtype: torch.dtype
    device: str
    """The type."""


@dataclass(frozen=True)
class Sizes:
    """The results of an op."""

    results: tuple[ResultSizes, ...]
    conditions: tuple[Expression, ...]
    """What must be true of the operands for this to be so."""

    def __call__(self, operands: Sequence[Any]) -> tuple[TensorSpec, ...]:
        """The results of a call with ``operands``.

        Raises:
            ValueError: A condition is not met.
        """
        for condition in self.conditions:
            if not evaluate(condition, operands, {}):
                raise ValueError(
                    f"the sizes of the results are told where {text(condition)}, which is not so: "
                    "export the model with such sizes"
                )
        new: dict[int, Any] = {}
        return tuple(
            TensorSpec(
                tuple(evaluate(size, operands, new) for size in result.size),
                result.dtype,
                _device(result.device, operands),
            )
            for result in self.results
        )

    def source(self, output: Template, written: tuple[int, ...]) -> Source:
        """These sizes in the form that `kernelgraph.graph.infer.shapes.infer_output` gives."""

        def tell(operands: Sequence[Any]) -> OutputSpec:
            results = self(operands)
            fresh = any(_has_new(size) for result in self.results for size in result.size)
            return OutputSpec(results, output, written, "recorded", fresh)

        return tell

    def to_json(self) -> Any:
        """As JSON."""
        results = [
            [list(r.size), str(r.dtype).removeprefix("torch."), r.device] for r in self.results
        ]
        return {"results": results, "conditions": list(self.conditions)}

    @classmethod
    def from_json(cls, data: Any) -> Sizes:
        """The inverse of `to_json`.

        Raises:
            ValueError: It is not such JSON.
        """
        results = []
        for size, dtype, device in data["results"]:
            known = getattr(torch, dtype, None)
            if not isinstance(known, torch.dtype):
                raise ValueError(f"{dtype!r} is no dtype")
            results.append(
                ResultSizes(tuple(map(_checked, size)), known, torch.device(device).type)
            )
        return cls(tuple(results), tuple(map(_checked, data["conditions"])))


def _device(kind: str, operands: Sequence[Any]) -> torch.device:
    """That of the first operand on such a device: which of several it is, the program decides."""
    for value in operands:
        if isinstance(value, Tensor) and value.device.type == kind:
            return value.device
    return torch.device(kind)


def _has_new(expression: Expression) -> bool:
    if not isinstance(expression, list):
        return False
    return expression[0] == "new" or any(map(_has_new, expression[1:]))


# --- expressions --------------------------------------------------------------------------------


def evaluate(expression: Expression, operands: Sequence[Any], new: dict[int, Any]) -> Any:
    """What an expression is for ``operands``, which may be symbolic.

    Args:
        expression: The expression.
        operands: The operands.
        new: The sizes so far that depend on values; more are put there, as an op's fake makes them.
    """
    if not isinstance(expression, list):
        return expression
    function, *rest = expression
    if function == "operand":
        value = operands[rest[0]]
        return value.shape[rest[1]] if isinstance(value, Tensor) else value
    if function == "new":
        if rest[0] not in new:
            with _torch.forgetting_unbacked_symbols():
                new[rest[0]] = torch.library.get_ctx().new_dynamic_size()
        return new[rest[0]]
    return _FUNCTIONS[function](*(evaluate(part, operands, new) for part in rest))


def text(expression: Expression) -> str:
    """An expression for people."""
    if not isinstance(expression, list):
        return str(expression)
    function, *rest = expression
    if function == "operand":
        return f"operand {rest[0]}'s size {rest[1]}"
    if function == "new":
        return f"u{rest[0]}"
    if function in ("max", "min", "not"):
        return f"{function}({', '.join(map(text, rest))})"
    return f" {function} ".join(
        f"({text(part)})" if isinstance(part, list) and part[0] in _FUNCTIONS else text(part)
        for part in rest
    )


def _checked(expression: Any) -> Expression:
    if type(expression) is int:
        return expression
    if isinstance(expression, list) and len(expression) > 1:
        function, *rest = expression
        if function in ("operand", "new") and all(type(n) is int and n >= 0 for n in rest):
            return expression
        if isinstance(function, str) and function in _FUNCTIONS:
            return [function, *map(_checked, rest)]
    raise ValueError(f"{expression!r} is no expression over sizes")


def _as_data(expression: Any, places: Mapping[Any, tuple[int, int]], new: dict[Any, int]) -> Any:
    """A size, or a relation between sizes, in terms of operands.

    Raises:
        _NotData: There is no such form of it.
    """
    if not isinstance(expression, (_torch.Expression, _torch.Relation)):
        return int(expression)
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        if expression in places:
            return ["operand", *places[expression]]
        return ["new", new.setdefault(expression, len(new))]
    name = type(expression).__name__
    if name not in _SPELLED:
        raise _NotData(f"{expression} has no form as data")
    return [_SPELLED[name], *(_as_data(part, places, new) for part in expression.args)]


# --- finding them -------------------------------------------------------------------------------


def record(
    source: Source, operands: Sequence[Any], *, everything: bool
) -> tuple[Sizes, OutputSpec]:
    """The sizes of the results of calls like that with ``operands``.

    Args:
        source: What tells the results of a call.
        operands: Those of a call.
        everything: Whether each size of each operand may be another one; else only those that are
            symbolic in this call.

    Returns:
        The sizes, and what was told of a call with symbols in their place.

    Raises:
        UnknownShape: They have no form as data.
        Exception: What ``source`` raises.
    """
    symbolic, places, env = _torch.symbolic_like(operands, everything)
    told = source(symbolic)
    new: dict[Any, int] = {}
    try:
        results = tuple(
            ResultSizes(
                tuple(_as_data(_torch.expression(size), places, new) for size in result.shape),
                result.dtype,
                result.device.type,
            )
            for result in told.results
        )
        taken = [part for guard in _torch.guards_of(env) for part in _conjuncts(guard)]
        conditions = [_as_data(guard, places, {}) for guard in taken if _matters(guard)]
    except _NotData as error:
        raise UnknownShape(f"the size of a result: {error}") from None
    conditions += _as_they_are(operands, everything)
    return Sizes(results, tuple(_distinct(conditions))), told


def _distinct(conditions: Sequence[Expression]) -> list[Expression]:
    return [c for i, c in enumerate(conditions) if c not in conditions[:i]]


def _conjuncts(guard: Any) -> Sequence[Any]:
    return guard.args if type(guard).__name__ == "And" else (guard,)


def _matters(guard: Any) -> bool:
    """Whether a guard can make the sizes of the results other ones.

    Fakes guard much that cannot: that a size is not 0 or 1, and of strides, which are products of
    sizes, how they lie to each other. What is left out by mistake is found when a result is not of
    the size that was told.
    """
    if type(guard).__name__ == "Equality":
        return True
    if not isinstance(guard, _torch.Relation) or any(part.is_Mul for part in guard.args):
        return False
    return not all(part.is_Symbol or part in (0, 1, 2) for part in guard.args) or not any(
        part.is_Integer for part in guard.args
    )


def _as_they_are(operands: Sequence[Any], everything: bool) -> list[Expression]:
    """Conditions that what was no symbol is what it was."""
    found: list[Expression] = []
    for i, value in enumerate(operands):
        if isinstance(value, Tensor) and not everything:
            sizes = enumerate(value.shape)
            found += [["==", ["operand", i, d], n] for d, n in sizes if type(n) is int]
        elif type(value) is int:
            found.append(["==", ["operand", i, 0], value])
    return found
