"""Constants, paths and templates as JSON: they come back the same, and no other code comes in."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kernelgraph.graph.calls.constants import same
from kernelgraph.graph.calls.trees import Constant, Entries, Leaf, Parts
from kernelgraph.programs.portable_json import (
    NotPortable,
    constant_from_json,
    constant_to_json,
    path_from_json,
    path_to_json,
    template_from_json,
    template_to_json,
)
from tests.support.toy_models import Scale

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(),
    st.sampled_from(
        [
            torch.float32,
            torch.device("cpu"),
            torch.device("cuda", 1),
            torch.strided,
            torch.channels_last,
            torch.nn.functional.silu,
            torch.nn.functional.gelu,
            torch.tanh,
            nn.SiLU,
            nn.Linear,
        ]
    ),
)
CONSTANTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(CONSTANTS)
def test_constant_comes_back_from_its_json(value: Any) -> None:
    """It has the same type, too."""
    made = constant_from_json(json.loads(json.dumps(constant_to_json(value), allow_nan=False)))
    assert same(made, value) or (isinstance(value, complex) and repr(made) == repr(value))


@given(st.sets(st.integers() | st.text(), max_size=4))
def test_set_comes_back_and_has_one_json(value: Any) -> None:
    for kind in (set, frozenset):
        data = constant_to_json(kind(value))
        assert constant_from_json(data) == kind(value)
        assert data == constant_to_json(kind(reversed(list(value))))


def function_of_tests(x: Any) -> Any:
    return x


@pytest.mark.parametrize("value", [function_of_tests, Scale, json.dumps, print, math.sin])
def test_code_outside_of_torch_is_not_portable(value: Any) -> None:
    with pytest.raises(NotPortable, match="is neither data nor torch's own"):
        constant_to_json(value)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "torch.os:system",
        "torch:os.system",
        "torch:os",
        "torch:hub",
        "torchvision:ops",
        "torch.utils.cpp_extension:subprocess.run",
        "torch:nothing",
        "torch.nowhere:silu",
        "torch:__file__",
    ],
)
def test_name_of_other_code_in_torch_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no name in torch|has no|neither a function"):
        constant_from_json({"torch": name})


@pytest.mark.parametrize("data", [{"python": "1"}, {"dict": 3}, {}, {"a": 1, "b": 2}, [1]])
def test_malformed_constant_is_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError)):
        constant_from_json(data)


def test_path_and_template_come_back_from_their_json() -> None:
    path = ("experts", (0,), ("key",), "weight")
    assert path_from_json(json.loads(json.dumps(path_to_json(path)))) == path
    entries = Entries(dict, ((1, Constant((1, "a"))), ("b", Parts(list, (Leaf(1),)))))
    template = Parts(tuple, (Leaf(0), entries))
    assert template_from_json(json.loads(json.dumps(template_to_json(template)))) == template
    for wrong in ([["x", "y"]], [[None]], [3]):
        with pytest.raises(ValueError, match=r"is no step of a path|unpack"):
            path_from_json(wrong)
    with pytest.raises(ValueError, match="is no kind of template"):
        template_from_json(["leaf", "__import__('os')"])
    with pytest.raises(NotPortable, match="a class of its own"):
        template_to_json(Parts(type("Pair", (tuple,), {}), ()))
