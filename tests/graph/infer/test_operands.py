"""Operands made up: small, and yet of the same call."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kernelgraph.graph.infer.operands import Operands, reduced, rescaled
from kernelgraph.graph.infer.sample_inputs import StridedSpec
from tests.support.op_calls import call_of

CPU = torch.device("cpu")


def form(sizes, strides=None, dtype=torch.float32):
    strides = torch.empty(sizes, device="meta").stride() if strides is None else strides
    return StridedSpec(tuple(sizes), tuple(strides), dtype, CPU)


shapes = st.lists(
    st.lists(st.sampled_from([1, 2, 7, 8, 9, 13, 64, 100, 4096]), max_size=4), max_size=4
)


@given(shapes, st.sets(st.sampled_from([9, 64, 16]), max_size=2))
def test_reduced_sizes_keep_their_relations(shapes, fixed):
    """Equal sizes stay equal, others distinct and in order; none grows; last dimensions, fixed
    sizes and those up to 8 stay."""
    before = [form(shape) for shape in shapes]
    after = reduced(before, fixed)
    became = {}
    for old, new in zip(before, after, strict=True):
        assert new.sizes[-1:] == old.sizes[-1:]
        assert new.strides == form(new.sizes).strides
        for n, m in zip(old.sizes, new.sizes, strict=True):
            assert became.setdefault(n, m) == m
            assert m <= n
            assert m == n or (n not in fixed and n > 8)
    assert len(set(became.values())) == len(became)
    free = [n for n in sorted(became) if n > 8 and became[n] != n]
    assert [became[n] for n in free] == sorted(became[n] for n in free)


def test_reduced_sizes_are_small_multiples_of_4():
    x, y, index = form((4, 2048, 64)), form((2048, 1, 64)), form((300, 2), dtype=torch.int64)
    made = reduced([x, y, index, 2048, 300, 7, 0.5], {64})
    assert [f.sizes for f in made[:3]] == [(4, 16, 64), (16, 1, 64), (12, 2)]
    assert made[3:] == [16, 12, 7, 0.5]


layouts = st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "part of a whole"])


@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), layouts, st.data())
def test_rescaled_strides_keep_the_layout(sizes, layout, data):
    """The strides for other sizes are those that the same views would have there."""
    others = [1 if n == 1 else data.draw(st.integers(2, 30)) for n in sizes]

    def strides(sizes):
        if layout == "expanded":
            return torch.empty(1, *sizes[1:], device="meta").expand(sizes).stride()
        if layout == "part of a whole":  # as one of q, k and v in a projection of all three
            whole = torch.empty(*sizes[:-1], 3, sizes[-1], device="meta")
            return whole[..., 1, :].stride()
        tensor = torch.empty(sizes, device="meta")
        if layout == "transposed":
            tensor = torch.empty(sizes[::-1], device="meta").permute(*reversed(range(len(sizes))))
        elif layout == "sliced":
            tensor = torch.empty(sizes[0], 2 * sizes[1], *sizes[2:], device="meta")[:, : sizes[1]]
        return tensor.stride()

    made = rescaled(sizes, strides(sizes), others)
    # The stride of a dimension of one element says nothing.
    for n, found, expected in zip(others, made, strides(others), strict=True):
        assert n == 1 or found == expected


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40)), max_size=4),
    st.data(),
)
def test_rescaled_strides_add_no_overlap(dims, data):
    """Whatever the strides: where no two elements share memory, none do at other sizes."""
    sizes, strides = [n for n, _ in dims], [s for _, s in dims]
    others = [1 if n == 1 else data.draw(st.integers(2, 6)) for n in sizes]
    made = rescaled(sizes, strides, others)

    def overlaps(sizes, strides):
        at = itertools.product(*map(range, sizes))
        places = [sum(i * s for i, s in zip(index, strides, strict=True)) for index in at]
        return len(set(places)) < len(places)

    dense = sorted((s, n) for n, s in dims if n > 1)
    nested = all(s * n <= t for (s, n), (t, _) in itertools.pairwise(dense))
    if nested and all(s > 0 for s, _ in dense):
        assert not overlaps(others, made)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.zero = nn.Parameter(torch.zeros(16))
        self.register_buffer("table", torch.arange(16.0))

    def forward(self, x, index):
        return x * self.weight + self.zero + self.table[index]


def operands(x, index, **kwargs):
    module = Layer()
    call, given_ = call_of(module, x, index)
    return dict(zip(call.names, Operands(call, given_, module, **kwargs).make(0), strict=True))


X, INDEX = torch.randn(100, 16), torch.zeros(100, 1, dtype=torch.int64)


def test_operands_use_the_weights_of_the_layer():
    made = operands(X, INDEX)
    assert torch.equal(made["weight"], torch.ones(16))
    assert made["x"].shape == (100, 16)


def test_trial_operands_disturb_parameters_and_not_buffers():
    made = operands(X, INDEX, trial=True)
    assert 0.1 < made["weight"].std() < 0.6
    assert 0.03 < made["zero"].std() < 0.3
    assert torch.equal(made["table"], torch.arange(16.0))
    assert made["x"].shape == (12, 16)
    assert not made["index"].any()


def test_operands_are_equal_for_equal_seeds():
    module = Layer()
    call, given_ = call_of(module, X, INDEX)
    maker = Operands(call, given_, module, trial=True)
    one, same, other = (
        maker.make(1),
        Operands(call, given_, module, trial=True).make(1),
        maker.make(2),
    )
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one[0], other[0])


# --- indices ------------------------------------------------------------------------------------


def bounds(run, *args):
    """What ``run`` tells of the indices among ``args``."""

    class Any(nn.Module):
        def forward(self, *args):
            return run(*args)

    call, given_ = call_of(Any(), *args)
    maker = Operands(call, given_, Any(), trial=True)
    return maker.index_bounds(lambda made: run(*made))


@pytest.mark.parametrize(
    ("run", "bound"),
    [
        (lambda table, index: table[index], {1: 5}),
        (lambda table, index: nn.functional.embedding(index, table), {1: 5}),
        (lambda table, index: table.index_select(0, index.flatten()), {1: 5}),
        (lambda table, index: nn.functional.one_hot(index, 5), {1: 5}),
        (lambda table, index: nn.functional.one_hot(index, 6), {1: 5}),
        (lambda table, index: sum((index == i) * table[i].sum() for i in range(5)), {1: 5}),
        (lambda table, index: table.sum() * index.cos(), {}),
        (lambda table, index: table * 2, {}),
        (lambda table, index: table[index + 1_000_000], {}),
    ],
)
def test_index_bounds_finds_the_range_of_an_index(run, bound):
    assert bounds(run, torch.randn(5, 16), torch.zeros(40, 2, dtype=torch.int64)) == bound


def test_index_bounds_finds_the_ranges_of_two_indices():
    table = torch.randn(5, 3, 16)
    index = torch.zeros(40, 2, dtype=torch.int64)
    assert bounds(lambda t, i, j: t[i, j], table, index, index) == {1: 5, 2: 3}


@given(
    st.sampled_from([(4,), (40, 2), (3, 1), (), (7, 5, 2)]),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(0, 9),
    st.booleans(),
)
def test_indices_reach_the_bound_and_differ_in_a_row(sizes, dtype, seed, expanded):
    """All are below the bound, one is the last below it, and a row has each once where it can."""
    table, index = torch.randn(6, 16), torch.zeros(sizes, dtype=dtype)
    if expanded and sizes:
        index = index[:1].expand(sizes)
    module = Layer()
    call, given_ = call_of(module, table, index)
    maker = Operands(call, given_, module, trial=True)
    maker.bounds = {1: 6}
    made = maker.make(seed)[1]
    assert made.dtype == dtype
    assert (made.min() >= 0, made.max()) == (True, 5)
    for row in made.reshape(-1, made.shape[-1] if sizes else 1):
        assert len(set(row.tolist())) == len(row) or len(row) > 6 or (expanded and len(sizes) == 1)
