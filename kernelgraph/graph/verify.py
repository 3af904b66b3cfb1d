"""``options={"verify": True}``: whether a kernel computes what the layer does.

While a call is compiled, the kernel and the reference are both run for real, once for each form
and sizes of call: on inputs that are made up (`operands`), of the call's dtypes, sizes and strides
(for a dynamic size what it is in the call that is traced), and on the layer's own weights where
they are at hand. Both get copies, one at a time, so that neither can spoil the weights. What they
return is compared, and not the gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from kernelgraph.graph import _torch
from kernelgraph.graph.call import Call, take_leaves
from kernelgraph.graph.choice import KeepReference, Site
from kernelgraph.graph.compare import Output, difference
from kernelgraph.graph.operands import Operands
from kernelgraph.graph.runner import Runner
from kernelgraph.graph.told import error_text, remember
from kernelgraph.kernel import Kernel
from kernelgraph.report import Reason

logger = logging.getLogger("kernelgraph")


_verdicts: dict[Any, str] = {}


def check(site: Site, kernel: Kernel, call: Call, operands: Sequence[Any]) -> None:
    """Compare ``kernel`` with the layer's reference, in a call with ``operands``.

    Where there is nothing to compare with, since the reference cannot be run on such inputs (it
    raises, or there is not the memory), the kernel stays, and the log says so.

    Args:
        site: Where the call is; its module has the weights.
        kernel: The kernel that would be used.
        call: The form of the call.
        operands: Its operands; of tensors only the form counts.

    Raises:
        KeepReference: If the kernel raises, returns another structure, shape or dtype, or values
            that are not within `kernelgraph.graph.compare.TOLERANCES`.
    """
    maker = Operands(call, operands, site.module)
    key = (kernel.layer, kernel.origin, site.layer, call.describe(), maker.form)
    if (verdict := _verdicts.get(key)) is None:
        verdict = _compare(site, kernel, call, maker)
        remember(_verdicts, key, verdict)
    if verdict:
        raise KeepReference(site, Reason.WRONG, f"{kernel}: {verdict}")


def _compare(site: Site, kernel: Kernel, call: Call, maker: Operands) -> str:
    """What is wrong with the kernel; empty where nothing is, or nothing can be told."""
    who = f"kernel {kernel} for layer {site.layer.layer_name} at {site.path or '(model)'}"
    try:
        reference = _run(Runner(site.layer.reference, call), maker)
    except Exception as error:
        logger.warning("%s is not verified: the reference raised %s", who, error_text(error))
        return ""
    try:
        made = _run(Runner(kernel.forward, call), maker)
    except torch.OutOfMemoryError as error:
        logger.warning("%s is not verified: %s", who, error_text(error))
        return ""
    except Exception as error:
        return f"raised {error_text(error)}"
    with _torch.for_real():
        return difference(made, reference)


def _run(runner: Runner, maker: Operands) -> Output:
    leaves: list[Any] = []
    with maker.apart():  # each draws the same random numbers
        template = take_leaves(runner.observe(maker.make(0)), leaves)
    return Output(template, leaves)
