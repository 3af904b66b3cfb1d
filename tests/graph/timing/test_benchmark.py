"""Timing in turns, and choosing the fastest, with programs whose times are given."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kernelgraph.graph.timing.benchmark import (
    MARGIN,
    MAX_CALLS,
    ROUNDS,
    SAMPLE_SECONDS,
    Timing,
    fastest,
    measure,
    summary,
)

NEVER = lambda: False  # noqa: E731


class Program:
    """Takes ``seconds`` a call, with noise."""

    def __init__(self, seconds: float, noise: float = 0.0, seed: int = 0) -> None:
        self.seconds, self.noise = seconds, noise
        self.random = random.Random(seed)
        self.calls: list[int] = []

    def __call__(self, calls: int) -> float:
        self.calls.append(calls)
        return sum(self.seconds * (1 + self.random.gauss(0, self.noise)) for _ in range(calls))


def test_steady_programs_take_the_fewest_rounds():
    programs = [Program(1e-3), Program(2e-3)]
    measured = measure(programs, NEVER)
    assert [m.seconds for m in measured] == [pytest.approx(1e-3), pytest.approx(2e-3)]
    assert [len(p.calls) for p in programs] == [
        1 + ROUNDS[0]
    ] * 2  # the first sample finds the number of calls


def test_unsteady_programs_take_more_rounds_up_to_a_limit():
    programs = [Program(1.0, noise=0.5), Program(1.0)]
    measured = measure(programs, NEVER)
    assert len(programs[0].calls) == 1 + ROUNDS[1]
    assert measured[0].error > measured[1].error


def test_samples_are_long_enough_for_a_clock():
    fast, slow, instant = Program(1e-6), Program(10 * SAMPLE_SECONDS), Program(0.0)
    measure([fast, slow, instant], NEVER)
    assert fast.calls[1:] == [MAX_CALLS] * ROUNDS[0]
    assert slow.calls[1:] == [1] * ROUNDS[0]
    assert instant.calls[1:] == [MAX_CALLS] * ROUNDS[0]


def test_one_round_is_made_when_the_time_is_up():
    programs = [Program(1.0), Program(2.0)]
    measured = measure(programs, lambda: True)
    assert [len(p.calls) for p in programs] == [2, 2]
    assert measured == [Timing(1.0, 1.0), Timing(2.0, 2.0)]  # all of a single sample is error


def test_outlier_does_not_change_the_median():
    assert summary([1.0, 1.0, 1.0, 1.0, 50.0]).seconds == 1.0


times = st.builds(Timing, st.floats(1e-6, 1.0), st.one_of(st.just(0.0), st.floats(1e-8, 1e-1)))


@given(st.dictionaries(st.sampled_from("abcd"), times, min_size=1), st.booleans())
@example({"a": Timing(2.0, 0.0), "b": Timing(1.0, 2.0), "c": Timing(1.0, 0.0)}, False)
def test_chosen_program_was_not_measured_to_be_slower(measured, with_reference):
    """The chosen program may be as fast as each of the others within the errors of their times,
    and it is the reference unless another is surely faster by the margin."""
    reference = "a" if with_reference else "reference"
    chosen = fastest(measured, reference)
    others = {name: m for name, m in measured.items() if name != reference}
    floor = measured[reference].low * (1 - MARGIN) if reference in measured else float("inf")
    if chosen == reference:
        assert all(m.high >= floor for m in others.values())
    else:
        assert measured[chosen].high < floor
        assert all(measured[chosen].low <= m.high for m in others.values())


@pytest.mark.parametrize(
    ("kernel", "chosen"),
    [
        (Timing(0.9, 0.0), "kernel"),
        (Timing(0.99, 0.0), "reference"),  # within the margin
        (Timing(0.9, 0.2), "reference"),  # it may be slower
        (Timing(1.5, 0.0), "reference"),
    ],
)
def test_reference_is_chosen_in_doubt(kernel, chosen):
    assert fastest({"reference": Timing(1.0, 0.0), "kernel": kernel}, "reference") == chosen


def test_first_of_equally_fast_kernels_is_chosen():
    measured = {
        "slow": Timing(2.0, 0.01),
        "first": Timing(1.01, 0.02),
        "second": Timing(1.0, 0.02),
        "reference": Timing(3.0, 0.0),
    }
    assert fastest(measured, "reference") == "first"
    assert fastest({"reference": Timing(1.0, 0.0)}, "reference") == "reference"
