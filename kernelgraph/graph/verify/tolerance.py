"""Whether what a kernel computes is what its layer does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraph.graph.calls import Template


class Output(NamedTuple):
    """What a forward returned: its form, and the tensors and numbers in it."""

    template: Template
    leaves: list[Any]


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


def difference(kernel: Output, reference: Output) -> str:
    """How what a kernel returned is not what the reference did; empty where it is."""
    if kernel.template != reference.template:
        made, wanted = kernel.template.describe(), reference.template.describe()
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


# --- by other means than the layer, but truly ---------------------------------------------------


class Closeness(NamedTuple):
    """How far what a kernel computes may be from what the layer does, before it takes higher
    precision to decide."""

    relative: float
    """Each value by this times itself"""
    absolute: float
    """and this times the root mean square of all."""
    factor: float
    """And all of them together, by a common factor that is this far from 1."""


EXACTLY = Closeness(0.0, 0.0, 1e-9)
_CLOSENESS = {
    torch.float64: Closeness(1e-4, 1e-4, 1e-5),
    torch.float32: Closeness(1e-2, 1e-2, 3e-3),
    torch.float16: Closeness(2e-2, 2e-2, 3e-2),
    torch.bfloat16: Closeness(3e-2, 8e-2, 3e-2),
}
"""By dtype; wide enough for float32 that is multiplied as TF32, for sums in any order, and for
layers that compute in float32 whatever they get, as many norms do."""


def closeness(dtypes: Iterable[torch.dtype]) -> Closeness:
    """That of a call in which there are ``dtypes``: of the coarsest of them."""
    found = [_CLOSENESS[d] for d in map(_real, dtypes) if d in _CLOSENESS]
    return max(found, key=lambda c: (c.absolute, c.factor), default=_CLOSENESS[torch.float32])


def _real(dtype: torch.dtype) -> torch.dtype:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


Pairs = Iterable[tuple[Tensor, Tensor]]
"""What was made and what it should be, run by run."""


class Deviation(NamedTuple):
    """How far what was made is from what is wanted, where that is finite."""

    values: int
    """How many."""
    size: float
    """The root mean square of what is wanted."""
    made: float
    """That of what was made."""
    factor: float
    """The multiple of what is wanted that is nearest to what was made."""
    error: float
    """The root mean square of the errors."""
    worst: float
    """The largest error."""
    beyond: float
    """The largest that a value is off by more than is allowed relatively to it."""

    @classmethod
    def of(cls, pairs: Pairs, relative: float = 0.0) -> Deviation:
        """Of all pairs together, where a value may be off by ``relative`` times itself."""
        count, wanted2, made2, product, error2, worst, beyond = 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for m, w in _chunks(pairs):
            known = w.isfinite()
            m, w = m[known], w[known]
            if w.numel() == 0:
                continue
            count += w.numel()
            wanted2 += float(w.square().sum())
            made2 += float(m.square().sum())
            product += float((m * w).sum())
            # What should be finite and is not is infinitely wrong.
            errors = (m - w).abs().nan_to_num(nan=math.inf)
            error2 += float(errors.square().sum())
            worst = max(worst, float(errors.max()))
            beyond = max(beyond, float((errors - relative * w.abs()).max()))
        n = max(count, 1)
        root = [math.sqrt(total / n) for total in (wanted2, made2, error2)]
        factor = product / wanted2 if wanted2 else 1.0
        return cls(count, root[0], root[1], factor, root[2], worst, beyond)

    def is_within(self, near: Closeness) -> bool:
        """Whether it is no more than rounding."""
        return (
            self.beyond <= near.absolute * (self.size or 1.0)
            and abs(self.factor - 1) <= near.factor
        )

    def __str__(self) -> str:
        if self.made == 0:
            return "is zero"
        if not math.isfinite(self.error):
            return "is not finite where the layer's is"
        if self.size == 0:
            return "is not zero"
        # What is left once the factor is taken out.
        rest = math.sqrt(max(self.error**2 - ((self.factor - 1) * self.size) ** 2, 0.0))
        if abs(self.factor - 1) > 0.002 and rest <= 0.05 * abs(self.factor) * self.size:
            return f"is {self.factor:.3g} times the layer's"
        if self.error >= 0.01 * self.size:
            return f"is off by {self.error / self.size:.2g} of its size"
        return f"is off by up to {self.worst / self.size:.2g} of its size"


_CHUNK = 2**20


def _chunks(pairs: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
    """The values in float64, never so many at a time that memory counts."""
    for pair in pairs:
        made, wanted = map(_flat, pair)
        count = 1 + wanted.numel() // _CHUNK
        for some, others in zip(made.chunk(count), wanted.chunk(count), strict=True):
            yield some.double(), others.double()


def _flat(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if tensor.device.type not in ("cpu", "cuda"):  # where there may be no float64
        tensor = tensor.cpu()
    return tensor.reshape(-1)


_MOST = 0.25
"""That rounding may come to, of the size of what is rounded."""


def is_close(
    made: list[Tensor],
    wanted: list[Tensor],
    near: Closeness,
    truth: Callable[[], list[Tensor] | None],
) -> Deviation | None:
    """How far a kernel's values are off; None where they are right.

    Where they are not near the layer's, which are rounded as well, what is decisive is whether
    they are about as near to the truth as those.

    Args:
        made: The kernel's, run by run.
        wanted: The layer's.
        near: What counts as near.
        truth: Gives the layer's in higher precision; None where there are none.
    """
    found = Deviation.of(zip(made, wanted, strict=True), near.relative)
    if found.is_within(near):
        return None
    if (true := truth()) is not None:
        theirs = Deviation.of(zip(made, true, strict=True))
        own = Deviation.of(zip(wanted, true, strict=True))
        few = 4 / math.sqrt(max(own.values, 1))  # values tell little of how large errors are
        sane = own.error <= _MOST * own.size  # or else it is no truth: random numbers, say
        near_too = theirs.error <= (2 + few) * own.error and theirs.worst <= (4 + few) * own.worst
        if sane and near_too:
            return None
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one form have the same in them."""
    flat = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*flat)
