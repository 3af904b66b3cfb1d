"""Forms of calls as JSON: what comes back is what went in, and nothing else comes in."""

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
from kernelgraph.graph.calls.runner import Runner
from kernelgraph.graph.calls.trees import Constant, Entries, Leaf, Parts
from kernelgraph.programs.portable_call import (
    call_from_json,
    call_to_json,
    check_needs_no_code,
)
from kernelgraph.programs.portable_json import (
    NotPortable,
    constant_from_json,
    constant_to_json,
    path_from_json,
    path_to_json,
    template_from_json,
    template_to_json,
)
from tests.support.op_calls import call_of
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
def test_constants_come_back(value: Any) -> None:
    """A constant read from its JSON is the constant that was written, its type included."""
    made = constant_from_json(json.loads(json.dumps(constant_to_json(value), allow_nan=False)))
    assert same(made, value) or (isinstance(value, complex) and repr(made) == repr(value))


@given(st.sets(st.integers() | st.text(), max_size=4))
def test_sets_come_back_in_one_order(value: Any) -> None:
    for kind in (set, frozenset):
        data = constant_to_json(kind(value))
        assert constant_from_json(data) == kind(value)
        assert data == constant_to_json(kind(reversed(list(value))))


def somebodys(x: Any) -> Any:
    return x


@pytest.mark.parametrize("value", [somebodys, Scale, json.dumps, print, math.sin])
def test_somebodys_code_is_no_data(value: Any) -> None:
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
def test_no_other_code_comes_in_under_torchs_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no name in torch|has no|neither a function"):
        constant_from_json({"torch": name})


@pytest.mark.parametrize("data", [{"python": "1"}, {"dict": 3}, {}, {"a": 1, "b": 2}, [1]])
def test_other_constants_are_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError)):
        constant_from_json(data)


def test_paths_and_templates() -> None:
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


class Nested(nn.Linear):
    """A class of the model's, on one of torch's, with modules and containers in it."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.act = nn.SiLU()
        self.inner = Scale(3)
        self.scales = [1.5, 2.5]
        self.tables = {"a": torch.ones(3)}


def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.act(nn.functional.linear(x, self.weight, self.bias))
    return y * self.inner.weight * self.scales[1] + self.tables["a"]


def test_a_kernel_runs_on_what_stands_in_for_the_layer() -> None:
    """On the classes that come back it computes what it does on the layer."""
    torch.manual_seed(0)
    module, x = Nested(), torch.randn(2, 3)
    call, operands = call_of(module, x, forward=forward)
    data = json.loads(json.dumps(call_to_json(call, [p for p, _ in call.state.constants])))
    made = call_from_json(data)
    assert (made.names, made.types, made.arguments) == (call.names, call.types, call.arguments)
    classes = dict(made.state.nodes)
    assert classes[()] is not Nested
    assert issubclass(classes[()], nn.Linear)  # type: ignore[arg-type]
    assert classes[("act",)] is nn.SiLU
    assert call_from_json(data).state.nodes == made.state.nodes
    torch.testing.assert_close(Runner(forward, made)(operands), forward(module, x))


def _calls_inner(self: Any, x: Any) -> Any:
    return self.inner(x)


def _calls_helper(self: Any, x: Any) -> Any:
    return self.helper(x)


def _calls_forward(self: Any, x: Any) -> Any:
    return self.inner.forward(x)


@pytest.mark.parametrize(
    ("kernel", "uses"),
    [(_calls_inner, "inner"), (_calls_helper, "helper"), (_calls_forward, "inner.forward")],
)
def test_what_a_kernel_uses_of_the_models_code(kernel: Any, uses: str) -> None:
    class Helped(Nested):
        def helper(self, x: Any) -> Any:
            return x

    with pytest.raises(NotPortable, match=rf"the kernel uses self\.{uses}, which is code of"):
        check_needs_no_code(Helped(), kernel)


def test_torchs_own_code_may_be_used() -> None:
    check_needs_no_code(Nested(), forward)
