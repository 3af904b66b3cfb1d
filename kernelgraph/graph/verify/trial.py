"""Whether a kernel may train: a trial of its own backward, before anything is trained with it.

Kernels say by silence that they have a backward, and many have none, or a wrong one. So the first
time that one would be used where gradients are wanted, it and the layer's reference are run for
real, forward and backward, on operands that are made up (`kernelgraph.graph.infer.operands`): of the
call's dtypes, strides and broadcasting, mostly small, with the layer's own weights, disturbed.

The kernel runs on a `Tape`, as in a compiled graph, and is treated as it is there:

1. The backward gets new copies of what the forward saved of operands and results. The run tells
   what that is, and what the backward writes into, which it then gets copies of.
2. The backward is run again on the same tape, as for a retained graph.
3. In another run the memory of operands and results is overwritten before the backward, since a
   compiler has other uses for it by then. A kernel whose gradients change keeps some of it where
   no hook sees it. It gets, and gives, copies; if that is no help, its backward is of no use.
4. In the last the incoming gradients are not contiguous.

The verdict is kept, in the process and on disk (`kernelgraph.cache`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernelgraph import cache
from kernelgraph.cache import remember
from kernelgraph.graph.calls import Call, UnsupportedValue
from kernelgraph.graph.gradients import Overwrites, OwnBackward, Source, SourceKind
from kernelgraph.graph.infer import Operands
from kernelgraph.graph.verify.own_backward import RaisedBackward, WrongBackward, alike, own_backward
from kernelgraph.graph.verify.tolerance import EXACTLY, Closeness, closeness, is_close
from kernelgraph.graph.verify.trial_runs import OnTape, Run, Trial, Untold
from kernelgraph.kernel import Kernel
from kernelgraph.keys import kernel_key, layer_key, source_of, versions
from kernelgraph.layers import Extensible
from kernelgraph.report import error_text

TRIAL_VERSION = "2"
"""Counted up whenever a trial may come to another verdict."""


class Verdict(NamedTuple):
    """What a trial has come to."""

    own: OwnBackward | None
    """What the kernel's own backward needs and does, where it may be used."""
    wrong: str = ""
    """Why it may not; empty where it may."""
    output: str = ""
    """How the kernel's output is not the layer's; empty where nothing is known of that. Then the
    kernel may train nothing at all."""
    contiguous: bool = False
    """Whether its backward is right only for incoming gradients that are contiguous."""


def judge(
    layer: Extensible,
    module: nn.Module,
    kernel: Kernel,
    call: Call,
    operands: Sequence[Any],
    wanted: Sequence[bool],
    *,
    compare: bool = True,
) -> Verdict:
    """Whether ``kernel`` may train in a call of ``layer``, and how.

    Args:
        layer: The layer that it stands in for.
        module: The instance that is called; it has the weights.
        kernel: The kernel.
        call: The form of the call.
        operands: Its operands; of tensors only the form counts, and they may be fakes.
        wanted: Of which operands gradients are wanted.
        compare: Whether the reference is run and the kernel compared with it. If not, only a
            backward that is missing is wrong.
    """
    try:
        maker = Operands(call, operands, module, trial=True)
    except TypeError as error:
        return _untold(str(error))
    key = _key(layer, kernel, call, maker, wanted, compare)
    known = (key, kernel.layer, layer)
    if known in _verdicts:
        return _verdicts[known]
    source = source_of(layer, kernel)
    verdict = _from_json(cache.read(_KIND, f"{key} {source}")) if source else None
    if verdict is None:
        try:
            with maker.apart():
                trial = Trial(layer, kernel, call, maker, tuple(wanted))
                verdict, ran = _judged(trial, compare)
            if source and ran:  # what raised may have wanted something that is not installed
                cache.write(_KIND, f"{key} {source}", _to_json(verdict))
        except torch.OutOfMemoryError as error:  # next time there may be more
            verdict = _untold(error_text(error))
    remember(_verdicts, known, verdict)
    return verdict


def _judged(trial: Trial, compare: bool) -> tuple[Verdict, bool]:
    """The verdict, and whether all ran.

    It is that at small sizes, or at the call's own where the layer or the kernel raises there. An
    output may be wrong because a table that is made up is not as tables are.
    """
    while True:
        verdict, ran = _judged_here(trial, compare)
        if verdict.output and (tables := trial.maker.rotary_tables(trial.wanted)):
            trial.maker.tables = tables
            verdict, ran = min((verdict, ran), _judged_here(trial, compare), key=_has_wrong_output)
            trial.maker.tables = ()
        if ran or not trial.maker.at_own_sizes():
            return verdict, ran


def _has_wrong_output(judged: tuple[Verdict, bool]) -> bool:
    return bool(judged[0].output)


def _judged_here(trial: Trial, compare: bool) -> tuple[Verdict, bool]:
    """The verdict at the sizes that are set, and whether all ran."""
    references: list[Run] = []
    if compare:
        try:
            references = _references(trial)
        except torch.OutOfMemoryError:
            raise
        except (Untold, UnsupportedValue) as error:
            return _untold(str(error)), True
        except Exception as error:
            return _untold(f"the reference raised {error_text(error)}"), False
    try:
        runs = [trial.forward(seed) for seed in (trial.seeds if compare else (0,))]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Verdict(None, f"it raised {error_text(error)}"), False
    dtypes = [t.dtype for t in (*trial.maker.tensors, *runs[0].results)]
    near = closeness([*dtypes, *([trial.call.autocast[1]] if trial.call.autocast else [])])
    comparison = _Comparison(trial, runs, references, near)
    try:
        if compare and (output := comparison.outputs()):
            return Verdict(None, f"its output is wrong: {output}", output), True
        own, any_layout = own_backward(trial, near)
        if compare and (wrong := comparison.gradients(own.hidden_saves)):
            return Verdict(None, wrong), True
        return Verdict(own, contiguous=not any_layout), True
    except Untold as error:
        return _untold(str(error)), True
    except WrongBackward as error:
        return Verdict(None, str(error)), not isinstance(error, RaisedBackward)


def _untold(why: str) -> Verdict:
    return Verdict(None, f"its gradients cannot be compared: {why}")


def _references(trial: Trial) -> list[Run]:
    trial.maker.bounds = {}
    with trial.maker.apart(0):
        trial.maker.bounds = trial.maker.index_bounds(trial.reference_runner)
    return [trial.reference(seed) for seed in trial.seeds]


# --- comparing ----------------------------------------------------------------------------------


@dataclass
class _Comparison:
    trial: Trial
    runs: Sequence[Run]
    """The kernel's, forward alone."""
    references: Sequence[Run]
    near: Closeness

    @functools.cached_property
    def truth(self) -> list[Run] | None:
        """The reference's runs in float64; None where it does not run so."""
        try:
            return [self.trial.reference(seed, wide=True) for seed in self.trial.seeds]
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None

    def outputs(self) -> str:
        """How what the kernel returns is not what the layer does; empty where it is.

        Raises:
            Untold: If that cannot be told.
        """
        for run, reference in zip(self.runs, self.references, strict=True):
            if wrong := _misfit(run, reference):
                return wrong
        found, finite = [], []
        for k, result in enumerate(self.references[0].results):
            made, wanted = (
                [run.results[k] for run in runs] for runs in (self.runs, self.references)
            )
            floating = result.is_floating_point() or result.is_complex()
            if floating:
                finite.append(any(bool(w.isfinite().any()) for w in wanted))
            near = self.near if floating else EXACTLY
            if off := is_close(made, wanted, near, functools.partial(self._true_results, k)):
                found.append(f"result {k} {off}" if len(self.runs[0].results) > 1 else f"it {off}")
        if finite and not any(finite):
            raise Untold("nothing that the layer returns for made-up inputs is finite")
        if found and self._is_random():
            raise Untold("the layer is random, and the kernel draws other numbers")
        return _some(found)

    def _true_results(self, number: int) -> list[Tensor] | None:
        return None if self.truth is None else [run.results[number] for run in self.truth]

    def _is_random(self) -> bool:
        other = self.trial.reference(0, draw=1)
        return not alike(other.results, self.references[0].results, self.near)

    def gradients(self, holds: bool) -> str:
        """Which of the kernel's gradients are not the layer's, and how; empty where all are.

        Raises:
            Untold: If that cannot be told.
        """
        if not any(self.references[0].flows):
            raise Untold("no gradient flows through what the layer returns")
        made: list[list[Tensor | None]] = []
        for seed, run in zip(self.trial.seeds, self.runs, strict=True):
            with self.trial.maker.apart(0):
                on_tape = OnTape(self.trial, seed, holds=holds)
                if not alike(on_tape.results, run.results, self.near):
                    return "it returns something else where gradients are wanted"
                made.append(on_tape.gradients())
        found, told = [], False
        for i, name in enumerate(self.trial.names):
            pairs = [
                _pair(m[i], r.gradients[i]) for m, r in zip(made, self.references, strict=True)
            ]
            wanted = [w for _, w in pairs if w is not None]
            told = told or not wanted or any(bool(w.isfinite().any()) for w in wanted)
            ours = [m for m, _ in pairs if m is not None]
            off = is_close(ours, wanted, self.near, functools.partial(self._true_gradients, i))
            if off:
                missing = all(m[i] is None for m in made)
                found.append(f"the gradient of {name} {'is missing' if missing else off}")
        if not told:
            raise Untold("no gradient of the layer is finite for made-up inputs")
        return _some(found)

    def _true_gradients(self, number: int) -> list[Tensor] | None:
        true = [run.gradients[number] for run in self.truth or ()]
        known = [gradient for gradient in true if gradient is not None]
        return known if known and len(known) == len(true) else None


def _misfit(run: Run, reference: Run) -> str:
    if run.template != reference.template:
        kernels, layers = run.template.describe(), reference.template.describe()
        return f"it returned {kernels}, and the layer {layers}"
    for made, wanted in zip(run.results, reference.results, strict=True):
        if (found := _form(made)) != (expected := _form(wanted)):
            return f"it returned {found}, and the layer {expected}"
    return ""


def _form(tensor: Tensor) -> str:
    return f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device.type}"


def _pair(made: Tensor | None, wanted: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both; what is None is zeros, where the other is not."""
    if made is None and wanted is not None:
        return torch.zeros_like(wanted), wanted
    if made is not None and wanted is None:
        return made, torch.zeros_like(made)
    return made, wanted


def _some(found: Sequence[str]) -> str:
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


# --- kept ---------------------------------------------------------------------------------------

_KIND = "verdicts"
_verdicts: dict[Any, Verdict] = {}


def _key(
    layer: Extensible,
    kernel: Kernel,
    call: Call,
    maker: Operands,
    wanted: Sequence[bool],
    compare: bool,
) -> str:
    """Text that is the same in every process where the verdict is."""
    return repr(
        (
            (TRIAL_VERSION, *versions()),
            *kernel_key(kernel),
            layer_key(layer),
            call.describe(),
            maker.form,
            maker.devices,
            tuple(wanted),
            str(torch.get_default_dtype()),
            compare,
        )
    )


def _to_json(verdict: Verdict) -> dict[str, Any]:
    own = verdict.own
    if own is None:
        return verdict._asdict()
    written = {**own._asdict(), "overwrites": own.overwrites._asdict()}
    return {**verdict._asdict(), "own": written}


def _from_json(value: Any) -> Verdict | None:
    """The inverse of `_to_json`; None of anything that it has not made."""
    try:
        own = value["own"]
        if own is not None:
            overwrites = own["overwrites"]
            own = OwnBackward(
                _sources(own["sources"]),
                tuple(own["flows"]),
                own["hidden_saves"],
                Overwrites(
                    tuple(overwrites["grads"]),
                    _sources(overwrites["saved"]),
                    overwrites["private"],
                ),
            )
        return Verdict(own, value["wrong"], value["output"], value["contiguous"])
    except (TypeError, KeyError, ValueError):
        return None


def _sources(value: Any) -> tuple[Source, ...]:
    return tuple(Source(SourceKind(kind), index) for kind, index in value)
