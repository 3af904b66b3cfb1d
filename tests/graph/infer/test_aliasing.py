"""The order of dimensions, overlaps, and copies that share memory as the originals do."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelgraph.graph.infer.aliasing import (
    copies_of,
    dense_strides,
    order_of,
    overlap,
    owned,
    same_bits,
)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms())
def test_dense_tensor_has_the_strides_of_its_order(sizes, random):
    """A dense tensor with dimensions in any order is laid out by `dense_strides`."""
    order = [*range(len(sizes))]
    random.shuffle(order)
    x = torch.empty([sizes[d] for d in order]).permute([order.index(d) for d in range(len(order))])
    made = torch.empty_strided(x.shape, dense_strides(x.shape, order_of(x)))
    for size, ours, theirs in zip(x.shape, made.stride(), x.stride(), strict=True):
        assert size == 1 or ours == theirs


@given(st.data())
def test_overlap_is_having_an_element_in_common(data):
    """Two views of one memory overlap where a set of addresses does; only doubts say yes."""
    base = torch.arange(48)
    views = []
    for _ in range(2):
        sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
        strides = data.draw(st.lists(st.integers(1, 8), min_size=2, max_size=2))[: len(sizes)]
        offset = data.draw(st.integers(0, 24))
        views.append(base.as_strided(sizes, strides, offset))
    one, other = ({*map(int, view.reshape(-1))} for view in views)
    found = overlap(*views)
    assert found or not one & other
    if views[0].stride() == views[1].stride() and len(one) == views[0].numel():
        assert found == bool(one & other) or views[0].stride()[0] < max(views[0].shape)


def test_chunks_of_one_memory_do_not_overlap():
    for dim in range(3):
        chunks = torch.empty(4, 6, 8).chunk(2, dim)
        assert not overlap(*chunks)
        assert overlap(chunks[0], chunks[0])


def test_owned_results_have_their_orders_and_memory():
    x = torch.arange(6.0).view(2, 3)
    for order, tensor in itertools.product([(), (1, 0)], [x, x.t().contiguous().t(), x[:, :1]]):
        (made,) = owned([tensor], [x], [order])
        assert torch.equal(made, tensor)
        assert made.stride() == dense_strides(tensor.shape, order)
        assert made.data_ptr() != x.data_ptr()


def test_copies_share_memory_as_the_originals_do():
    base, other = torch.arange(6.0), torch.ones(2)
    values = [base[:4], base[2:], other, 3]
    made = copies_of(values, {0})
    assert made[2] is other
    made[0][3] = 99
    assert made[1][1] == 99
    assert torch.equal(base, torch.arange(6.0))
    assert copies_of(values, {2})[:2] == values[:2]


def test_bits_tell_nans_and_zeros_apart():
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, -nan)
    assert same_bits(torch.ones(5)[::5], torch.ones(1))
