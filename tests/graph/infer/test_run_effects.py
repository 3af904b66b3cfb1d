"""What a run writes and draws, beyond what autograd counts."""

from __future__ import annotations

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812

from kernelgraph.graph.infer import run_effects
from kernelgraph.graph.infer.run_effects import Snapshot, watching


def in_place(x, y):
    y.add_(x)


def through_a_view(x, y):
    y.view(-1)[:2].zero_()


def past_autograd(x, y):
    y.data.mul_(2)


def statistics(x, y):
    F.batch_norm(x, y[0], torch.ones(4), training=True)


def nothing(x, y):
    F.batch_norm(x, y[0], torch.ones(4), training=False)
    return x + y


WRITERS = {in_place: {1}, through_a_view: {1}, past_autograd: {1}, statistics: {1}, nothing: set()}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("run", WRITERS)
def test_written_operands_are_found(run, fake):
    operands = [torch.randn(4, 4), torch.ones(4, 4)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    if fake:
        operands = [mode.from_tensor(v) for v in operands]
        with mode, watching(operands) as watch:
            run(*operands)
    else:
        with watching(operands) as watch:
            run(*operands)
    assert watch.written == WRITERS[run]
    assert not watch.drew


def drops_nothing(x):
    F.scaled_dot_product_attention(x, x, x, dropout_p=0.0)
    return F.dropout(x, 0.5, training=False)


DRAWERS = {
    lambda x: F.dropout(x, 0.5): True,
    lambda x: x.clone().normal_(): True,
    lambda x: torch.randperm(3): True,
    lambda x: random.random(): True,
    drops_nothing: False,
}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(("run", "draws"), DRAWERS.items())
def test_draws_are_found(run, draws, fake):
    x, state = torch.randn(1, 1, 4, 4), random.getstate()
    if fake:
        mode = FakeTensorMode()
        x = mode.from_tensor(x)
        with mode, watching([x]) as watch:
            run(x)
        assert random.getstate() == state
    else:
        with watching([x]) as watch:
            run(x)
    assert watch.drew is draws


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps", "expanded", "one element"])
def test_snapshot_sets_memory_and_generators_back(layout):
    x = {
        "contiguous": torch.arange(6.0),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "gaps": torch.arange(12.0)[::2],
        "expanded": torch.arange(3.0).expand(2, 3),
        "one element": torch.arange(4.0)[::4],
    }[layout]
    before, snapshot = x.clone(), Snapshot([x, 3, torch.ones(0)])
    assert snapshot.written() == set()
    array = x.numpy()
    array[..., 0] = 99  # nothing that autograd counts
    drawn = torch.rand(2)
    assert snapshot.written() == {0}
    assert snapshot.generators.changed()
    snapshot.restore({0})
    snapshot.generators.restore()
    assert torch.equal(x, before)
    assert torch.equal(torch.rand(2), drawn)


def test_large_operand_is_watched_without_a_copy(monkeypatch):
    monkeypatch.setattr(run_effects, "_LARGE", 16)
    x = torch.arange(6.0)
    snapshot = Snapshot([x])
    assert snapshot.written() == set()
    x.numpy()[3] = 99
    assert snapshot.written() == {0}
    with pytest.raises(RuntimeError, match="too large to be set back"):
        snapshot.restore({0})
