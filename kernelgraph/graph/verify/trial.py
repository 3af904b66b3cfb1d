"""Whether a kernel may train: a trial of its own backward, before anything is trained with it.

A kernel seldom says whether it has a backward; many have none, or a wrong one. So the first time
that a kernel would be used where gradients are wanted, it and the layer's reference are run for
real, forward and backward, on made-up operands (see `Operands`). These have the dtypes, strides and
broadcasting of the call and mostly small sizes, and the weights are the layer's own, disturbed.

The kernel runs on a `Tape`, as in a compiled graph, and its backward is treated as it is there:

1. It receives new copies of the operands and results that the forward saved. The run shows which
   these are, and which of them the backward writes into; of those it will receive copies.
2. It runs again on the same tape, as for a retained graph.
3. In another run the memory of operands and results is overwritten before it, since a compiler has
   other uses for that memory by then. A kernel whose gradients change keeps tensors where no
   saved-tensor hook sees them. Such a kernel is tried again with copies of its operands and
   results; if its gradients change even so, its backward may not be used.
4. It runs where autograd records nothing, as in calls that bypass autograd (see `bypass`).
5. In the last run the incoming gradients are not contiguous.

`judge` finds or makes the verdict, which is kept in the process and on disk (`kernelgraph.cache`);
`_judge_at_these_sizes` is the trial itself, step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from kernelgraph import cache
from kernelgraph.cache import remember
from kernelgraph.graph.calls import Call, UnsupportedValue
from kernelgraph.graph.infer import Operands
from kernelgraph.graph.verify.comparison import Comparison
from kernelgraph.graph.verify.own_backward import (
    KernelRaised,
    UnusableBackward,
    examine_own_backward,
)
from kernelgraph.graph.verify.tolerance import Closeness, closeness_of
from kernelgraph.graph.verify.trial_runs import CannotCompare, Run, Trial
from kernelgraph.graph.verify.verdict import Verdict
from kernelgraph.kernel import Kernel
from kernelgraph.keys import kernel_key, layer_key, software_versions, source_of
from kernelgraph.layers import Extensible
from kernelgraph.report import error_text

TRIAL_VERSION = "3"
"""The version of the trial: increase it whenever a trial may come to another verdict."""

_KIND = "verdicts"
_verdicts: dict[object, Verdict] = {}


def judge(
    layer: Extensible,
    module: nn.Module,
    kernel: Kernel,
    call: Call,
    operands: Sequence[object],
    wanted: Sequence[bool],
    *,
    compare: bool = True,
) -> Verdict:
    """Return whether ``kernel`` may train in a call of ``layer``, and how.

    Args:
        layer: The layer that it stands in for.
        module: The instance that is called; it has the weights.
        kernel: The kernel.
        call: The signature of the call.
        operands: Its operands. The values of tensors do not matter, and they may be fakes.
        wanted: For each operand, whether its gradient is wanted.
        compare: Whether the reference is run and the kernel compared with it. If not, a kernel is
            refused only if its backward is missing or cannot be run as a compiled graph does.
    """
    try:
        samples = Operands(call, operands, module, trial=True)
    except TypeError as error:
        return Verdict.incomparable(str(error))
    key = _key(layer, kernel, call, samples, wanted, compare)
    in_process = (key, kernel.layer, layer)
    if in_process in _verdicts:
        return _verdicts[in_process]
    source = source_of(layer, kernel)
    verdict = Verdict.from_json(cache.read(_KIND, f"{key} {source}")) if source else None
    if verdict is None:
        try:
            with call.program_data_kept(layer), samples.apart():
                trial = Trial(layer, kernel, call, samples, tuple(wanted))
                verdict, raised = _judge(trial, compare)
            # What raised may have missed something that is installed the next time.
            if source and not raised:
                cache.write(_KIND, f"{key} {source}", verdict.to_json())
        except torch.OutOfMemoryError as error:  # the next time there may be more
            verdict = Verdict.incomparable(error_text(error))
    remember(_verdicts, in_process, verdict)
    return verdict


def _key(
    layer: Extensible,
    kernel: Kernel,
    call: Call,
    samples: Operands,
    wanted: Sequence[bool],
    compare: bool,
) -> str:
    """Return text that is the same in every process in which the verdict is the same."""
    return repr(
        (
            (TRIAL_VERSION, *software_versions()),
            *kernel_key(kernel),
            layer_key(layer),
            call.describe(),
            samples.form,
            samples.devices,
            tuple(wanted),
            str(torch.get_default_dtype()),
            compare,
        )
    )


# --- the trial ----------------------------------------------------------------------------------


class _Outcome(NamedTuple):
    """A verdict at some sizes."""

    verdict: Verdict
    raised: bool = False
    """Whether the layer or the kernel raised, possibly only at these sizes."""


def _judge(trial: Trial, compare: bool) -> _Outcome:
    """Judge at small sizes, or at the call's own if the layer or the kernel raises there."""
    while True:
        outcome = _judge_with_tables(trial, compare)
        if not outcome.raised or not trial.samples.at_own_sizes():
            return outcome


def _judge_with_tables(trial: Trial, compare: bool) -> _Outcome:
    """Judge, and if the output is wrong, judge again with tables such as rotary embeddings have:
    a kernel may rely on their equal halves, which made-up ones do not have."""
    outcome = _judge_at_these_sizes(trial, compare)
    if outcome.verdict.output and (tables := trial.samples.rotary_tables(trial.wanted)):
        trial.samples.tables = tables
        with_tables = _judge_at_these_sizes(trial, compare)
        trial.samples.tables = ()
        if not with_tables.verdict.output:
            return with_tables
    return outcome


def _judge_at_these_sizes(trial: Trial, compare: bool) -> _Outcome:
    """Judge with the operands that ``trial.samples`` makes now; ``compare`` as for `judge`."""
    try:
        references = _run_reference(trial) if compare else []
        runs = _run_kernel(trial, trial.seeds if compare else [0])
        allowed = _closeness(trial, runs)
        comparison = Comparison(trial, runs, references, allowed)
        if compare and (error := comparison.output_error()):
            return _Outcome(Verdict(None, f"its output is wrong: {error}", error))
        own, contiguous = examine_own_backward(trial, allowed)
        if compare and (error := comparison.gradient_error(own.hidden_saves)):
            return _Outcome(Verdict(None, error))
        return _Outcome(Verdict(own, contiguous=contiguous))
    except CannotCompare as error:
        return _Outcome(Verdict.incomparable(str(error)), isinstance(error, _ReferenceRaised))
    except UnusableBackward as error:
        return _Outcome(Verdict(None, str(error)), isinstance(error, KernelRaised))


class _ReferenceRaised(CannotCompare):
    """The reference raised, possibly only at these sizes."""


def _run_reference(trial: Trial) -> list[Run]:
    samples = trial.samples
    try:
        samples.bounds = {}
        with samples.apart(0):
            samples.bounds = samples.index_bounds(trial.reference_runner)
        return [trial.reference(seed) for seed in trial.seeds]
    except (torch.OutOfMemoryError, CannotCompare):
        raise
    except UnsupportedValue as error:
        raise CannotCompare(str(error)) from error
    except Exception as error:
        raise _ReferenceRaised(f"the reference raised {error_text(error)}") from error


def _run_kernel(trial: Trial, seeds: Sequence[int]) -> list[Run]:
    try:
        return [trial.forward(seed) for seed in seeds]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise KernelRaised(f"it raised {error_text(error)}") from error


def _closeness(trial: Trial, runs: Sequence[Run]) -> Closeness:
    """The closeness for the dtypes of operands, results and autocast."""
    dtypes = [tensor.dtype for tensor in (*trial.samples.tensors, *runs[0].results)]
    autocast = trial.call.autocast
    return closeness_of([*dtypes, autocast[1]] if autocast else dtypes)
