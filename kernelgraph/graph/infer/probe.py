"""Infers shapes by running a forward on real tensors, where it does not run on fake ones.

The forward, that of the reference or else of the kernel, gets sample inputs like the operands of
the call, but small:

1. The sizes of a call are numbers and expressions over symbols. A number stays: it usually is the
   size of a weight, and a kernel may be built for it. A symbol that equals, in the traced call,
   such a number or another symbol is tied to it, and the graph gets a guard for that, as Dynamo
   does for sizes that are equal when it first sees them. A native kernel with sizes that do not
   fit together may read beyond its tensors. (A kernel that checks nothing and needs another
   relation between two dynamic sizes needs a ``fake``.)
2. The forward runs at a first choice of values for the symbols, and again with other values in the
   tensors; then with each symbol changed alone, and with all of them changed at once. Where it
   refuses such sizes, multiples of the call's own sizes are tried: it may need multiples of its
   block size.
3. Each size of each result must be a constant, a constant times some of the call's symbolic sizes,
   or their sum plus a constant, in every run (`explain`). The run with all symbols changed is not
   used to find the formula; it tests it.

A result that fits no such formula has an unknown shape. One that fits by chance (a kernel that pads
to a block far larger than the sizes that were tried) is found when the op checks its result, at
the first call of each size.
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
from kernelgraph.graph.calls import Runner, UnsupportedValue
from kernelgraph.graph.infer import sample_inputs
from kernelgraph.graph.infer.output_specs import OutputSpec, TensorSpec, UnknownShape, observe

# --- formulas ---------------------------------------------------------------------------------


class Formula(NamedTuple):
    """A size of a result as a function of the sizes of a call."""

    kind: str
    """``product`` or ``sum``, of the terms and the constant."""
    terms: tuple[int, ...]
    """The numbers of the call's sizes that are terms."""
    constant: int

    def __call__(self, sizes: Sequence[Any]) -> Any:
        """Return the size in a call with these ``sizes``, which may be symbolic."""
        terms = (sizes[i] for i in self.terms)
        if self.kind == "product":
            return math.prod(terms, start=self.constant)
        return sum(terms, start=self.constant)


_MOST_TERMS = 4


def explain(
    values: Sequence[int], runs: Sequence[Sequence[int]], terms: Sequence[int]
) -> Formula | None:
    """Find the simplest formula that gives each of ``values`` in its run, or None.

    Formulas with fewer terms come first, and a product before a sum. The constant is computed from
    the first run.

    Args:
        values: One size of a result, in each run.
        runs: The sizes of the call, in each run.
        terms: The numbers of the call's sizes that may be terms.
    """
    for count in range(min(len(terms), _MOST_TERMS) + 1):
        for chosen in itertools.combinations(terms, count):
            for formula in _candidates(chosen, values[0], runs[0]):
                if all(formula(run) == value for run, value in zip(runs, values, strict=True)):
                    return formula
    return None


def _candidates(chosen: tuple[int, ...], value: int, sizes: Sequence[int]) -> Iterator[Formula]:
    product = math.prod(sizes[i] for i in chosen)
    if product and value % product == 0:
        yield Formula("product", chosen, value // product)
    yield Formula("sum", chosen, value - sum(sizes[i] for i in chosen))


# --- the shape function -----------------------------------------------------------------------


class _Explained(NamedTuple):
    """The formulas for calls with some sizes."""

    sizes: tuple[Any, ...]
    """Numbers, and expressions that stand for any number."""
    results: tuple[tuple[tuple[Formula, ...], TensorSpec], ...]
    """The formulas for the sizes of each result, and the result of one run."""
    run: OutputSpec
    """The output of one run, with all that was written in any."""

    def fits(self, sizes: Sequence[object]) -> bool:
        """Whether ``sizes`` have the same numbers and the same relations between expressions."""
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

    def spec(self, sizes: Sequence[Any]) -> OutputSpec:
        """Return the spec of the output of a call with these sizes."""
        results = tuple(
            spec._replace(shape=tuple(formula(sizes) for formula in formulas))
            for formulas, spec in self.results
        )
        return self.run._replace(results=results)


class Probe:
    """Infers the output of calls with one signature by running a forward on real tensors.

    Args:
        runner: Runs the forward, of the reference or of the kernel.
        source: The ``source`` of the specs.
    """

    def __init__(self, runner: Runner, source: str) -> None:
        self._runner = runner
        self._source = source
        self._known: dict[Any, _Explained] = {}

    def __call__(self, operands: Sequence[object]) -> OutputSpec:
        """Return the spec of a call's output; the values of ``operands`` are not used.

        Raises:
            UnknownShape: If no formula explains a size of a result.
            UnsupportedValue: If the kernel does something that no op can do.
            Exception: Whatever the kernel raises, where it raises at all sizes that were tried.
        """
        sizes = _sizes(operands)
        expressions = tuple(map(_torch.expression, sizes))
        # With the Python types, since 1 and 1.0 are equal.
        form = tuple(map(_form_of, operands))
        explained = self._known.get((form, expressions)) or next(
            (e for (f, _), e in tuple(self._known.items()) if f == form and e.fits(expressions)),
            None,
        )
        if explained is None:
            explained = self._probe(operands, sizes, expressions)
            remember(self._known, (form, expressions), explained)
        return explained.spec(sizes)

    def _probe(
        self, operands: Sequence[object], sizes: Sequence[object], expressions: Sequence[object]
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
        self,
        operands: Sequence[object],
        free: Mapping[object, int | None],
        ties: Mapping[object, Any],
    ) -> tuple[list[dict[object, int]], list[OutputSpec]]:
        """Run the kernel at the first choice of sizes that it accepts.

        Returns:
            The values of the symbols in each run, and the output of each run.
        """
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

    def _run(
        self, operands: Sequence[object], values: Mapping[object, int], seed: int
    ) -> OutputSpec:
        with sample_inputs.apart(operands):
            forms = sample_inputs.forms(operands, lambda n: _torch.evaluate(n, values))
            spec, _ = observe(self._runner, sample_inputs.make(forms, seed))
            return spec._replace(source=self._source)


def _form_of(value: object) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.device
    return int if isinstance(value, torch.SymInt) else type(value)


def _sizes(operands: Sequence[object]) -> tuple[object, ...]:
    """Return the sizes of tensors, and numbers."""
    return tuple(n for v in operands for n in (tuple(v.shape) if isinstance(v, Tensor) else (v,)))


def _ties(hints: Mapping[object, int | None], numbers: set[int]) -> dict[object, object]:
    """Return the number or earlier symbol that each symbol equals in the traced call, if any."""
    ties: dict[object, object] = {}
    first: dict[int, object] = {}
    for symbol, hint in hints.items():
        if hint in numbers:
            ties[symbol] = hint
        elif hint is not None and first.setdefault(hint, symbol) is not symbol:
            ties[symbol] = first[hint]
    return ties


# Distinct primes, so that products and sums of a few of them differ. Those in the second row are
# larger than small blocks, to which a kernel may round up.
_FIRST = (3, 5, 7, 11, 19, 29, 37, 43)
_ALONE = (67, 71, 73, 79, 83, 89, 97, 101)
_TOGETHER = (13, 17, 23, 31, 41, 47, 53, 59)


def _choices(hints: Sequence[int | None]) -> list[list[list[int]]]:
    """Return the choices of values for symbols whose values in the traced call are ``hints``."""
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


def _substituted(expression: Any, ties: Mapping[Any, object]) -> object:
    if not isinstance(expression, _torch.Expression):
        return expression
    expression = expression.xreplace(dict(ties))
    # A lone symbol that is tied to a number becomes a Python int.
    return int(expression) if isinstance(expression, int) or expression.is_number else expression


def _explained(
    tied: Sequence[object], sizes: Sequence[Sequence[int]], runs: Sequence[OutputSpec]
) -> _Explained:
    """Find the formulas that explain ``runs``, in which the call's sizes were ``sizes``."""
    one = runs[0]
    for other in runs[1:]:
        if _structure(other) != _structure(one):
            raise UnknownShape(
                "what it returns is another structure, dtype or number of dimensions for other "
                "inputs"
            )
    terms = [i for i, e in enumerate(tied) if isinstance(e, _torch.Expression)]
    terms = [i for i in terms if tied.index(tied[i]) == i]
    results = []
    for number, spec in enumerate(one.results):
        formulas = []
        for dim in range(len(spec.shape)):
            values = [run.results[number].shape[dim] for run in runs]
            formula = explain(values, sizes, terms)
            if formula is None:
                raise UnknownShape(
                    f"dimension {dim} of result {number} was {', '.join(map(str, values))} in "
                    f"{len(runs)} runs, which the sizes of its inputs do not explain"
                )
            formulas.append(formula)
        results.append((tuple(formulas), spec))
    written = tuple(sorted({i for run in runs for i in run.written}))
    no_op = next((run.no_op for run in runs if run.no_op), "")
    return _Explained(tuple(tied), tuple(results), one._replace(written=written, no_op=no_op))


def _structure(spec: OutputSpec) -> object:
    results = [(len(r.shape), r.dtype, r.device, r.order) for r in spec.results]
    return spec.output, results, spec.aliases
