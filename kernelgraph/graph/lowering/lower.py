"""From a call that a kernel is chosen for to its op: the last questions that are asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call
from kernelgraph.graph.gradients import RECOMPUTED, Gradient, wanted_of
from kernelgraph.graph.lowering.options import Options
from kernelgraph.graph.lowering.sites import KeepReference, Site
from kernelgraph.graph.ops import Lowered, lower
from kernelgraph.graph.verify import judge, output_error
from kernelgraph.kernel import BoundForward, Kernel
from kernelgraph.report import Decision, Reason, warn_once


def op_for(
    site: Site,
    kernel: Kernel,
    call: Call,
    operands: Sequence[Any],
    options: Options,
    *,
    every: bool = False,
) -> tuple[Lowered, Gradient | None]:
    """The op for a call, and where its gradient comes from if one can flow through it.

    Args:
        site: Where the call is.
        kernel: The kernel that is chosen for it.
        call: Its form.
        operands: Its operands; of tensors only the form counts.
        options: The backend's.
        every: Whether a gradient may be wanted of any operand, and not only of those that
            require one now.

    Raises:
        KeepReference: If the kernel does not compute what the layer does.
        UnknownShape, UnsupportedValue, AttributeError, RuntimeError: As `lower` raises.
    """
    own = site.module.__dict__.get("forward")
    if isinstance(own, BoundForward):  # what kernelize was asked counts
        options = replace(options, gradients=own.gradients)
    if options.verify:
        error = output_error(site.layer, site.module, site.path, kernel, call, operands)
        if error:
            raise KeepReference(site, Reason.WRONG, f"{kernel}: {error}")
    gradient = None
    if site.grad:
        gradient = _gradient(
            site, kernel, call, operands, options, wanted_of(operands, every=every)
        )
    place = (site.module, site.path)
    return lower(kernel, site.layer, call, operands, gradient=gradient, place=place), gradient


def decision_of(
    site: Site, kernel: Kernel, lowered: Lowered, gradient: Gradient | None
) -> Decision:
    """What the report says of an op."""
    where = str(gradient) if gradient else ""
    return site.decision(Reason.KERNEL, str(kernel), "", lowered.qualname, where)


def _gradient(
    site: Site,
    kernel: Kernel,
    call: Call,
    operands: Sequence[Any],
    options: Options,
    wanted: tuple[bool, ...],
) -> Gradient:
    if not options.own_backward:
        return Gradient(wanted, None, "own_backward is False")
    with _torch.for_real():
        compare = options.gradients.verify
        verdict = judge(site.layer, site.module, kernel, call, operands, wanted, compare=compare)
    if not verdict.wrong:
        return Gradient(wanted, verdict.own)
    wrong = verdict.output or verdict.wrong
    keep = bool(verdict.output) or options.gradients.wrong == "reference"
    instead = "the layer runs on its own forward" if keep else RECOMPUTED
    warn_once(str(kernel), site.layer.layer_name, site.path, wrong, instead)
    if keep:
        raise KeepReference(site, Reason.WRONG, f"{kernel}: {wrong}")
    return Gradient(wanted, None, wrong)
