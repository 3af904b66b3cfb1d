"""How far a kernel's values may be from its layer's: one table, with two bounds for each dtype.

There are two bounds because two questions are asked:

- ``options={"verify": True}`` (`kernelgraph.graph.verify.outputs`) asks whether the results of one
  call are those of the layer. A user asks for it, and wants to hear of every value that is off. So
  each value is compared with the reference's by a narrow `Tolerance`, about that of
  ``torch.testing.assert_close``.
- A trial (`kernelgraph.graph.verify.trial`) asks whether a kernel may train. Nobody asks for it: it
  runs for every kernel that would train, and must not refuse one that computes the same in another
  way. So it allows each value the wide `Closeness`, and lets a run in float64 decide where a value
  is beyond it. What rounding does not do is to scale all values alike, as wrong gradients often
  are: therefore a `Closeness` has a narrow bound on their common factor.

One bound for both would refuse kernels that are right, or let wrong results pass for which a user
has asked to be warned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """The largest distance of a kernel's value ``k`` from the reference's ``r``: ``relative * |r|``
    plus ``absolute`` times the root mean square of all values of that result.

    The absolute part is in units of the result's own size, since a sum of large values that cancel
    is small and no more exact than they.
    """

    relative: float
    absolute: float


class Closeness(NamedTuple):
    """The distance from the layer's values up to which a trial accepts a kernel's without asking
    what the layer computes in higher precision."""

    relative: float
    """Each value may be off by this times itself"""
    absolute: float
    """plus this times the root mean square of all values."""
    factor: float
    """All values together may be scaled by a factor that is this far from 1."""


class Bounds(NamedTuple):
    """The two bounds for a dtype."""

    verify: Tolerance
    """The bound of ``verify=True``."""
    trial: Closeness | None
    """The bound of a trial; None where the other dtypes of a call decide."""


# To add a dtype, add a line. The relative tolerances are those of torch.testing.assert_close, and
# so are the absolute ones of the wide dtypes.
BOUNDS = {
    # A trial allows for layers that compute in float32 whatever they get, as many norms do.
    torch.float64: Bounds(Tolerance(1e-7, 1e-7), Closeness(1e-4, 1e-4, 1e-5)),
    # A trial allows for products in TF32, and for sums in any order.
    torch.float32: Bounds(Tolerance(1.3e-6, 1e-5), Closeness(1e-2, 1e-2, 3e-3)),
    # A float16 layer rounds between its steps, where a kernel may not, or elsewhere: through a few
    # steps and over millions of values this comes to about five times epsilon, which is 0.001.
    torch.float16: Bounds(Tolerance(1e-3, 5e-3), Closeness(2e-2, 2e-2, 3e-2)),
    # As float16, with an epsilon of 0.008.
    torch.bfloat16: Bounds(Tolerance(1.6e-2, 4e-2), Closeness(3e-2, 8e-2, 3e-2)),
    # Only the result itself is rounded to eight bits: by at most one epsilon, which is 0.125 with
    # three bits of mantissa, and 0.25 with two.
    torch.float8_e4m3fn: Bounds(Tolerance(0.125, 0.125), None),
    torch.float8_e4m3fnuz: Bounds(Tolerance(0.125, 0.125), None),
    torch.float8_e5m2: Bounds(Tolerance(0.25, 0.25), None),
    torch.float8_e5m2fnuz: Bounds(Tolerance(0.25, 0.25), None),
}
"""The bounds by dtype. Values of a dtype that is not here must be equal."""
# A complex number is rounded as its parts are.
BOUNDS[torch.complex128] = BOUNDS[torch.float64]
BOUNDS[torch.complex64] = BOUNDS[torch.float32]

TOLERANCES = {dtype: bounds.verify for dtype, bounds in BOUNDS.items()}
"""The tolerances of ``options={"verify": True}``, by the dtype of a result."""

EXACT = Closeness(0.0, 0.0, 1e-9)
"""The bound of a trial for integers and bools: the values must be equal."""


def closeness_of(dtypes: Iterable[torch.dtype]) -> Closeness:
    """Return the bound of a trial for a call with these dtypes: that of the coarsest of them, or
    of float32 if none of them has one."""
    bounds = [BOUNDS[dtype].trial for dtype in dtypes if dtype in BOUNDS]
    found = [closeness for closeness in bounds if closeness is not None]
    if not found:
        return closeness_of([torch.float32])
    return max(found, key=lambda closeness: (closeness.absolute, closeness.factor))
