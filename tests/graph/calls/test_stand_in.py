"""The object that a kernel gets as ``self``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kernelgraph.graph.calls.stand_in import new_stand_in
from kernelgraph.graph.calls.state import State, describe
from kernelgraph.graph.calls.trees import read
from tests.support.layer_states import Everything, Inner, state_of, without_source


def fill(state: State, module: nn.Module) -> Any:
    stand_in = new_stand_in(state)
    assert not tensors_of(stand_in.module)
    for (container, key), path in zip(stand_in.slots, state.operands, strict=True):
        container[key] = read(module, path)
    return stand_in.module


def tensors_of(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Every tensor that hangs on a stand_in."""
    seen = seen if seen is not None else set()
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v, seen)]
    if isinstance(value, (nn.Module, SimpleNamespace)):
        return tensors_of(vars(value), seen)
    return []


def test_stand_in_is_an_instance_of_the_class():
    module = Everything().eval()
    stand_in = fill(state_of("torch.relu(self)", module), module)
    assert type(stand_in) is Everything
    assert type(stand_in.inner) is Inner
    assert torch.equal(stand_in.prop, module.weight)
    assert stand_in.prop is module.weight
    assert not stand_in.inner.dropout.training


def test_stand_in_has_the_parameters_in_their_order():
    module = Everything()
    stand_in = fill(state_of("sum(p.sum() for p in self.parameters())", module), module)
    assert [n for n, _ in stand_in.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert [n for n, _ in stand_in.named_buffers()] == [n for n, _ in module.named_buffers()]
    assert [n for n, _ in stand_in.named_modules()] == [n for n, _ in module.named_modules()]
    assert all(a is b for a, b in zip(stand_in.parameters(), module.parameters(), strict=True))
    assert stand_in.plain is module.plain


def test_stand_in_keeps_the_order_of_more_than_ten_modules():
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(12)])
    for i, block in enumerate(module.blocks):
        block.weight.data.fill_(i)
    for body in ("self.blocks", "self.blocks[0].weight, self.blocks", "self"):
        stand_in = fill(state_of(body, module), module)
        assert [block.weight.item() for block in stand_in.blocks] == list(range(12))


def test_stand_in_keeps_the_order_of_a_module_read_in_part_and_whole():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(1, 1)
            self.a_second = nn.Linear(1, 1)

        def helper(self):
            return list(self.children())

    module = nn.Module()
    module.two = Two()
    stand_in = fill(state_of("self.two.a_second.weight, self.two.helper()", module), module)
    assert [name for name, _ in stand_in.two.named_children()] == ["first", "a_second"]


def test_stand_in_has_parametrized_weights():
    class Doubled(nn.Module):
        def forward(self, x):
            return x * 2

    linear = nn.Linear(2, 2)
    parametrize.register_parametrization(linear, "weight", Doubled())
    module = nn.Module()
    module.inner = linear
    stand_in = fill(state_of("self.inner(x)", module), module)
    x = torch.randn(3, 2)
    assert torch.equal(stand_in.inner(x), linear(x))


def leaf_modules():
    return st.one_of(
        st.builds(nn.Linear, st.just(4), st.just(4), bias=st.booleans()),
        st.builds(nn.LayerNorm, st.just(4), elementwise_affine=st.booleans()),
        st.builds(nn.RMSNorm, st.just(4)),
        st.builds(nn.BatchNorm1d, st.just(4), track_running_stats=st.booleans()),
        st.builds(nn.Dropout, st.just(0.0)),
        st.sampled_from([nn.SiLU(), nn.GELU(), nn.Softmax(-1), nn.PReLU()]),
        st.builds(lambda: nn.Embedding(4, 4)).map(Looked),
    )


class Looked(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table
        self.offset = 1

    def forward(self, x):
        return x + self.table(torch.arange(self.offset, 4)).sum(0)


class Residual(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.factor = 0.5

    def forward(self, x):
        for part in self.inside:
            x = x + part(x) * self.factor
        return x


modules = st.recursive(
    leaf_modules(),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map(lambda ms: nn.Sequential(*ms)),
        st.lists(inner, min_size=1, max_size=13).map(lambda ms: Residual(nn.ModuleList(ms))),
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(modules, st.booleans())
def test_forward_returns_the_same_on_the_stand_in(module, whole):
    module.eval()
    forwards = [without_source if whole else type(module).forward]
    state = State.of(module, forwards)
    stand_in = fill(state, module)
    x = torch.randn(3, 4)
    assert torch.equal(type(module).forward(stand_in, x), module(x))
    assert describe(State.of(module, forwards)) == describe(state)
