"""From a call that a kernel is chosen for to its op: the kernel's checks, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, UnsupportedValue
from kernelgraph.graph.gradients import RECOMPUTED, Gradient, wanted_of
from kernelgraph.graph.infer import Effects
from kernelgraph.graph.lowering.options import Options
from kernelgraph.graph.lowering.sites import KeepReference, Site
from kernelgraph.graph.ops import Lowered, check_possible, lower
from kernelgraph.graph.verify import judge, output_error
from kernelgraph.kernel import BoundForward, Kernel
from kernelgraph.report import Decision, Reason, warn_once


def op_for(
    site: Site,
    kernel: Kernel,
    call: Call,
    operands: Sequence[object],
    options: Options,
    *,
    every: bool = False,
) -> tuple[Lowered, Gradient | None]:
    """Return the op for a call, and where its gradient comes from if one can flow through it.

    The kernel is verified as the options say: its output, and its gradient where one can flow.

    Args:
        site: The call site.
        kernel: The kernel that is chosen for it.
        call: The call's signature.
        operands: The call's operands. The values of tensors do not matter: fakes will do.
        options: The backend's options.
        every: Whether a gradient may be wanted of any operand, and not only of those that
            require one now.

    Raises:
        KeepReference: If the kernel does not compute what the layer does.
        UnsupportedValue, AttributeError, RuntimeError: As `lower` raises.
    """
    own = site.module.__dict__.get("forward")
    if isinstance(own, BoundForward):  # the arguments of `kernelize` come before the options
        options = replace(options, gradients=own.gradients)
    _, spec = check_possible(kernel, site.layer, call, operands)
    if options.verify:
        error = output_error(site.layer, site.module, site.path, kernel, call, operands)
        if error:
            raise KeepReference(site, Reason.WRONG, f"{kernel}: {error}")
    gradient = None
    if site.grad:
        wanted = wanted_of(operands, every=every)
        if Effects.of(spec).layer and _share_memory(operands):
            raise UnsupportedValue("the layer writes, where a gradient flows, into shared memory")
        gradient = _gradient(site, kernel, call, operands, options, wanted)
        if gradient.own and any(Effects.of(spec)):
            # The kernel's own backward knows nothing of the values that are written.
            gradient = Gradient(wanted, None, "the layer or the kernel writes into an operand")
        gradient = replace(gradient, checkpointed=site.checkpointed)
    place = (site.module, site.path)
    return lower(kernel, site.layer, call, operands, gradient=gradient, place=place), gradient


def _share_memory(operands: Sequence[object]) -> bool:
    """Whether two operands have memory in common, other than as tied weights."""
    tensors = {id(v): v for v in operands if isinstance(v, Tensor) and v.layout is torch.strided}
    memories = [_torch.storage_of(tensor) for tensor in tensors.values()]
    return len(set(memories)) < len(memories)


def decision_of(
    site: Site, kernel: Kernel, lowered: Lowered, gradient: Gradient | None
) -> Decision:
    """Return the report's row for a call that becomes an op."""
    source = str(gradient) if gradient else ""
    return site.decision(Reason.KERNEL, str(kernel), "", lowered.qualname, source)


def _gradient(
    site: Site,
    kernel: Kernel,
    call: Call,
    operands: Sequence[object],
    options: Options,
    wanted: tuple[bool, ...],
) -> Gradient:
    """Return where the gradient of a call comes from; warn of a kernel that trains wrongly.

    Raises:
        KeepReference: If the layer is to run on its own forward instead.
    """
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
