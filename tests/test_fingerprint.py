"""A hash of a function differs where it computes something else; processes agree on it."""

from __future__ import annotations

import dataclasses
import enum
import functools
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernelgraph.fingerprint import code_hash


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


@dataclasses.dataclass
class Config:
    factor: int
    inner: Any = None


class Plain:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, module: Any, x: Any) -> Any:
        return x * self.factor

    def scale(self, module: Any, x: Any) -> Any:
        return x * self.factor


def closing_over(value: Any) -> Any:
    def forward(self: Any, x: Any) -> Any:
        return x, value

    return forward


def by_default(value: Any) -> Any:
    def forward(self: Any, x: Any, y: Any = value) -> Any:
        return x, y

    return forward


def local_class(value: Any) -> type:
    class Local:
        factor = value

        def scale(self, x: Any) -> Any:
            return x * self.factor

    return Local


def local_function(value: Any) -> Any:
    return lambda x: x * value


def scale(self: Any, x: Any, factor: int) -> Any:
    return x * factor


VALUES = {
    "numbers": (1, 2),
    "types of numbers": (1, 1.0),
    "bools": (1, True),
    "texts": ("a", "b"),
    "tuples": ((1, 2), (1, 3)),
    "lists": ([1, 2], [1, 3]),
    "list and tuple": ([1], (1,)),
    "dicts": ({"a": 1}, {"a": 2}),
    "nested": ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}),
    "sets": ({1, 2}, {1, 3}),
    "enums": (Kind.ONE, Kind.TWO),
    "dataclasses": (Config(1), Config(2)),
    "inside dataclasses": (Config(1, [2]), Config(1, [3])),
    "objects": (Plain(1), Plain(2)),
    "tensors": (torch.ones(2), torch.zeros(2)),
    "dtypes of tensors": (torch.ones(2), torch.ones(2).double()),
    "dtypes": (torch.float32, torch.float64),
    "functions": (local_function(1), local_function(2)),
    "classes": (local_class(1), local_class(2)),
    "partials": (functools.partial(scale, factor=1), functools.partial(scale, factor=2)),
    "bound methods": (Plain(1).scale, Plain(2).scale),
    "modules": (torch.nn.Dropout(0.1), torch.nn.Dropout(0.2)),
    "slices": (slice(1, 2), slice(1, 3)),
}
OF_ONE_PROCESS = {"large tensors": torch.ones(20_000), "iterators": iter([1])}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("make", [closing_over, by_default])
def test_hash_tells_values_apart(name, make):
    one, other = VALUES[name]
    assert code_hash(make(one)) != code_hash(make(other))


@pytest.mark.parametrize("name", [n for n in VALUES if n != "modules"])
def test_hash_of_equal_code_and_values_is_equal(name):
    one, _ = VALUES[name]
    assert code_hash(closing_over(one)) == code_hash(closing_over(one))


def test_hash_is_the_same_where_fakes_take_the_place_of_tensors():
    forward = closing_over([torch.ones(2), torch.ones(3, 2).t()])
    with FakeTensorMode():
        made = code_hash(forward)
    assert made == code_hash(closing_over([torch.ones(2), torch.ones(3, 2).t()]))


@pytest.mark.parametrize("name", OF_ONE_PROCESS)
def test_value_that_cannot_be_hashed_counts_as_itself(name):
    value = OF_ONE_PROCESS[name]
    assert code_hash(closing_over(value)) == code_hash(closing_over(value))
    other = torch.ones(20_000) if name == "large tensors" else iter([1])
    assert code_hash(closing_over(value)) != code_hash(closing_over(other))


@pytest.mark.parametrize(
    "make",
    [
        lambda factor: functools.partial(scale, factor=factor),
        Plain,
        lambda factor: Plain(factor).scale,
        lambda factor: torch.nn.Dropout(factor / 10),
    ],
    ids=["partial", "callable object", "bound method", "module"],
)
def test_hash_of_a_callable_that_is_no_function_has_its_state(make):
    assert code_hash(make(1)) != code_hash(make(2))


SOURCE = """
import enum, functools, torch
from torch.nn import functional as F
{globals}

class Kind(enum.Enum):
    ONE = 1

def helper(x):
    return x * {number}

def make(value, names):
    def forward(self, x):
        return helper(F.silu(x)) if names else [y for y in value if y in TABLE]
    return forward

forward = make([1, Kind.ONE, torch.float32, torch.ones(2)], {{"a", "b", "c"}})
"""


def hashed(tmp_path: Path, seed: int, number: int = 3, globals_: str = "TABLE = (1, 2)") -> str:
    """The hash of a function in a module of another process."""
    (tmp_path / "kernel.py").write_text(SOURCE.format(number=number, globals=globals_))
    code = """
        import kernel
        from kernelgraph.fingerprint import code_hash
        print(code_hash(kernel.forward))
    """
    run = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


def test_hash_is_the_same_in_each_process_and_follows_what_is_called(tmp_path):
    first = hashed(tmp_path, 1)
    assert hashed(tmp_path, 2) == first
    assert hashed(tmp_path, 1, number=4) != first
    assert hashed(tmp_path, 1, globals_="TABLE = (1, 3)") != first
    logger = "import logging; TABLE = logging.getLogger()"
    assert hashed(tmp_path, 1, globals_=logger) == hashed(tmp_path, 2, globals_=logger)
