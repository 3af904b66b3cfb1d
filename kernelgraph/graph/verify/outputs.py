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
from torch import nn

from kernelgraph.cache import remember
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, Runner, flatten
from kernelgraph.graph.infer import Operands
from kernelgraph.graph.verify.tolerance import Output, difference
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible
from kernelgraph.report import error_text

logger = logging.getLogger("kernelgraph")


_verdicts: dict[Any, str] = {}


def output_error(
    layer: Extensible,
    module: nn.Module,
    path: str,
    kernel: Kernel,
    call: Call,
    operands: Sequence[Any],
) -> str:
    """Compare a kernel's results with its layer's, in a call with ``operands``.

    Where the reference cannot be run on such inputs (it raises, or there is not enough memory),
    nothing is compared, and the log says so.

    Args:
        layer: The layer that is called.
        module: The instance, which has the weights.
        path: Its path in the model, for the log.
        kernel: The kernel that would be used.
        call: The form of the call.
        operands: Its operands; of tensors only the form counts.

    Returns:
        What is wrong: the kernel raises, returns another structure, shape or dtype, or values
        that are not within `kernelgraph.graph.verify.tolerance.TOLERANCES`. Empty where nothing is
        wrong, or nothing could be compared.
    """
    inputs = Operands(call, operands, module)
    key = (kernel.layer, kernel.origin, layer, call.describe(), inputs.form)
    if (error := _verdicts.get(key)) is None:
        who = f"kernel {kernel} for layer {layer.layer_name} at {path or '(model)'}"
        error = _compare(who, layer, kernel, call, inputs)
        remember(_verdicts, key, error)
    return error


def _compare(who: str, layer: Extensible, kernel: Kernel, call: Call, inputs: Operands) -> str:
    try:
        reference = _run(Runner(layer.reference, call), inputs)
    except Exception as error:
        logger.warning("%s is not verified: the reference raised %s", who, error_text(error))
        return ""
    try:
        made = _run(Runner(kernel.forward, call), inputs)
    except torch.OutOfMemoryError as error:
        logger.warning("%s is not verified: %s", who, error_text(error))
        return ""
    except Exception as error:
        return f"raised {error_text(error)}"
    with _torch.for_real():
        return difference(made, reference)


def _run(runner: Runner, inputs: Operands) -> Output:
    with inputs.apart():  # each draws the same random numbers
        leaves, template = flatten(runner.observe(inputs.make(0)))
    return Output(template, leaves)
