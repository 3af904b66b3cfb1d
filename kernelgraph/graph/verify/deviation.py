"""The comparison of a trial: how far a kernel's values are from the layer's, over all its runs.

The question is not whether single values differ, but whether the difference is rounding: see
`kernelgraph.graph.verify.tolerance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kernelgraph.graph.infer import same_bits
from kernelgraph.graph.verify.tolerance import Closeness

Pairs: TypeAlias = "Iterable[tuple[Tensor, Tensor]]"
"""A tensor that was made and the one that is wanted, for each run."""


class Deviation(NamedTuple):
    """How far the values that were made are from those that are wanted, where these are finite."""

    values: int
    """The number of values."""
    size: float
    """The root mean square of the values that are wanted."""
    made: float
    """The root mean square of the values that were made."""
    factor: float
    """The factor by which the values that are wanted come nearest to those that were made."""
    error: float
    """The root mean square of the errors."""
    worst: float
    """The largest error."""
    beyond: float
    """The largest error beyond what is allowed relatively to the value."""

    @classmethod
    def of(cls, pairs: Pairs, relative: float = 0.0) -> Deviation:
        """Return the deviation of all pairs together.

        Args:
            pairs: What was made and what is wanted.
            relative: The part of itself that a value may be off by, for `beyond`.
        """
        count, wanted2, made2, product, error2, worst, beyond = 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for m, w in _chunks(pairs):
            finite = w.isfinite()
            m, w = m[finite], w[finite]
            if w.numel() == 0:
                continue
            count += w.numel()
            wanted2 += float(w.square().sum())
            made2 += float(m.square().sum())
            product += float((m * w).sum())
            # A value that should be finite and is not is infinitely wrong.
            errors = (m - w).abs().nan_to_num(nan=math.inf)
            error2 += float(errors.square().sum())
            worst = max(worst, float(errors.max()))
            beyond = max(beyond, float((errors - relative * w.abs()).max()))
        n = max(count, 1)
        root = [math.sqrt(total / n) for total in (wanted2, made2, error2)]
        factor = product / wanted2 if wanted2 else 1.0
        return cls(count, root[0], root[1], factor, root[2], worst, beyond)

    def is_within(self, allowed: Closeness) -> bool:
        """Whether the deviation is no more than rounding."""
        return (
            self.beyond <= allowed.absolute * (self.size or 1.0)
            and abs(self.factor - 1) <= allowed.factor
        )

    def __str__(self) -> str:
        """The deviation as a predicate, such as ``is 2 times the layer's``."""
        if self.made == 0:
            return "is zero"
        if not math.isfinite(self.error):
            return "is not finite where the layer's is"
        if self.size == 0:
            return "is not zero"
        # The error that is left once the factor is taken out.
        rest = math.sqrt(max(self.error**2 - ((self.factor - 1) * self.size) ** 2, 0.0))
        if abs(self.factor - 1) > 0.002 and rest <= 0.05 * abs(self.factor) * self.size:
            return f"is {self.factor:.3g} times the layer's"
        if self.error >= 0.01 * self.size:
            return f"is off by {self.error / self.size:.2g} of its size"
        return f"is off by up to {self.worst / self.size:.2g} of its size"


_CHUNK = 2**20


def _chunks(pairs: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the values in float64, in pieces that are small beside the tensors."""
    for pair in pairs:
        made, wanted = map(_flat, pair)
        count = 1 + wanted.numel() // _CHUNK
        for some, others in zip(made.chunk(count), wanted.chunk(count), strict=True):
            yield some.double(), others.double()


def _flat(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if tensor.device.type not in ("cpu", "cuda"):  # other devices may have no float64
        tensor = tensor.cpu()
    return tensor.reshape(-1)


_MAX_ROUNDING = 0.25
"""The part of the size of a result that rounding may come to."""


def find_deviation(
    made: Sequence[Tensor],
    wanted: Sequence[Tensor],
    allowed: Closeness,
    in_float64: Callable[[], Sequence[Tensor] | None],
) -> Deviation | None:
    """Return how far a kernel's values are off; None if they are right.

    The layer's values are rounded too. So where the kernel's are not close to them, both are
    compared with the layer's values in float64: a kernel that is about as near to these as the
    layer is right.

    Args:
        made: The kernel's values, run by run.
        wanted: The layer's values, run by run.
        allowed: The deviation up to which values are close.
        in_float64: Returns the layer's values in float64; None if it cannot compute them.
    """
    found = Deviation.of(zip(made, wanted, strict=True), allowed.relative)
    if found.is_within(allowed):
        return None
    if (true := in_float64()) is not None:
        kernels = Deviation.of(zip(made, true, strict=True))
        layers = Deviation.of(zip(wanted, true, strict=True))
        slack = 4 / math.sqrt(max(layers.values, 1))  # few values say little of the errors' size
        # Else float64 does not give the same in more digits: the layer draws random numbers, say.
        comparable = layers.error <= _MAX_ROUNDING * layers.size
        as_near = (
            kernels.error <= (2 + slack) * layers.error
            and kernels.worst <= (4 + slack) * layers.worst
        )
        if comparable and as_near:
            return None
    return found


def all_agree(
    made: Sequence[Tensor | None], wanted: Sequence[Tensor | None], allowed: Closeness
) -> bool:
    """Whether tensors of two runs are the same but for rounding; None counts as zeros."""
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
        if not Deviation.of([(one, other)], allowed.relative).is_within(allowed):
            return False
    return True
