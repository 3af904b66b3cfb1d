"""What a kernel's own backward needs and does, and whether it is the same however it is run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kernelgraph.graph.gradients import Overwrites, OwnBackward, Source
from kernelgraph.graph.verify.tolerance import Closeness, Deviation, same_bits
from kernelgraph.graph.verify.trial_runs import OnTape, Trial
from kernelgraph.report import error_text


class WrongBackward(Exception):
    """Why a kernel's own backward is of no use."""


class NoBackward(WrongBackward):
    """It has none."""


class RaisedBackward(WrongBackward):
    """It raised, maybe only at these sizes."""


def own_backward(trial: Trial, near: Closeness) -> tuple[OwnBackward, bool]:
    """What the kernel's own backward needs and does; whether incoming gradients may have any
    layout.

    Raises:
        WrongBackward: If its gradients are not the same however it is run.
    """
    try:
        return _examined(trial, near, holds=False)
    except (NoBackward, torch.OutOfMemoryError):
        raise
    except Exception:
        try:
            return _examined(trial, near, holds=True)
        except (WrongBackward, torch.OutOfMemoryError):
            raise
        except Exception as error:
            what = f"where gradients are wanted it raised {error_text(error)}"
            raise RaisedBackward(what) from error


def _examined(trial: Trial, near: Closeness, *, holds: bool) -> tuple[OwnBackward, bool]:
    with trial.maker.apart(0):
        run = OnTape(trial, 0, holds=holds)
        if run.written:
            raise WrongBackward(f"it writes into {', '.join(run.written)}")
        if not any(run.flows):
            raise NoBackward("it has no backward: no gradient flows through what it returns")
        grads, given = run.incoming(), run.sources()
        gradients = run.gradients(grads, given)
        overwrites = _overwrites(run, grads, given)
        again = _attempt(run.gradients)
    if (again is None or not alike(again, gradients, near)) and _needs_copies(
        trial, gradients, near, holds
    ):
        overwrites = overwrites._replace(private=True)
    _check_overwritten(trial, frozenset(run.tape.seen), gradients, near, holds)
    own = OwnBackward(tuple(sorted(run.tape.seen)), run.flows, holds, overwrites)
    return own, _takes_any_layout(trial, gradients, near, holds)


Gradients = Sequence[Tensor | None]


def _overwrites(run: OnTape, grads: Gradients, given: Mapping[Source, Tensor]) -> Overwrites:
    """Compare what a backward was given with what it was before the backward ran."""
    written = [
        k
        for k, (now, before) in enumerate(zip(grads, run.incoming(), strict=True))
        if now is not None and before is not None and not same_bits(now, before)
    ]
    sources = run.sources()
    saved = [source for source in sorted(sources) if not same_bits(given[source], sources[source])]
    return Overwrites(tuple(written), tuple(saved))


def _needs_copies(trial: Trial, gradients: Gradients, near: Closeness, holds: bool) -> bool:
    """Whether a backward that cannot run twice can with copies of what is the kernel's own.

    If it raises even then, it says itself that it runs once only, as is anybody's right.

    Raises:
        WrongBackward: If it gives other gradients the second time whatever it gets.
    """
    with trial.maker.apart(0):
        run = OnTape(trial, 0, holds=holds)
        once = run.gradients(copied=True)
        twice = _attempt(functools.partial(run.gradients, copied=True))
    if twice is None:
        return False
    if not (alike(once, gradients, near) and alike(twice, gradients, near)):
        raise WrongBackward("its backward gives other gradients when it is run again")
    return True


def _check_overwritten(
    trial: Trial, seen: frozenset[Source], gradients: Gradients, near: Closeness, holds: bool
) -> None:
    """See that gradients do not depend on memory that is not the kernel's to keep.

    Raises:
        WrongBackward: If they do.
    """
    with trial.maker.apart(0):
        run = OnTape(trial, 0, holds=holds, sources=seen)
        given = run.sources()
        run.overwrite()
        if not alike(run.gradients(given=given), gradients, near):
            raise WrongBackward("its backward reads memory that is not its own by then")


def _takes_any_layout(trial: Trial, gradients: Gradients, near: Closeness, holds: bool) -> bool:
    for lay_out in (_with_gaps, _in_longer_rows):
        with trial.maker.apart(0):
            run = OnTape(trial, 0, holds=holds)
            grads = [None if g is None else lay_out(g) for g in run.incoming()]
            made = _attempt(functools.partial(run.gradients, grads))
        if made is None or not alike(made, gradients, near):
            return False
    return True


# A kernel that takes these for contiguous stays within their memory, and finds other values there.


def _with_gaps(gradient: Tensor) -> Tensor:
    return torch.stack([gradient, torch.ones_like(gradient)], -1)[..., 0]


def _in_longer_rows(gradient: Tensor) -> Tensor:
    if gradient.dim() == 0:
        return gradient
    return torch.cat([gradient, torch.ones_like(gradient)], -1)[..., : gradient.shape[-1]]


def _attempt(run: Callable[[], list[Tensor | None]]) -> list[Tensor | None] | None:
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


def alike(made: Gradients, wanted: Gradients, near: Closeness) -> bool:
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
        if same_bits(one, other):
            continue
        if not Deviation.of([(one, other)], near.relative).is_within(near):
            return False
    return True
