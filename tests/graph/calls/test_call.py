"""A call as data, and the body that makes it again."""

from __future__ import annotations

import dataclasses
import enum
import keyword
import os
import re
import subprocess
import sys
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernelgraph.graph.calls.call import _unique
from kernelgraph.graph.calls.trees import (
    UnsupportedValue,
    flatten,
    flatten_tensors,
    read,
)
from tests.support.op_calls import call_of

Named = namedtuple("Named", "a b")


@dataclasses.dataclass
class Data:
    a: Any
    b: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any = None


@dataclasses.dataclass
class Checked:
    a: Any

    def __post_init__(self) -> None:
        self.a = self.a + 1


@dataclasses.dataclass
class Made:
    a: Any
    b: Any = dataclasses.field(init=False, default=None)


class Color(enum.Enum):
    RED = "red"


LEAVES = st.one_of(
    st.builds(torch.ones, st.integers(0, 3)),
    st.integers(),
    st.floats(allow_nan=False),
)
CONSTANTS = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.sampled_from([torch.float16, torch.device("cpu"), torch.strided, torch.channels_last]),
    st.sampled_from([Color.RED, 1j, b"b", len, torch.relu, Data]),
)
VALUES = st.recursive(
    st.one_of(LEAVES, CONSTANTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
        st.dictionaries(st.one_of(st.text(max_size=2), st.integers(0, 3)), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
        *(st.builds(cls, inner, inner) for cls in (Named, Data, Frozen)),
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one is other
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (Data, Frozen)):
        return same(vars(one), vars(other))
    return one == other


# --- leaves -------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(VALUES)
def test_unflatten_undoes_flatten(value):
    leaves, template = flatten(value)
    assert all(isinstance(leaf, (Tensor, int, float)) for leaf in leaves)
    assert same(template.unflatten(leaves), value)
    assert len(template.paths()) == len(leaves)
    for path, leaf in zip(template.paths(), leaves, strict=True):
        assert read(value, path) is leaf


@given(VALUES)
def test_flatten_tensors_takes_only_tensors(value):
    leaves, template = flatten_tensors(value)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert same(template.unflatten(leaves), value)


class Words(str):
    pass


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Checked(1), "Checked"),
        (Made(1), "Made"),
        (defaultdict(int), "defaultdict"),
        ({1.5: 2}, "dict"),
        ({True: 2}, "dict"),
        ({1, 2}, "set"),
        (Words("x"), "Words"),
        (np.float32(1), "float32"),
        (object(), "object"),
        ([].append, "builtin_function_or_method"),
        (slice(1), "slice"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_flatten_refuses_other_values_by_type(value, kind):
    message = f"a {kind} is passed or returned: an op takes and gives tensors, numbers and plain"
    for nested in (value, [1, {"a": (value,)}]):
        with pytest.raises(UnsupportedValue, match=re.escape(message)):
            flatten(nested)


# --- names --------------------------------------------------------------------------------------

AWKWARD = [
    *keyword.kwlist,
    *keyword.softkwlist,
    *("self", "out", "int", "float", "bool", "str", "Tensor", "SymInt", "Any", "Device", "Scalar"),
    *("NoneType", "Dict", "Union", "List", "Optional", "Layout", "Generator", "Storage", "Future"),
    *("", "_", "__", "1", "1a", "é", "重み", "a.b", "a b", "a-b", "a_2", "a", "a", "_a", "a_"),
]
library = torch.library.Library("kernelgraph_test_call", "FRAGMENT")


def test_operand_names_are_accepted_by_the_schema_parser():
    names = _unique([*AWKWARD, *AWKWARD])
    assert len(set(names)) == len(names)
    for i, name in enumerate(names):
        library.define(f"named_{i}(Tensor {name}) -> Tensor")
        library.impl(f"named_{i}", lambda x: x.clone(), "CompositeExplicitAutograd")
        op = getattr(torch.ops.kernelgraph_test_call, f"named_{i}").default
        assert op(torch.ones(1)).item() == 1


@given(st.lists(st.text(max_size=4), max_size=8))
def test_operand_names_are_distinct_identifiers(texts):
    names = _unique(texts)
    assert len(set(names)) == len(texts)
    assert all(name.isascii() and name.isidentifier() for name in names)
    assert not any(keyword.iskeyword(name) or name in ("self", "out") for name in names)


# --- the form of a call -------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, act: Any = torch.relu) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.eps = 0.5
        self.act = act

    def forward(self, x, *rest, scale=1.0, **more):
        return self.act(x * self.weight + self.eps) * scale


def test_call_names_its_operands():
    x = torch.ones(2)
    call, operands = call_of(Layer(), x, 3, [x, 4.0], scale=2.0, masks={"a": x}, flag=True)
    assert call.schema == (
        "Tensor x, SymInt arg1, Tensor arg2_0, float arg2_1, float scale, Tensor masks_a, "
        "Tensor weight, float eps"
    )
    assert call.tensors == (0, 2, 5, 6)
    keys = call.argument_paths
    assert keys[:3] == [((0,), (0,)), ((0,), (1,)), ((0,), (2,), (0,))]
    assert keys[-1] == ((1,), ("masks",), ("a",))
    assert [type(o) for o in operands[:6]] == [Tensor, int, Tensor, float, float, Tensor]
    assert [type(o) for o in operands[6:]] == [nn.Parameter, float]


def test_call_includes_the_autocast_region():
    x = torch.ones(2)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = call_of(Layer(), x)
    outside, _ = call_of(Layer(), x)
    assert inside.autocast == ("cpu", torch.bfloat16)
    assert outside.autocast is None
    assert inside.describe() != outside.describe()


X = torch.ones(2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (((X,), {}), ((X, X), {})),
        (((X,), {}), ((), {"x": X})),
        (((X, 1), {}), ((X, 1.0), {})),
        (((X, 1), {}), ((X, True), {})),
        (((X, None), {}), ((X, "None"), {})),
        (((X, (X,)), {}), ((X, [X]), {})),
        (((X, (1, 2)), {}), ((X, torch.Size((1, 2))), {})),
        (((X,), {"a": True}), ((X,), {"a": False})),
        (((X,), {"a": torch.float16}), ((X,), {"a": torch.float32})),
        (((X,), {"a": X, "b": X}), ((X,), {"b": X, "a": X})),
        (((X, (1, 2)), {}), ((X, Named(1, 2)), {})),
        (((X, Data(1)), {}), ((X, Frozen(1)), {})),
        (((X, {"a": 1}), {}), ((X, OrderedDict(a=1)), {})),
        (((X, {"a": 1}), {}), ((X, {1: 1}), {})),
        (((X, torch.relu), {}), ((X, torch.tanh), {})),
        (((X, Color.RED), {}), ((X, "red"), {})),
    ],
)
def test_call_of_another_signature_has_another_description(one, other):
    layer = Layer()

    def described(arguments):
        return call_of(layer, *arguments[0], **arguments[1])[0].describe()

    assert described(one) == described(one)
    assert described(one) != described(other)


def test_call_excludes_numbers_and_sizes():
    one, other = call_of(Layer(), X, 2)[0], call_of(Layer(), torch.ones(5), 3)[0]
    assert one.describe() == other.describe()


def described_here() -> str:
    layer = Layer(lambda x: x * 2)
    return call_of(layer, X, 1, {"b": X, "a": None}, scale=(X, "é"))[0].describe()


def test_call_has_the_same_description_in_another_process():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import tests.graph.calls.test_call as t; print(ascii(t.described_here()))",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONHASHSEED": "12"},
    )
    assert done.stdout.strip() == ascii(described_here())
    assert "0x" not in done.stdout
