"""Timing programs in turns, and the rule that chooses the fastest.

Times of small programs vary by more than the difference between the programs, and drift together
as a device warms up. So the programs take turns, each is known by the median of its rounds, and
rounds go on until the medians are known well enough or the time is up. The error of a median is
estimated from the median absolute deviation of the samples, as for a normal distribution.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

MARGIN = 0.02
"""The part by which another program has to be faster than the reference, beyond what is noise."""
PRECISION = 0.01
"""The error that a median is to have at most, relative to the median."""
ROUNDS = (5, 40)
"""The fewest and the most rounds."""
SAMPLE_SECONDS = 2e-3
"""The time that one sample is to take: so much longer than the resolution of any clock."""
MAX_CALLS = 32
"""The most calls in one sample."""

Sampler = Callable[[int], float]
"""Runs a program so many times in a row, and returns the seconds that all runs took."""


class Timing(NamedTuple):
    """The time that one call of a program takes."""

    seconds: float
    """The median."""
    error: float
    """The error of the median, in seconds."""

    @property
    def low(self) -> float:
        """The lower end of the median's error interval."""
        return max(self.seconds - self.error, 0.0)

    @property
    def high(self) -> float:
        """The upper end of the median's error interval."""
        return self.seconds + self.error

    def __str__(self) -> str:
        return f"{1e3 * self.seconds:.3g} ms"


def measure(samplers: Sequence[Sampler], time_is_up: Callable[[], bool]) -> list[Timing]:
    """Time programs in turns.

    Args:
        samplers: The programs, each of which has been called before.
        time_is_up: Asked after each round; once it is true, no further round begins.

    Returns:
        The times of the programs, after one round at least.

    Raises:
        Exception: Whatever a program raises.
    """
    fewest, most = ROUNDS
    calls = [_calls_per_sample(sampler) for sampler in samplers]
    samples: list[list[float]] = [[] for _ in samplers]
    timings: list[Timing] = []
    for done in range(1, most + 1):
        for sampler, count, found in zip(samplers, calls, samples, strict=True):
            found.append(sampler(count) / count)
        timings = [summary(found) for found in samples]
        precise = all(t.error <= PRECISION * t.seconds for t in timings)
        if time_is_up() or (done >= fewest and precise):
            break
    return timings


def _calls_per_sample(sampler: Sampler) -> int:
    once = sampler(1)
    return MAX_CALLS if once <= 0 else min(MAX_CALLS, max(1, math.ceil(SAMPLE_SECONDS / once)))


def summary(samples: Sequence[float]) -> Timing:
    """Return the median of samples and its error; of one sample, all of it is the error."""
    median = statistics.median(samples)
    if len(samples) == 1:
        return Timing(median, median)
    deviation = 1.4826 * statistics.median(abs(sample - median) for sample in samples)
    return Timing(median, 1.2533 * deviation / math.sqrt(len(samples)))


def fastest(timings: Mapping[str, Timing], reference: str) -> str:
    """Return the program to use: the fastest, but the reference wherever it may be as fast.

    Another program is used if it is faster than the reference by more than the errors of both and
    `MARGIN`. If several are, the first that may be as fast as each of the others is used.

    Args:
        timings: The programs' times; a program that is preferred comes before others.
        reference: The name of the reference, which need not be among them: it may not run.
    """
    limit = math.inf
    if reference in timings:
        limit = timings[reference].low * (1 - MARGIN)
    faster = [n for n in timings if n != reference and timings[n].high < limit]
    if not faster:
        return reference
    lowest_high = min(timings[name].high for name in faster)
    return next(name for name in faster if timings[name].low <= lowest_high)
