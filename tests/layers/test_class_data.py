"""Counters and lists of a program, which runs of a trial leave as they were."""

from __future__ import annotations

from typing import Any

import torch

from kernelgraph.layers import program_data_kept

STEPS = 1
SEEN: dict[str, Any] = {"log": [1], "last": None}
READY = False
TABLE: dict[str, Any] = {"weight": torch.ones(1)}


class Base:
    count = 0
    ready = False
    log: list[Any] = [{"a": 1}]  # noqa: RUF012
    last = None


class Layer(Base):
    total = 0.0


def step() -> None:
    global STEPS, READY
    STEPS += 1
    READY = True
    SEEN["log"].append(2)
    SEEN["last"] = 3
    TABLE["made"] = torch.ones(1)


def test_counters_and_containers_of_classes_are_kept() -> None:
    with program_data_kept([Layer]):
        Base.count += 1
        Layer.total += 2.0
        Base.log[0]["a"] = 2
        Base.log.append(3)
    assert (Base.count, Layer.total, Base.log) == (0, 0.0, [{"a": 1}])
    assert Layer.count == 0


def test_flags_and_what_holds_other_than_data_stay() -> None:
    def forward() -> None:
        return step()

    with program_data_kept([Layer], [forward, step]):
        step()
        Base.ready = True
    assert (STEPS, SEEN, READY) == (1, {"log": [1], "last": None}, True)
    assert Base.ready
    assert set(TABLE) == {"weight", "made"}


def test_variables_around_a_function_are_kept() -> None:
    seen: list[int] = []
    count = 0

    def forward() -> None:
        nonlocal count
        count += 1
        seen.append(count)

    for _ in range(2):
        with program_data_kept([], [forward]):
            forward()
            forward()
    assert (seen, count) == ([], 0)
    forward()
    assert (seen, count) == ([1], 1)


def test_data_is_kept_where_the_code_raises() -> None:
    try:
        with program_data_kept([Layer]):
            Layer.total += 1
            raise ArithmeticError
    except ArithmeticError:
        pass
    assert Layer.total == 0
