"""Keys of eager calls: which calls share a decision."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernelgraph.eager.call_keys import MAX_LAYOUTS, CallTable, FormKeys
from kernelgraph.graph.calls.state import State


class Layer(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.eps, self.extra, self.inner = 1e-6, None, None
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner.weight
        return self.weight, self.eps, self.extra


class Pair(NamedTuple):
    one: Any
    other: Any


def put(table: CallTable[Any], layer: Layer, args: Any, kwargs: Any, value: Any) -> None:
    table.put(layer, State.of(layer, [Layer.forward]), args, kwargs, value)


X = torch.ones(2, 3)

CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((X,), {}),
    ((X, X), {}),
    (((X, X),), {}),
    (([X, X],), {}),
    ((Pair(X, X),), {}),
    (({"a": X},), {}),
    ((OrderedDict(a=X),), {}),
    (({"b": X},), {}),
    ((), {"x": X}),
    ((), {"y": X}),
    ((X.double(),), {}),
    ((X.clone().requires_grad_(),), {}),
    ((nn.Parameter(X, requires_grad=False),), {}),
    ((X[:1],), {}),
    ((X.t().contiguous().t(),), {}),
    ((X.flatten(),), {}),
    ((X.to_sparse(),), {}),
    ((X.to("meta"),), {}),
    ((1,), {}),
    ((1.0,), {}),
    ((True,), {}),
    (("1",), {}),
    ((None,), {}),
    ((torch.float32,), {}),
    ((torch.relu,), {}),
    ((torch.sigmoid,), {}),
    (({1},), {}),
]


def test_calls_that_differ_in_anything_have_different_keys() -> None:
    table: CallTable[int] = CallTable()
    layer = Layer()
    for number, (args, kwargs) in enumerate(CALLS):
        assert table.get(layer, args, kwargs) is None
        put(table, layer, args, kwargs, number)
    for number, (args, kwargs) in enumerate(CALLS):
        assert table.get(layer, args, kwargs) == number


def test_values_in_tensors_are_not_part_of_the_key() -> None:
    table: CallTable[str] = CallTable()
    put(table, Layer(), (X,), {}, "found")
    assert table.get(Layer(weight=nn.Parameter(torch.zeros(3))), (X + 1,), {}) == "found"


@pytest.mark.parametrize("kind", ["cpu"])
def test_an_autocast_region_is_part_of_the_key(kind: str) -> None:
    table: CallTable[Any] = CallTable()
    layer = Layer()
    put(table, layer, (X,), {}, None)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(kind, dtype):
            assert table.get(layer, (X,), {}) is None
            put(table, layer, (X,), {}, dtype)
    with torch.autocast(kind, torch.bfloat16):
        assert table.get(layer, (X,), {}) is torch.bfloat16
        with torch.autocast(kind, enabled=False):
            assert table.get(layer, (X,), {}) is None


ATTRIBUTES: list[dict[str, Any]] = [
    {},
    {"eps": 1e-5},
    {"eps": 1},
    {"extra": 1},
    {"extra": True},
    {"extra": torch.ones(3)},
    {"extra": torch.ones(3, requires_grad=True)},
    {"extra": [torch.ones(3)]},
    {"extra": [torch.ones(3), 1]},
    {"extra": [1, 2]},
    {"extra": {"a": 1}},
    {"weight": nn.Parameter(torch.ones(4))},
    {"weight": nn.Parameter(torch.ones(3), requires_grad=False)},
    {"inner": nn.Linear(2, 3)},
    {"inner": nn.Linear(3, 2)},
    {"inner": nn.Bilinear(2, 3, 3)},
]


@settings(max_examples=50)
@given(st.permutations(range(len(ATTRIBUTES))))
def test_layers_that_differ_in_what_they_read_have_different_keys(order: list[int]) -> None:
    table: CallTable[int] = CallTable()
    layers = [Layer(**attributes) for attributes in ATTRIBUTES]
    for number in order:
        assert table.get(layers[number], (X,), {}) is None
        put(table, layers[number], (X,), {}, number)
    for number, attributes in enumerate(ATTRIBUTES):
        for layer in (layers[number], Layer(**attributes)):
            assert table.get(layer, (X,), {}) == number


def test_a_changed_layer_has_another_key() -> None:
    table: CallTable[str] = CallTable()
    layer = Layer()
    put(table, layer, (X,), {}, "found")
    layer.eps = 2.0
    assert table.get(layer, (X,), {}) is None
    layer.eps = 1e-6
    assert table.get(layer, (X,), {}) == "found"
    layer.weight.requires_grad_(False)
    assert table.get(layer, (X,), {}) is None
    layer.weight.requires_grad_(True)
    layer.double()
    assert table.get(layer, (X,), {}) is None
    del layer.weight
    assert table.get(layer, (X,), {}) is None


def test_table_size_is_bounded() -> None:
    table: CallTable[int] = CallTable()
    layer = Layer()
    for number in range(3000):
        put(table, layer, (number,), {}, number)
    assert len(table) <= 1024
    assert table.get(layer, (2999,), {}) == 2999
    for number in range(3 * MAX_LAYOUTS):
        other = Layer(inner=type(f"Inner{number}", (nn.Linear,), {})(3, 3))
        put(table, other, (X,), {}, number)
    assert len(table) <= MAX_LAYOUTS


def test_a_value_that_no_call_can_be_repeated_with_counts_by_its_type() -> None:
    class Odd:
        tensor: Tensor = X

    table: CallTable[str] = CallTable()
    layer = Layer()
    put(table, layer, (Odd(),), {}, "odd")
    assert table.get(layer, (Odd(),), {}) == "odd"
    assert table.get(layer, (object(),), {}) is None


# --- forms ---------------------------------------------------------------------------------------


class Flagged(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        vars(self).update(attributes)


def forms(*calls: Any) -> int:
    """Return how many forms there are among calls, each a layer and its arguments."""
    keys = FormKeys()
    for _ in range(2):  # the flags that all layers of a class have are known the second time
        found = {keys.of(module, args, {}) for module, *args in calls}
    return len(found)


class TestFormKeys:
    def test_layouts_of_tensors_are_told_apart(self) -> None:
        layer, x = Flagged(), torch.ones(4, 4)
        assert forms((layer, x), (layer, x * 2), (layer, nn.Parameter(x))) == 1
        assert forms((layer, x), (layer, x.t()[:, :]), (layer, x.double()), (layer, x[:2])) == 4
        assert forms((layer, [x]), (layer, (x,)), (layer, {"x": x}), (layer, x, None)) == 4

    def test_values_of_numbers_are_not_told_apart_but_dimensions_are(self) -> None:
        layer, x = Flagged(), torch.ones(4)
        assert forms(*((layer, x, n) for n in range(100, 200))) == 1
        assert forms(*((layer, x, n / 3) for n in range(9))) == 1
        assert forms(*((layer, x, n) for n in (-1, 0, 1))) == 3

    def test_flags_of_the_layer_are_told_apart_and_counters_are_not(self) -> None:
        x = torch.ones(4)
        layers = [Flagged(p=0.0), Flagged(p=0.5), Flagged(p=0.25), Flagged(p=0.25).eval()]
        assert forms(*((layer, x) for layer in layers)) == 3
        assert forms(*((Flagged(steps=n), x) for n in range(1, 9))) == 1
        assert forms((Flagged(), x), (Flagged().double(), x), (Flagged(kind="a"), x)) == 3

    def test_autocast_regions_are_told_apart(self) -> None:
        keys, layer, x = FormKeys(), Flagged(), torch.ones(4)
        outside = keys.of(layer, (x,), {})
        with torch.autocast("cpu", torch.bfloat16):
            assert keys.of(layer, (x,), {}) != outside
        assert keys.of(layer, (x,), {}) == outside
        assert keys.of(layer, (), {"x": x}) != outside
