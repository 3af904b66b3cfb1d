"""The comparison of a trial: a kernel's results and gradients with those of the layer's reference.

Its methods return the error as text, such as ``the gradient of x is 2 times the layer's``; empty if
there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelgraph.graph.verify.deviation import all_agree, find_deviation
from kernelgraph.graph.verify.tolerance import EXACT, Closeness
from kernelgraph.graph.verify.trial_runs import CannotCompare, Run, TapedRun, Trial


@dataclass
class Comparison:
    """The runs of a kernel beside those of the layer's reference."""

    trial: Trial
    runs: Sequence[Run]
    """The kernel's runs, forward only."""
    references: Sequence[Run]
    """The reference's runs, with the same seeds."""
    allowed: Closeness
    """The deviation up to which floats are compared no further."""

    @functools.cached_property
    def in_float64(self) -> list[Run] | None:
        """The reference's runs in float64; None if it cannot run so."""
        try:
            return [self.trial.reference(seed, in_float64=True) for seed in self.trial.seeds]
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None

    def output_error(self) -> str:
        """Compare what the kernel returns with what the layer returns.

        Raises:
            CannotCompare: If the layer is random, or returns nothing finite.
        """
        for run, reference in zip(self.runs, self.references, strict=True):
            if mismatch := _mismatch(run, reference):
                return mismatch
        errors, finite = [], []
        several = len(self.references[0].results) > 1
        for k, result in enumerate(self.references[0].results):
            made = [run.results[k] for run in self.runs]
            wanted = [run.results[k] for run in self.references]
            inexact = result.is_floating_point() or result.is_complex()
            if inexact:
                finite.append(_any_finite(wanted))
            allowed = self.allowed if inexact else EXACT
            exact_results = functools.partial(self._results_in_float64, k)
            if deviation := find_deviation(made, wanted, allowed, exact_results):
                errors.append(f"result {k} {deviation}" if several else f"it {deviation}")
        if finite and not any(finite):
            raise CannotCompare("nothing that the layer returns for made-up inputs is finite")
        if errors and self._is_random():
            raise CannotCompare("the layer is random, and the kernel draws other numbers")
        return _first_of(errors)

    def gradient_error(self, hidden_saves: bool) -> str:
        """Compare the kernel's gradients with those of the layer.

        Args:
            hidden_saves: Whether the kernel receives copies and returns copies.

        Raises:
            CannotCompare: If the layer has no gradient, or no finite one.
        """
        if not any(self.references[0].flows):
            raise CannotCompare("no gradient flows through what the layer returns")
        gradients: list[list[Tensor | None]] = []
        for seed, run in zip(self.trial.seeds, self.runs, strict=True):
            with self.trial.samples.apart(0):
                taped_run = TapedRun(self.trial, seed, hidden_saves=hidden_saves)
                if not all_agree(taped_run.results, run.results, self.allowed):
                    return "it returns something else where gradients are wanted"
                gradients.append(taped_run.gradients())
        errors, finite = [], []
        for i, name in enumerate(self.trial.names):
            made, wanted = self._pairs([run[i] for run in gradients], i)
            finite.append(not wanted or _any_finite(wanted))
            exact_gradients = functools.partial(self._gradients_in_float64, i)
            if deviation := find_deviation(made, wanted, self.allowed, exact_gradients):
                missing = all(run[i] is None for run in gradients)
                errors.append(f"the gradient of {name} {'is missing' if missing else deviation}")
        if not any(finite):
            raise CannotCompare("no gradient of the layer is finite for made-up inputs")
        return _first_of(errors)

    def _pairs(
        self, made: Sequence[Tensor | None], number: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The kernel's and the layer's gradients of one operand, of the runs that have any; zeros
        where only one of them has none."""
        ours, theirs = [], []
        for one, run in zip(made, self.references, strict=True):
            other = run.gradients[number]
            if one is None and other is not None:
                one = torch.zeros_like(other)
            if one is not None:
                ours.append(one)
                theirs.append(torch.zeros_like(one) if other is None else other)
        return ours, theirs

    def _results_in_float64(self, number: int) -> list[Tensor] | None:
        if self.in_float64 is None:
            return None
        return [run.results[number] for run in self.in_float64]

    def _gradients_in_float64(self, number: int) -> list[Tensor] | None:
        gradients = [run.gradients[number] for run in self.in_float64 or ()]
        found = [gradient for gradient in gradients if gradient is not None]
        return found if found and len(found) == len(gradients) else None

    def _is_random(self) -> bool:
        other = self.trial.reference(0, draw=1)
        return not all_agree(other.results, self.references[0].results, self.allowed)


def _mismatch(run: Run, reference: Run) -> str:
    if run.template != reference.template:
        kernels, layers = run.template.describe(), reference.template.describe()
        return f"it returned {kernels}, and the layer {layers}"
    for made, wanted in zip(run.results, reference.results, strict=True):
        if (found := _properties(made)) != (expected := _properties(wanted)):
            return f"it returned {found}, and the layer {expected}"
    return ""


def _properties(tensor: Tensor) -> str:
    return f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device.type}"


def _any_finite(tensors: Sequence[Tensor]) -> bool:
    return any(bool(tensor.isfinite().any()) for tensor in tensors)


def _first_of(errors: Sequence[str]) -> str:
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    return "; ".join(errors[:3]) + more
