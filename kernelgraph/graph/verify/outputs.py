"""``options={"verify": True}``: whether a kernel computes what the layer does.

While a call is compiled, the kernel and the reference are both run for real, once for each
signature and sizes of a call. Their inputs are made up (see `Operands`), with the dtypes, sizes and
strides of the call; a dynamic size is what it is in the call that is traced. The layer's own
weights are used where they have values. Each of the two receives copies, so that neither can change
the weights. Their results are compared, and not their gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernelgraph.cache import remember
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, Runner, Template, flatten
from kernelgraph.graph.infer import Operands
from kernelgraph.graph.verify.tolerance import TOLERANCES, Tolerance
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible
from kernelgraph.report import error_text

logger = logging.getLogger("kernelgraph")

_errors: dict[object, str] = {}


class Output(NamedTuple):
    """The output of a forward: its structure, and the tensors and numbers in it."""

    template: Template
    leaves: Sequence[object]


def output_error(
    layer: Extensible,
    module: nn.Module,
    path: str,
    kernel: Kernel,
    call: Call,
    operands: Sequence[object],
) -> str:
    """Compare a kernel's results with its layer's, in a call with ``operands``.

    Where the reference cannot be run on such inputs (it raises, or there is not enough memory),
    nothing is compared, and the log says so.

    Args:
        layer: The layer that is called.
        module: The instance, which has the weights.
        path: Its path in the model, for the log.
        kernel: The kernel that would be used.
        call: The signature of the call.
        operands: Its operands; the values of tensors do not matter.

    Returns:
        The error: the kernel raises, returns another structure, shape or dtype, or values that are
        not within `kernelgraph.graph.verify.tolerance.TOLERANCES`. Empty if there is none, or if
        nothing could be compared.
    """
    inputs = Operands(call, operands, module)
    key = (kernel.layer, kernel.origin, layer, call.describe(), inputs.form)
    if (error := _errors.get(key)) is None:
        who = f"kernel {kernel} for layer {layer.layer_name} at {path or '(model)'}"
        with call.program_data_kept(layer):
            error = _compare(who, layer, kernel, call, inputs)
        remember(_errors, key, error)
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
    with inputs.apart():  # both draw the same random numbers
        leaves, template = flatten(runner.observe(inputs.make(0)))
    return Output(template, leaves)


def difference(kernel: Output, reference: Output) -> str:
    """Describe how a kernel's output differs from the reference's; empty if it does not."""
    if kernel.template != reference.template:
        made, wanted = kernel.template.describe(), reference.template.describe()
        return f"returned {made}, and the layer {wanted}"
    pairs = zip(kernel.leaves, reference.leaves, strict=True)
    errors = [_leaf_error(made, wanted) for made, wanted in pairs]
    several = len(errors) > 1
    return "; ".join(
        f"result {number}: {error}" if several else error
        for number, error in enumerate(errors)
        if error
    )


def _leaf_error(made: object, wanted: object) -> str:
    if not (isinstance(made, Tensor) and isinstance(wanted, Tensor)):
        same = type(made) is type(wanted) and made == wanted
        return "" if same else f"returned {made!r}, and the layer {wanted!r}"
    if (found := _properties(made)) != (expected := _properties(wanted)):
        return f"returned a {found}, and the layer a {expected}"
    return _value_error(made, wanted)


def _properties(tensor: Tensor) -> str:
    return f"{tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}"


def _value_error(made: Tensor, wanted: Tensor) -> str:
    """Describe the values of ``made`` that are not within the tolerance around ``wanted``, a tensor
    of the same shape and dtype; empty if there are none."""
    dtype = wanted.dtype
    relative, absolute = TOLERANCES.get(dtype, Tolerance(0, 0))
    if dtype.is_floating_point and dtype.itemsize < 4:
        made, wanted = made.float(), wanted.float()
    if absolute:
        finite = wanted[wanted.isfinite()]
        scale = float(finite.abs().square().mean().sqrt()) if finite.numel() else 0.0
        within = torch.isclose(made, wanted, relative, absolute * (scale or 1.0), equal_nan=True)
    else:
        within = made == wanted
    if within.all():
        return ""
    off = ~within
    wide = torch.complex128 if dtype.is_complex else torch.float64
    errors = (made[off].to(wide) - wanted[off].to(wide)).abs()
    sizes = wanted[off].to(wide).abs()
    allowed = f"{absolute:g} of the root mean square and {relative:g} of the value"
    return (
        f"{int(off.sum())} of {off.numel()} values are beyond the tolerance of {dtype} "
        f"({allowed if absolute else 'equality'}); the largest error is {float(errors.max()):.3g}, "
        f"and relative to the value {float((errors / sizes).max()):.3g}"
    )
