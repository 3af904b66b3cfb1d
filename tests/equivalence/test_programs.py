"""Right kernels change nothing of what random programs do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests.equivalence.paths import PATHS
from tests.equivalence.programs import draw_program
from tests.equivalence.verdicts import general, judge

COUNTS = {
    "eager": 30,
    "aot_eager": 25,
    "inductor": 2,
    "kernelize": 150,
    "kernelize_compile": 15,
    "export": 25,
    "export_strict": 10,
    "rewrite": 60,
}


@pytest.fixture(autouse=True)
def numbers_of_eager_use() -> Iterator[None]:
    """Inductor draws the random numbers that eager use draws."""
    with torch._inductor.config.patch(fallback_random=True):
        yield


@pytest.mark.parametrize("path", COUNTS)
def test_right_kernels_change_nothing(path: str) -> None:
    programs = [draw_program(seed) for seed in range(COUNTS[path])]
    verdicts = [judge(program, PATHS[path]) for program in programs]
    failures = [(v.seed, v.failure) for v in verdicts if v.failure]
    assert not failures, failures
    run = [v for v in verdicts if not v.skipped]
    assert len(run) >= len(verdicts) / 2, Counter(general(v.skipped) for v in verdicts)
    assert sum(v.kernels > 0 for v in run) >= len(run) / 4


def test_kernels_are_right_by_themselves() -> None:
    """Kernels in the place of the references compute the same, but for errors of autograd."""
    programs = [program for seed in range(300) if (program := draw_program(seed)).alone]
    verdicts = [judge(program, PATHS["direct"]) for program in programs]
    failures = [(v.seed, v.failure) for v in verdicts if v.failure]
    assert not [f for f in failures if "Error: " not in f[1]], failures
    assert len(failures) < len(programs) / 4


def test_program_of_a_seed_is_always_the_same() -> None:
    assert draw_program(3).listing == draw_program(3).listing
