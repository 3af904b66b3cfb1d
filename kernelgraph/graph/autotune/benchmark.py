"""Which of several programs is fastest: timing them in turns, and the rule that chooses.

Times of small programs vary by more than what tells them apart, and drift together as a device
warms up. So the programs take turns, each is known by the median of its rounds, and rounds go on
until the medians are known well enough or the time is up. The error of a median is estimated from
the median absolute deviation of the samples, as for a normal distribution.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

MARGIN = 0.02
"""By how much, beyond what is noise, another program has to be faster than the reference."""
PRECISION = 0.01
"""How well a median is to be known, relative to it."""
ROUNDS = (5, 40)
"""The fewest and the most."""
SAMPLE_SECONDS = 2e-3
"""How long one sample is to take: so much longer than the resolution of any clock."""
MOST_CALLS = 32
"""In one sample."""

Sampler = Callable[[int], float]
"""Runs a program so many times in a row, and returns the seconds that all took."""


class Measured(NamedTuple):
    """How long one call takes."""

    seconds: float
    """The median."""
    error: float
    """Of the median, in seconds."""

    @property
    def least(self) -> float:
        """What it may be, too."""
        return max(self.seconds - self.error, 0.0)

    @property
    def most(self) -> float:
        """What it may be, too."""
        return self.seconds + self.error

    def __str__(self) -> str:
        return f"{1e3 * self.seconds:.3g} ms"


def measure(samplers: Sequence[Sampler], time_is_up: Callable[[], bool]) -> list[Measured]:
    """Time programs in turns.

    Args:
        samplers: The programs, each of which has been called before.
        time_is_up: Asked between rounds; what is known then is returned, from one round on.

    Raises:
        Exception: What a program raises.
    """
    fewest, most = ROUNDS
    calls = [_calls(sampler) for sampler in samplers]
    samples: list[list[float]] = [[] for _ in samplers]
    measured: list[Measured] = []
    for done in range(1, most + 1):
        for sampler, count, found in zip(samplers, calls, samples, strict=True):
            found.append(sampler(count) / count)
        measured = [summary(found) for found in samples]
        known = all(m.error <= PRECISION * m.seconds for m in measured)
        if time_is_up() or (done >= fewest and known):
            break
    return measured


def _calls(sampler: Sampler) -> int:
    once = sampler(1)
    return MOST_CALLS if once <= 0 else min(MOST_CALLS, max(1, math.ceil(SAMPLE_SECONDS / once)))


def summary(samples: Sequence[float]) -> Measured:
    """The median of samples and its error; with one sample all of it."""
    median = statistics.median(samples)
    if len(samples) == 1:
        return Measured(median, median)
    deviation = 1.4826 * statistics.median(abs(sample - median) for sample in samples)
    return Measured(median, 1.2533 * deviation / math.sqrt(len(samples)))


def fastest(measured: Mapping[str, Measured], reference: str) -> str:
    """The program to use: the fastest, but ``reference`` wherever that may be as fast.

    Another one is used if it is faster than the reference by more than the errors of both and
    `MARGIN`. Of several others, the first of those which may be as fast as each of them.

    Args:
        measured: The programs, those that are preferred first.
        reference: One of them, or the name of one that cannot be run.
    """
    floor = math.inf
    if reference in measured:
        floor = measured[reference].least * (1 - MARGIN)
    faster = [n for n in measured if n != reference and measured[n].most < floor]
    if not faster:
        return reference
    least_of_most = min(measured[name].most for name in faster)
    return next(name for name in faster if measured[name].least <= least_of_most)
