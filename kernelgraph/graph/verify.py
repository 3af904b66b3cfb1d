"""``options={"verify": True}``: whether a kernel computes what the layer does.

While a call is compiled, the kernel and the reference are both run for real, once for each form
and sizes of call: on inputs that are made up (`samples`), of the call's dtypes, sizes and strides
(for a dynamic size what it is in the call that is traced), and on the layer's own weights where
they are at hand. Both get copies, one at a time, so that neither can spoil the weights. What they
return is compared, and not the gradients.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernelgraph.graph import _torch, samples
from kernelgraph.graph.call import Call, Template, take_leaves
from kernelgraph.graph.choice import KeepReference, Site
from kernelgraph.graph.paths import read
from kernelgraph.graph.runner import Runner
from kernelgraph.graph.shapes import describe_output
from kernelgraph.graph.told import remember
from kernelgraph.kernel import Kernel
from kernelgraph.report import Reason

logger = logging.getLogger("kernelgraph")


class Tolerance(NamedTuple):
    """How far a kernel's value ``k`` may be from the reference's ``r``: by ``relative * |r|``, and
    by ``absolute`` times the root mean square of all the values of that result."""

    relative: float
    absolute: float


_SINGLE = Tolerance(1.3e-6, 1e-5)
_DOUBLE = Tolerance(1e-7, 1e-7)
TOLERANCES = {
    torch.float64: _DOUBLE,
    torch.complex128: _DOUBLE,
    torch.float32: _SINGLE,
    torch.complex64: _SINGLE,
    torch.float16: Tolerance(1e-3, 5e-3),
    torch.bfloat16: Tolerance(1.6e-2, 4e-2),
    torch.float8_e4m3fn: Tolerance(0.125, 0.125),
    torch.float8_e4m3fnuz: Tolerance(0.125, 0.125),
    torch.float8_e5m2: Tolerance(0.25, 0.25),
    torch.float8_e5m2fnuz: Tolerance(0.25, 0.25),
}
"""By the dtype of a result; others must be equal.

The relative ones are those of ``torch.testing.assert_close``, and so are the absolute ones of the
wide dtypes. The absolute ones are in units of the result's own size, since a sum of large values
that cancel is small and no more exact than they. A float16 or bfloat16 layer rounds what is
between its steps, where a kernel may not, or elsewhere: through a few steps and over millions of
values this comes to about five times the dtype's epsilon. To eight bits only the result itself is
rounded, by one epsilon at most.
"""

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
            that are not within `TOLERANCES`.
    """
    maker = _Operands(call, operands, site.module)
    key = (kernel.layer, kernel.origin, site.layer, call.describe(), maker.form)
    if (verdict := _verdicts.get(key)) is None:
        verdict = _compare(site, kernel, call, maker)
        remember(_verdicts, key, verdict)
    if verdict:
        raise KeepReference(site, Reason.WRONG, f"{kernel}: {verdict}")


class _Operands:
    """Makes the operands of the runs: equal ones each time."""

    def __init__(self, call: Call, operands: Sequence[Any], module: nn.Module) -> None:
        self._given = operands
        self._operands = list(operands)
        self._weights: dict[int, Tensor] = {}
        for i, path in enumerate(call.state.tensors, len(call.argument_paths)):
            value: Tensor = read(module, path)
            if not _torch.is_fake(value) and value.device.type != "meta":
                self._weights[i] = value
                self._operands[i] = None  # nothing to make up
        self._known = samples.sizes_now(operands)
        self.form = tuple((*map(self._size, samples.measures(v)), *_kind(v)) for v in operands)

    def _size(self, value: Any) -> Any:
        return _torch.evaluate(value, self._known)

    def apart(self) -> contextlib.AbstractContextManager[None]:
        return samples.apart(self._given)

    def make(self) -> list[Any]:
        made = samples.make(self._operands, self._size, seed=0, bools=True)
        for i, weight in self._weights.items():
            made[i] = weight.detach().clone()
        return made


def _kind(value: Any) -> tuple[Any, ...]:
    return (value.dtype, value.device) if isinstance(value, Tensor) else (type(value),)


def _compare(site: Site, kernel: Kernel, call: Call, maker: _Operands) -> str:
    """What is wrong with the kernel; empty where nothing is, or nothing can be told."""
    who = f"kernel {kernel} for layer {site.layer.layer_name} at {site.path or '(model)'}"
    try:
        reference = _run(Runner(site.layer.reference, call), maker)
    except Exception as error:
        logger.warning("%s is not verified: the reference raised %s", who, _text(error))
        return ""
    try:
        made = _run(Runner(kernel.forward, call), maker)
    except torch.OutOfMemoryError as error:
        logger.warning("%s is not verified: %s", who, _text(error))
        return ""
    except Exception as error:
        return f"raised {_text(error)}"
    with _torch.for_real():
        return difference(made, reference)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class Output(NamedTuple):
    """What a forward returned: its form, and the tensors and numbers in it."""

    template: Template
    leaves: list[Any]


def _run(runner: Runner, maker: _Operands) -> Output:
    leaves: list[Any] = []
    with maker.apart():  # each draws the same random numbers
        template = take_leaves(runner.observe(maker.make()), leaves)
    return Output(template, leaves)


def difference(kernel: Output, reference: Output) -> str:
    """How what a kernel returned is not what the reference did; empty where it is."""
    if kernel.template != reference.template:
        made, wanted = describe_output(kernel.template), describe_output(reference.template)
        return f"returned {made}, and the layer {wanted}"
    found = []
    for number, (made, wanted) in enumerate(zip(kernel.leaves, reference.leaves, strict=True)):
        where = f"result {number}: " if len(kernel.leaves) > 1 else ""
        if isinstance(made, Tensor) and isinstance(wanted, Tensor):
            if _form(made) != _form(wanted):
                found.append(f"{where}returned a {_form(made)}, and the layer a {_form(wanted)}")
            elif wrong := _error(made, wanted):
                found.append(where + wrong)
        elif type(made) is not type(wanted) or made != wanted:
            found.append(f"{where}returned {made!r}, and the layer {wanted!r}")
    return "; ".join(found)


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}"


def _error(made: Tensor, wanted: Tensor) -> str:
    """How ``made`` is beyond the tolerance around ``wanted``, a tensor of the same form."""
    dtype = wanted.dtype
    relative, absolute = TOLERANCES.get(dtype, Tolerance(0, 0))
    if dtype.is_floating_point and dtype.itemsize < 4:
        made, wanted = made.float(), wanted.float()
    if absolute:
        finite = wanted[wanted.isfinite()]
        scale = float(finite.abs().square().mean().sqrt()) if finite.numel() else 0.0
        near = torch.isclose(made, wanted, relative, absolute * (scale or 1.0), equal_nan=True)
    else:
        near = made == wanted
    if near.all():
        return ""
    off = ~near
    wide = torch.complex128 if dtype.is_complex else torch.float64
    errors = (made[off].to(wide) - wanted[off].to(wide)).abs()
    sizes = wanted[off].to(wide).abs()
    allowed = f"{absolute:g} of the root mean square and {relative:g} of the value"
    return (
        f"{int(off.sum())} of {off.numel()} values are beyond the tolerance of {dtype} "
        f"({allowed if absolute else 'equality'}); the largest error is {float(errors.max()):.3g}, "
        f"and relative to the value {float((errors / sizes).max()):.3g}"
    )
