"""A shape function found by running a kernel for real: where nothing runs on fake tensors.

The kernel is given operands that are made up (`samples`), like those of the call but small:

1. The sizes of a call are numbers and expressions in symbols. A number stays what it is: it is a
   weight's, most often, and a kernel may be built for it. A symbol that is equal, in the call
   that is traced, to such a number or to another symbol is taken for the same, and the graph is
   guarded on that, as Dynamo itself does with sizes that are equal when it first sees them: a
   native kernel given sizes that do not fit together may read beyond its tensors. (One that
   checks nothing, and wants of two dynamic sizes other than that they be equal, needs a ``fake``.)
2. The kernel is run at a first choice of the symbols' values, and once more with other values in
   the tensors; then with each symbol changed alone, and with all of them changed at once.
   Expressions follow their symbols. Where it refuses such sizes, multiples of the call's own
   sizes are tried: it may want multiples of its block, say.
3. Each size of each result must be a constant, a product of some of the call's symbolic sizes by
   a constant, or their sum and a constant, in every run (`explain`). The run with all changed
   takes no part in finding the explanation: it is the test of it.

What fits no such formula has no shape function that could be told this way. What fits by chance
(a kernel that pads to a block far larger than the sizes that were tried) is found out when the
op's result is checked, at the first call of each size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraph.cache import remember
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Runner, Template, UnsupportedValue
from kernelgraph.graph.infer import sample_inputs
from kernelgraph.graph.infer.output_specs import OutputSpec, TensorSpec, UnknownShape, observe

# --- explanations -----------------------------------------------------------------------------


class Formula(NamedTuple):
    """A size of a result, in terms of the sizes of a call."""

    kind: str
    """``product``: that of the terms and the constant; ``sum``: likewise."""
    terms: tuple[int, ...]
    """Which of the call's sizes."""
    constant: int

    def __call__(self, sizes: Sequence[Any]) -> Any:
        """The size in a call with these ``sizes``; they may be symbolic."""
        terms = (sizes[i] for i in self.terms)
        if self.kind == "product":
            return math.prod(terms, start=self.constant)
        return sum(terms, start=self.constant)


_MOST_TERMS = 4


def explain(
    values: Sequence[int], runs: Sequence[Sequence[int]], terms: Sequence[int]
) -> Formula | None:
    """The simplest formula that gives each of ``values`` in its run; None if there is none.

    Args:
        values: What one size of a result was in each run.
        runs: What the sizes of the call were in each run.
        terms: Which of the call's sizes may be in the formula.

    Fewest terms first, a product before a sum. The constant is read off the first run.
    """
    for count in range(min(len(terms), _MOST_TERMS) + 1):
        for chosen in itertools.combinations(terms, count):
            for formula in _read_off(chosen, values[0], runs[0]):
                if all(formula(run) == value for run, value in zip(runs, values, strict=True)):
                    return formula
    return None


def _read_off(chosen: tuple[int, ...], value: int, sizes: Sequence[int]) -> Iterator[Formula]:
    product = math.prod(sizes[i] for i in chosen)
    if product and value % product == 0:
        yield Formula("product", chosen, value // product)
    yield Formula("sum", chosen, value - sum(sizes[i] for i in chosen))


# --- the shape function -----------------------------------------------------------------------


class _Explained(NamedTuple):
    """What is known of the calls with some sizes."""

    sizes: tuple[Any, ...]
    """Numbers, and expressions that stand for any."""
    results: tuple[tuple[tuple[Formula, ...], torch.dtype, torch.device], ...]
    output: Template
    written: tuple[int, ...]

    def fits(self, sizes: Sequence[Any]) -> bool:
        """Whether ``sizes`` are some of those, which are in the same relations."""
        known: dict[Any, Any] = {}
        for mine, given in zip(self.sizes, sizes, strict=True):
            if not isinstance(mine, _torch.Expression):
                if mine != given:
                    return False
            elif known.setdefault(mine, given) != given:
                return False
        return all(
            expr.is_Symbol
            or not expr.free_symbols <= known.keys()
            or expr.xreplace({s: known[s] for s in expr.free_symbols}) == given
            for expr, given in known.items()
        )

    def told(self, sizes: Sequence[Any]) -> OutputSpec:
        results = tuple(
            TensorSpec(tuple(formula(sizes) for formula in formulas), dtype, device)
            for formulas, dtype, device in self.results
        )
        return OutputSpec(results, self.output, self.written, "probe")


class Probe:
    """The shapes of what one form of call returns, by running the kernel for real."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._known: dict[Any, _Explained] = {}

    def __call__(self, operands: Sequence[Any]) -> OutputSpec:
        """What a call with ``operands`` returns; the values in them are never looked at.

        Raises:
            UnknownShape: If the sizes of the results cannot be explained.
            UnsupportedValue: If no op can do what the kernel does.
            Exception: What the kernel raises, where it raises at any sizes that were tried.
        """
        sizes = _sizes(operands)
        expressions = tuple(map(_torch.expression, sizes))
        # The values of Python's types too: 1 is not 1.0.
        form = tuple(map(_form_of, operands))
        explained = self._known.get((form, expressions)) or next(
            (e for (f, _), e in tuple(self._known.items()) if f == form and e.fits(expressions)),
            None,
        )
        if explained is None:
            explained = self._probe(operands, sizes, expressions)
            remember(self._known, (form, expressions), explained)
        return explained.told(sizes)

    def _probe(
        self, operands: Sequence[Any], sizes: Sequence[Any], expressions: Sequence[Any]
    ) -> _Explained:
        hints = _torch.hints(n for v in operands for n in sample_inputs.measures(v))
        ties = _ties(hints, {n for n in expressions if type(n) is int})
        free = {symbol: hint for symbol, hint in hints.items() if symbol not in ties}
        values, runs = self._runs(operands, free, ties)
        tied = [_substituted(e, ties) for e in expressions]
        explained = _explained(tied, [[_torch.evaluate(n, v) for n in sizes] for v in values], runs)
        symbolic = next((n for n in sizes if isinstance(n, torch.SymInt)), None)
        if symbolic is not None:
            for symbol, other in ties.items():
                _torch.guard_equal(symbolic, symbol, other)
        return explained

    def _runs(
        self, operands: Sequence[Any], free: Mapping[Any, int | None], ties: Mapping[Any, Any]
    ) -> tuple[list[dict[Any, int]], list[OutputSpec]]:
        """Values of the symbols, and what the kernel returned where they are these."""
        choices = _choices(list(free.values()))
        for choice in choices:
            values = []
            for numbers in choice:
                chosen = dict(zip(free, numbers, strict=True))
                values.append(chosen | {s: chosen.get(other, other) for s, other in ties.items()})
            try:
                return values, [self._run(operands, v, seed) for seed, v in enumerate(values)]
            except UnsupportedValue:
                raise
            except Exception:
                if choice is choices[-1]:
                    raise
        raise AssertionError("there is always a choice")

    def _run(self, operands: Sequence[Any], values: Mapping[Any, int], seed: int) -> OutputSpec:
        with sample_inputs.apart(operands):
            forms = sample_inputs.forms(operands, lambda n: _torch.evaluate(n, values))
            return observe(self._runner, sample_inputs.make(forms, seed))[0]


def _form_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.device
    return int if isinstance(value, torch.SymInt) else type(value)


def _sizes(operands: Sequence[Any]) -> tuple[Any, ...]:
    """All that shapes may depend on: the sizes of tensors, and numbers."""
    return tuple(n for v in operands for n in (tuple(v.shape) if isinstance(v, Tensor) else (v,)))


def _ties(hints: Mapping[Any, int | None], numbers: set[int]) -> dict[Any, Any]:
    """For each symbol that is equal to a number or to an earlier symbol, in the call, that one."""
    ties: dict[Any, Any] = {}
    first: dict[int, Any] = {}
    for symbol, hint in hints.items():
        if hint in numbers:
            ties[symbol] = hint
        elif hint is not None and first.setdefault(hint, symbol) is not symbol:
            ties[symbol] = first[hint]
    return ties


# Distinct primes: no product or sum of a few is another's. The second is beyond small blocks, to
# which a kernel may round up.
_FIRST = (3, 5, 7, 11, 19, 29, 37, 43)
_ALONE = (67, 71, 73, 79, 83, 89, 97, 101)
_TOGETHER = (13, 17, 23, 31, 41, 47, 53, 59)


def _choices(hints: Sequence[int | None]) -> list[list[list[int]]]:
    """Sets of values for symbols that are ``hints`` in the call: the one to try first, and next."""
    count = len(hints)
    if count == 0:
        return [[[], []]]
    if count > len(_FIRST):
        raise UnknownShape(f"{count} sizes are dynamic, and at most {len(_FIRST)} can be probed")
    own = [_FIRST[i] if hint is None else hint for i, hint in enumerate(hints)]
    return [
        _varied(_FIRST[:count], _ALONE[:count], _TOGETHER[:count]),
        _varied(own, [2 * n for n in own], [4 * n for n in own]),
    ]


def _varied(first: Sequence[int], alone: Sequence[int], together: Sequence[int]) -> list[list[int]]:
    singly = [[*first[:i], alone[i], *first[i + 1 :]] for i in range(len(first))]
    return [list(first), list(first), *singly, list(together)]


def _substituted(expression: Any, ties: Mapping[Any, Any]) -> Any:
    if not isinstance(expression, _torch.Expression):
        return expression
    expression = expression.xreplace(dict(ties))
    # Of a symbol alone it is what the symbol is tied to, which may be an int of Python's.
    return int(expression) if isinstance(expression, int) or expression.is_number else expression


def _explained(
    tied: Sequence[Any], sizes: Sequence[Sequence[int]], runs: Sequence[OutputSpec]
) -> _Explained:
    """What ``runs``, in which the call's sizes were ``sizes``, have in common."""
    one = runs[0]
    for other in runs[1:]:
        if _form(other) != _form(one):
            raise UnknownShape(
                "what it returns is another structure, dtype or number of dimensions for other "
                "inputs"
            )
    terms = [i for i, e in enumerate(tied) if isinstance(e, _torch.Expression)]
    terms = [i for i in terms if tied.index(tied[i]) == i]
    results = []
    for number, (shape, dtype, device) in enumerate(one.results):
        formulas = []
        for dim in range(len(shape)):
            values = [run.results[number].shape[dim] for run in runs]
            formula = explain(values, sizes, terms)
            if formula is None:
                raise UnknownShape(
                    f"dimension {dim} of result {number} was {', '.join(map(str, values))} in "
                    f"{len(runs)} runs, which the sizes of its inputs do not explain"
                )
            formulas.append(formula)
        results.append((tuple(formulas), dtype, device))
    written = tuple(sorted({i for run in runs for i in run.written}))
    return _Explained(tuple(tied), tuple(results), one.output, written)


def _form(told: OutputSpec) -> Any:
    return told.output, [(len(r.shape), r.dtype, r.device) for r in told.results]
