"""Whether a kernel may train: a trial of its own backward, before anything is trained with it.

Kernels say by silence that they have a backward, and many have none, or a wrong one. So the first
time that one would be used where gradients are wanted, it and the layer's reference are run for
real, forward and backward, on operands that are made up (`kernelgraph.graph.operands`): of the
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
import importlib.metadata
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kernelgraph
from kernelgraph import cache
from kernelgraph.graph import _torch
from kernelgraph.graph.call import Call, Template, UnsupportedValue, take_tensors
from kernelgraph.graph.compare import EXACTLY, Closeness, Deviation, closeness, is_close
from kernelgraph.graph.gradient import Own
from kernelgraph.graph.memory import contiguous_copy, owned, versions
from kernelgraph.graph.operands import Operands
from kernelgraph.graph.runner import Runner
from kernelgraph.graph.samples import Form
from kernelgraph.graph.shapes import describe_output
from kernelgraph.graph.tape import Source, Tape
from kernelgraph.graph.told import remember
from kernelgraph.hub.loading import code_hash
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible

logger = logging.getLogger("kernelgraph")

TRIAL_VERSION = "1"
"""Counted up whenever a trial may come to another verdict."""


class Verdict(NamedTuple):
    """What a trial has come to."""

    own: Own | None
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
        return Verdict(None, f"cannot be compared: {error}")
    key = _key(layer, kernel, call, maker, wanted, compare)
    known = (key, kernel.layer, layer)
    if known in _verdicts:
        return _verdicts[known]
    verdict = _from_json(cache.read(_KIND, key))
    if verdict is None:
        trial = _Trial(layer, kernel, call, maker, tuple(wanted))
        try:
            verdict = _judged(trial, compare)
            cache.write(_KIND, key, _to_json(verdict))
        except torch.OutOfMemoryError as error:  # next time there may be more
            verdict = Verdict(None, f"cannot be compared: {_text(error)}")
    remember(_verdicts, known, verdict)
    return verdict


class _Untold(Exception):
    """There is nothing to tell a kernel's gradients by, at these sizes at least."""


# --- the runs -----------------------------------------------------------------------------------


class _Run(NamedTuple):
    """What a forward returned, and a backward."""

    template: Template
    results: list[Tensor]
    flows: tuple[bool, ...]
    """Through which of the results a gradient flows."""
    gradients: list[Tensor | None]
    """Of the operands that they are wanted of."""


@dataclass
class _Trial:
    layer: Extensible
    kernel: Kernel
    call: Call
    maker: Operands
    wanted: tuple[bool, ...]

    def __post_init__(self) -> None:
        self.reference_runner = Runner(self.layer.reference, self.call)
        self.kernel_runner = Runner(self.kernel.forward, self.call)

    @property
    def seeds(self) -> range:
        """Of the runs that are compared: large operands have values enough in one."""
        count = sum(v.numel() if isinstance(v, Tensor) else v.reach for v in self.maker.tensors)
        return range(3 if count < 2**24 else 1)

    @property
    def names(self) -> list[str]:
        """Of the operands that gradients are wanted of."""
        return [n for n, needed in zip(self.call.names, self.wanted, strict=True) if needed]

    def reference(self, seed: int, *, draw: int = 0, wide: bool = False) -> _Run:
        """A run of the layer's reference.

        Args:
            seed: Of the operands and the incoming gradients.
            draw: Of the random numbers that it draws.
            wide: Whether in float64.

        Raises:
            _Untold: If it writes into its operands.
            UnsupportedValue: If it does what no op can.
            Exception: What it raises.
        """
        with self.maker.apart(draw), torch.enable_grad(), _torch.recording_gradients():
            operands = self.maker.make(seed)
            if wide:
                operands = [_widened(v) if isinstance(v, Tensor) else v for v in operands]
            leaves = [
                v.detach().requires_grad_(needed) if isinstance(v, Tensor) else v
                for v, needed in zip(operands, self.wanted, strict=True)
            ]
            inputs = [v.view_as(v) if isinstance(v, Tensor) else v for v in leaves]
            before = versions(inputs)
            results: list[Any] = []
            template = take_tensors(self.reference_runner.observe(inputs), results)
            if versions(inputs) != before:
                raise _Untold("the layer writes into its operands")
            flows = tuple(result.requires_grad for result in results)
            grads = incoming(results, flows, seed)
            flowing = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
            wanted = [v for v, needed in zip(leaves, self.wanted, strict=True) if needed]
            gradients: Sequence[Tensor | None] = [None] * len(wanted)
            if flowing:
                roots, given = zip(*flowing, strict=True)
                gradients = torch.autograd.grad(roots, wanted, given, allow_unused=True)
            return _Run(template, [r.detach() for r in results], flows, list(gradients))


def _widened(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def incoming(results: Sequence[Tensor], flows: Sequence[bool], seed: int) -> list[Tensor | None]:
    """Random gradients of the results that one flows through, equal for equal seeds."""
    made: list[Tensor | None] = []
    for k, (result, flow) in enumerate(zip(results, flows, strict=True)):
        gradient = None
        if flow:
            generator = torch.Generator(result.device).manual_seed(1000 * seed + k)
            # Drawn in the dtypes that are alike in every precision.
            kind = torch.complex64 if result.is_complex() else torch.bfloat16
            drawn = torch.randn(result.shape, dtype=kind, device=result.device, generator=generator)
            gradient = drawn.to(result.dtype)
        made.append(gradient)
    return made


class _OnTape:
    """A run of a kernel's forward, whose backward is yet to run; within `Operands.apart`.

    Args:
        trial: The trial.
        seed: Of the operands.
        holds: Whether the kernel gets, and gives, copies.
        sources: What the backward will be given; None: all that the kernel saves.
    """

    def __init__(
        self, trial: _Trial, seed: int, *, holds: bool, sources: frozenset[Source] | None = None
    ) -> None:
        self._trial, self._seed = trial, seed
        self._operands = trial.maker.make(seed)
        self.tape = Tape(self._operands, trial.wanted, sources, holds=holds)
        results: list[Any] = []
        self.template = take_tensors(self.tape.run(trial.kernel_runner.observe), results)
        self.flows = tuple(result.requires_grad for result in results)
        tensors = [v for v in self._operands if isinstance(v, Tensor)]
        self._lent = list(map(contiguous_copy, results)) if holds else owned(results, tensors)
        self.tape.close(results, self._lent, self.flows)
        self.written = [
            name
            for name, now, before in zip(
                trial.call.names, self._operands, trial.maker.make(seed), strict=True
            )
            if isinstance(now, Tensor) and not _same_bits(now, before)
        ]
        self.kept = list(map(contiguous_copy, self._lent))

    def overwrite(self) -> None:
        """Do to the memory of operands and results what other uses of it would."""
        for tensor in (*self._operands, *self._lent):
            if isinstance(tensor, Tensor):
                _overwrite(tensor)

    def sources(self) -> dict[Source, Tensor]:
        """Copies of what the kernel has saved."""
        made = self._trial.maker.make(self._seed)
        return {
            (kind, i): made[i] if kind == "operand" else self.kept[i].clone()
            for kind, i in self.tape.seen
        }

    def gradients(
        self,
        grads: Sequence[Tensor | None] | None = None,
        given: Mapping[Source, Tensor] | None = None,
        *,
        copied: bool = False,
    ) -> list[Tensor | None]:
        """Those of the operands that they are wanted of; by default of `incoming` gradients."""
        made = self.tape.gradients(
            self.incoming() if grads is None else grads,
            self.sources() if given is None else given,
            self._trial.wanted,
            copied=copied,
        )
        return [None if g is None else g.detach().clone() for g in made]

    def incoming(self) -> list[Tensor | None]:
        return incoming(self.kept, self.flows, self._seed)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    flat = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*flat)


def _overwrite(tensor: Tensor) -> None:
    # As data: what a compiler writes there autograd knows nothing of.
    memory = torch.as_strided(tensor.data, (_reach(tensor),), (1,))
    if memory.is_floating_point() or memory.is_complex():
        memory.fill_(float("nan"))
    elif memory.dtype == torch.bool:
        memory.logical_not_()
    else:  # maybe indices, which have to stay in range
        memory.copy_(memory.flip(0))


def _reach(tensor: Tensor) -> int:
    form = Form(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    return form.reach


# --- the kernel's own backward ------------------------------------------------------------------


class _Wrong(Exception):
    """Why a kernel's own backward is of no use."""


class _Raised(_Wrong):
    """It raised, maybe only at these sizes."""


def _own(trial: _Trial, near: Closeness) -> tuple[Own, bool]:
    """What the kernel's own backward needs and does; whether it takes any incoming gradient.

    Raises:
        _Wrong: If its gradients are not the same however it is run.
    """
    try:
        return _own_with(trial, near, holds=False)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        try:
            return _own_with(trial, near, holds=True)
        except (_Wrong, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _Raised(f"where gradients are wanted it raised {_text(error)}") from error


def _own_with(trial: _Trial, near: Closeness, *, holds: bool) -> tuple[Own, bool]:
    maker = trial.maker
    with maker.apart(0):
        run = _OnTape(trial, 0, holds=holds)
        if run.written:
            raise _Wrong(f"it writes into {', '.join(run.written)}")
        if not any(run.flows):
            raise _Wrong("it has no backward: no gradient flows through what it returns")
        grads, given = run.incoming(), run.sources()
        gradients = run.gradients(grads, given)
        spoils = [
            f"grad {k}"
            for k, (now, before) in enumerate(zip(grads, run.incoming(), strict=True))
            if now is not None and before is not None and not _same_bits(now, before)
        ]
        before = run.sources()
        spoils += [
            f"{kind} {i}"
            for kind, i in sorted(given)
            if not _same_bits(given[kind, i], before[kind, i])
        ]
        again = _attempt(run.gradients)
    if again is None or not _alike(again, gradients, near):
        with maker.apart(0):
            copying = _OnTape(trial, 0, holds=holds)
            once = copying.gradients(copied=True)
            twice = _attempt(functools.partial(copying.gradients, copied=True))
        if twice is not None:  # or else it says that it runs only once
            if not (_alike(once, gradients, near) and _alike(twice, gradients, near)):
                raise _Wrong("its backward gives other gradients when it is run again")
            spoils.append("saved")
    seen = run.tape.seen
    with maker.apart(0):
        other = _OnTape(trial, 0, holds=holds, sources=frozenset(seen))
        given = other.sources()
        other.overwrite()
        if not _alike(other.gradients(given=given), gradients, near):
            raise _Wrong("its backward reads memory that is not its own by then")
    with maker.apart(0):
        strided = _OnTape(trial, 0, holds=holds)
        anyhow = all(
            (made := _attempt(functools.partial(strided.gradients, laid_out))) is not None
            and _alike(made, gradients, near)
            for laid_out in _not_contiguous(strided.incoming())
        )
    own = Own(
        tuple(sorted(i for kind, i in seen if kind == "operand")),
        tuple(sorted(i for kind, i in seen if kind == "result")),
        run.flows,
        holds,
        tuple(spoils),
    )
    return own, anyhow


def _attempt(run: Callable[[], list[Tensor | None]]) -> list[Tensor | None] | None:
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


def _alike(made: Sequence[Tensor | None], wanted: Sequence[Tensor | None], near: Closeness) -> bool:
    """Whether gradients are the same, but for the order of sums."""
    for one, other in zip(made, wanted, strict=True):
        if one is None and other is None:
            continue
        if other is None:
            assert one is not None
            other = torch.zeros_like(one)
        one = torch.zeros_like(other) if one is None else one
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not Deviation.of([(one, other)], near.relative).is_within(near):
            return False
    return True


def _not_contiguous(grads: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """Incoming gradients in other layouts: with gaps, and with rows that are longer in memory.

    There are other values in the gaps. A kernel that takes them for contiguous stays within their
    memory.
    """
    return [
        [None if g is None else _spread(g, 2) for g in grads],
        [None if g is None else _padded(g) for g in grads],
    ]


def _spread(gradient: Tensor, step: int) -> Tensor:
    wide = torch.stack([gradient, *([torch.ones_like(gradient)] * (step - 1))], -1)
    return wide[..., 0]


def _padded(gradient: Tensor) -> Tensor:
    if gradient.dim() == 0:
        return gradient
    return torch.cat([gradient, torch.ones_like(gradient)], -1)[..., : gradient.shape[-1]]


# --- the verdict --------------------------------------------------------------------------------


def _judged(trial: _Trial, compare: bool) -> Verdict:
    """The verdict at small sizes; at the call's own where the layer or the kernel raises there."""
    while True:
        verdict, ran = _judged_here(trial, compare)
        if ran or not trial.maker.at_own_sizes():
            return verdict


def _judged_here(trial: _Trial, compare: bool) -> tuple[Verdict, bool]:
    """The verdict at the sizes that are set, and whether all ran."""
    references: list[_Run] = []
    if compare:
        try:
            references = _references(trial)
        except torch.OutOfMemoryError:
            raise
        except (_Untold, UnsupportedValue) as error:
            return _untold(str(error)), True
        except Exception as error:
            return _untold(f"the reference raised {_text(error)}"), False
    try:
        runs = [_forward(trial, seed) for seed in trial.seeds]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Verdict(None, f"it raised {_text(error)}"), False
    dtypes = [t.dtype for t in (*trial.maker.tensors, *runs[0].results)]
    near = closeness([*dtypes, *([trial.call.autocast[1]] if trial.call.autocast else [])])
    truth = _Truth(trial)
    try:
        if compare and (wrong := _outputs(trial, runs, references, near, truth)):
            return Verdict(None, "its output is not the layer's", wrong), True
        own, anyhow = _own(trial, near)
        if compare and (wrong := _gradients(trial, own.holds, references, near, truth)):
            return Verdict(None, wrong), True
        return Verdict(own, contiguous=not anyhow), True
    except _Untold as error:
        return _untold(str(error)), True
    except _Wrong as error:
        return Verdict(None, str(error)), not isinstance(error, _Raised)


def _untold(why: str) -> Verdict:
    return Verdict(None, f"its gradients cannot be compared: {why}")


def _references(trial: _Trial) -> list[_Run]:
    trial.maker.bounds = {}
    with trial.maker.apart(0):
        trial.maker.bounds = trial.maker.index_bounds(trial.reference_runner)
    return [trial.reference(seed) for seed in trial.seeds]


def _forward(trial: _Trial, seed: int) -> _Run:
    """A run of the kernel without its backward."""
    results: list[Any] = []
    with trial.maker.apart(0):
        output = trial.kernel_runner.observe(trial.maker.make(seed))
        try:
            template = take_tensors(output, results)
        except UnsupportedValue:
            template = ("const", f"a {type(output).__name__}")
        return _Run(template, [r.clone() for r in results], (), [])


class _Truth:
    """The reference's runs in float64, made where they are needed."""

    def __init__(self, trial: _Trial) -> None:
        self._trial = trial

    @functools.cached_property
    def runs(self) -> list[_Run] | None:
        """None where it does not run so."""
        try:
            return [self._trial.reference(seed, wide=True) for seed in self._trial.seeds]
        except Exception:
            return None

    def results(self, number: int) -> list[Tensor] | None:
        return None if self.runs is None else [run.results[number] for run in self.runs]

    def gradients(self, number: int) -> list[Tensor] | None:
        if self.runs is None:
            return None
        made = [run.gradients[number] for run in self.runs]
        return [g for g in made if g is not None] if None not in made else None


def _outputs(
    trial: _Trial,
    runs: Sequence[_Run],
    references: Sequence[_Run],
    near: Closeness,
    truth: _Truth,
) -> str:
    """How what the kernel returns is not what the layer does; empty where it is."""
    if wrong := _misfit(runs[0], references[0]):
        return wrong
    found, counts = [], []
    for k, result in enumerate(references[0].results):
        wanted = [reference.results[k] for reference in references]
        floating = result.is_floating_point() or result.is_complex()
        if floating:
            counts.append(any(bool(w.isfinite().any()) for w in wanted))
        made = [run.results[k] for run in runs]
        how = near if floating else EXACTLY
        if off := is_close(made, wanted, how, functools.partial(truth.results, k)):
            found.append(f"result {k} {off}" if len(runs[0].results) > 1 else f"it {off}")
    if counts and not any(counts):
        raise _Untold("nothing that the layer returns for made-up inputs is finite")
    if found and _is_random(trial, references[0], near):
        raise _Untold("the layer is random, and the kernel draws other numbers")
    return _some(found)


def _misfit(run: _Run, reference: _Run) -> str:
    if run.template != reference.template:
        kernels, layers = describe_output(run.template), describe_output(reference.template)
        return f"it returned {kernels}, and the layer {layers}"
    for made, wanted in zip(run.results, reference.results, strict=True):
        if (found := _form(made)) != (expected := _form(wanted)):
            return f"it returned {found}, and the layer {expected}"
    return ""


def _form(tensor: Tensor) -> str:
    return f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device.type}"


def _is_random(trial: _Trial, reference: _Run, near: Closeness) -> bool:
    other = trial.reference(0, draw=1)
    return not _alike(other.results, reference.results, near)


def _gradients(
    trial: _Trial, holds: bool, references: Sequence[_Run], near: Closeness, truth: _Truth
) -> str:
    """Which of the kernel's gradients are not the layer's, and how; empty where all are."""
    made: list[list[Tensor | None]] = []
    for seed in trial.seeds:
        with trial.maker.apart(0):
            made.append(_OnTape(trial, seed, holds=holds).gradients())
    found, told = [], False
    for i, name in enumerate(trial.names):
        pairs = [_pair(own[i], run.gradients[i]) for own, run in zip(made, references, strict=True)]
        known = [pair for pair in pairs if pair is not None]
        if not known:  # neither has one
            told = True
            continue
        ours, theirs = (list(tensors) for tensors in zip(*known, strict=True))
        if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in known):
            found.append(f"the gradient of {name} has another shape or dtype than the layer's")
            continue
        told = told or any(bool(w.isfinite().any()) for w in theirs)
        off = is_close(ours, theirs, near, functools.partial(truth.gradients, i))
        if off:
            missing = all(own[i] is None for own in made)
            found.append(f"the gradient of {name} {'is missing' if missing else off}")
    if not told:
        raise _Untold("no gradient of the layer is finite for made-up inputs")
    return _some(found)


def _pair(made: Tensor | None, wanted: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both; what is None is zeros, where the other is not."""
    if made is None and wanted is None:
        return None
    zeros = torch.zeros_like(made if wanted is None else wanted)  # type: ignore[arg-type]
    return (zeros if made is None else made), (zeros if wanted is None else wanted)


def _some(found: Sequence[str]) -> str:
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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
    origin = kernel.origin
    return repr(
        (
            (TRIAL_VERSION, kernelgraph.__version__, torch.__version__, _triton_version()),
            (origin.name, origin.revision, origin.variant),
            (kernel.layer.__name__, code_hash(kernel.forward)),
            (f"{layer.owner.__module__}.{layer.owner.__qualname__}", code_hash(layer.reference)),
            call.describe(),
            maker.form,
            maker.devices,
            tuple(wanted),
            str(torch.get_default_dtype()),
            compare,
        )
    )


@functools.cache
def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _to_json(verdict: Verdict) -> dict[str, Any]:
    own = None if verdict.own is None else verdict.own._asdict()
    return {**verdict._asdict(), "own": own}


def _from_json(value: Any) -> Verdict | None:
    """The inverse of `_to_json`; None of anything that it has not made."""
    try:
        own = value["own"]
        if own is not None:
            own = Own(
                tuple(own["operands"]),
                tuple(own["results"]),
                tuple(own["flows"]),
                own["holds"],
                tuple(own["spoils"]),
            )
        return Verdict(own, value["wrong"], value["output"], value["contiguous"])
    except (TypeError, KeyError):
        return None
