"""The examination of a kernel's own backward: how it has to be run, and whether it is reliable.

A compiled graph does with a backward what autograd alone does not: it passes copies of saved
operands and results, runs the backward again for a retained graph, has overwritten operands and
results by then, and passes gradients of any layout. `examine_own_backward` does each of these to a
kernel and compares the gradients with those of its first run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kernelgraph.graph.gradients import Overwrites, OwnBackward, Source
from kernelgraph.graph.infer import same_bits
from kernelgraph.graph.verify.deviation import all_agree
from kernelgraph.graph.verify.tolerance import Closeness
from kernelgraph.graph.verify.trial_runs import TapedRun, Trial
from kernelgraph.report import error_text


class UnusableBackward(Exception):
    """The reason why a kernel's own backward may not be used."""


class NoBackward(UnusableBackward):
    """The kernel has no backward."""


class KernelRaised(UnusableBackward):
    """The kernel raised, possibly only at these sizes or in this environment."""


Gradients: TypeAlias = "Sequence[Tensor | None]"
"""Gradients of results or of operands; None where there is none."""


class Examined(NamedTuple):
    """A kernel's own backward that may be used."""

    own: OwnBackward
    contiguous: bool
    """Whether it is right only for incoming gradients that are contiguous."""


def examine_own_backward(trial: Trial, allowed: Closeness) -> Examined:
    """Find out how a kernel's own backward has to be run.

    A kernel that fails the examination is examined again with copies of its operands and results:
    it may keep them where no saved-tensor hook sees them.

    Args:
        trial: The trial.
        allowed: The deviation up to which gradients are the same.

    Raises:
        UnusableBackward: If there is no backward, or if its gradients depend on how it is run.
    """
    try:
        return _Examination(trial, allowed, hidden_saves=False).run()
    except (NoBackward, torch.OutOfMemoryError):
        raise
    except Exception:
        try:
            return _Examination(trial, allowed, hidden_saves=True).run()
        except (UnusableBackward, torch.OutOfMemoryError):
            raise
        except Exception as error:
            what = f"where gradients are wanted it raised {error_text(error)}"
            raise KernelRaised(what) from error


@dataclass
class _Examination:
    """Runs of a kernel's own backward, all of which must give the same gradients.

    `run` says in which order. Each method that follows it makes runs of its own, which it compares
    with the ``expected`` gradients of the first.
    """

    trial: Trial
    allowed: Closeness
    hidden_saves: bool
    """Whether the kernel receives copies and returns copies."""

    def run(self) -> Examined:
        """Make all runs.

        Raises:
            UnusableBackward: If the backward may not be used.
            Exception: If the kernel raises.
        """
        with self.trial.samples.apart(0):
            run = self._taped_run()
            if run.written:
                raise UnusableBackward(f"it writes into {', '.join(run.written)}")
            if not any(run.flows):
                raise NoBackward("it has no backward: no gradient flows through what it returns")
            grads, saved = run.incoming(), run.saved()
            expected = run.gradients(grads, saved)
            overwrites = _overwrites(run, grads, saved)
            again = _attempt(run.gradients)
        runs_again = again is not None and self._agree(again, expected)
        if not runs_again and self._runs_again_with_copies(expected):
            overwrites = overwrites._replace(private=True)
        self._check_overwritten(frozenset(run.tape.seen), expected)
        sources = tuple(sorted(run.tape.seen))
        uses_autograd = not self._runs_below_autograd(expected)
        own = OwnBackward(sources, run.flows, self.hidden_saves, overwrites, uses_autograd)
        return Examined(own, contiguous=not self._takes_any_layout(expected))

    def _taped_run(self, sources: frozenset[Source] | None = None) -> TapedRun:
        return TapedRun(self.trial, 0, hidden_saves=self.hidden_saves, sources=sources)

    def _agree(self, made: Gradients, expected: Gradients) -> bool:
        return all_agree(made, expected, self.allowed)

    def _runs_again_with_copies(self, expected: Gradients) -> bool:
        """Whether the backward can run twice if it receives copies of the kernel's own tensors.

        A backward that still raises in the second run is single-use by design, which is allowed.

        Raises:
            UnusableBackward: If it gives other gradients the second time even so.
        """
        with self.trial.samples.apart(0):
            run = self._taped_run()
            once = run.gradients(copied=True)
            twice = _attempt(functools.partial(run.gradients, copied=True))
        if twice is None:
            return False
        if not (self._agree(once, expected) and self._agree(twice, expected)):
            raise UnusableBackward("its backward gives other gradients when it is run again")
        return True

    def _check_overwritten(self, sources: frozenset[Source], expected: Gradients) -> None:
        """Check that the gradients do not depend on memory that a compiler may have reused.

        Raises:
            UnusableBackward: If they do.
        """
        with self.trial.samples.apart(0):
            run = self._taped_run(sources)
            saved = run.saved()
            run.overwrite()
            if not self._agree(run.gradients(saved=saved), expected):
                raise UnusableBackward(
                    "its backward reads an input or output after its memory may have been reused"
                )

    def _runs_below_autograd(self, expected: Gradients) -> bool:
        """Whether the backward can run where autograd records nothing."""
        with self.trial.samples.apart(0):
            run = self._taped_run()
            made = _attempt(functools.partial(run.gradients, recording=False))
        return made is not None and self._agree(made, expected)

    def _takes_any_layout(self, expected: Gradients) -> bool:
        """Whether the incoming gradients may be other than contiguous."""
        for lay_out in (_with_gaps, _in_longer_rows):
            with self.trial.samples.apart(0):
                run = self._taped_run()
                grads = [None if g is None else lay_out(g) for g in run.incoming()]
                made = _attempt(functools.partial(run.gradients, grads))
            if made is None or not self._agree(made, expected):
                return False
        return True


def _overwrites(run: TapedRun, grads: Gradients, saved: Mapping[Source, Tensor]) -> Overwrites:
    """Find out what a backward wrote into, of the gradients and saved tensors that it received."""
    written = [
        k
        for k, (now, before) in enumerate(zip(grads, run.incoming(), strict=True))
        if now is not None and before is not None and not same_bits(now, before)
    ]
    before_it = run.saved()
    sources = [s for s in sorted(before_it) if not same_bits(saved[s], before_it[s])]
    return Overwrites(tuple(written), tuple(sources))


def _attempt(run: Callable[[], list[Tensor | None]]) -> list[Tensor | None] | None:
    """Return what ``run`` returns; None if it raises."""
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


# A kernel that takes these for contiguous stays within their memory, and finds other values there.


def _with_gaps(gradient: Tensor) -> Tensor:
    return torch.stack([gradient, torch.ones_like(gradient)], -1)[..., 0]


def _in_longer_rows(gradient: Tensor) -> Tensor:
    if gradient.dim() == 0:
        return gradient
    return torch.cat([gradient, torch.ones_like(gradient)], -1)[..., : gradient.shape[-1]]
