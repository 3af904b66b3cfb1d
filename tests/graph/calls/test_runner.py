"""The body of an op: a call made again."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph.graph.calls.runner import Runner
from kernelgraph.graph.calls.trees import UnsupportedValue
from tests.graph.calls.test_call import Layer, X
from tests.support.op_calls import call_of


def test_runner_makes_the_call_again():
    layer = Layer()
    call, operands = call_of(layer, X, {"a": [X]}, scale=2.0)
    runner = Runner(Layer.forward, call)
    for factor in (1.0, 3.0):
        given = [o * factor if isinstance(o, Tensor) else o for o in operands]
        assert torch.equal(runner(given), torch.relu(X * factor * factor + 0.5) * 2)


class Joined(nn.Module):
    def forward(self, x, xs, table, flags=()):
        xs.append(x)
        table["new"] = x
        flags.append("seen")
        return (len(xs), sorted(table), len(flags))


def test_runner_makes_new_argument_containers_for_each_call():
    call, operands = call_of(Joined(), X, [X], {"a": X}, flags=["f"])
    runner = Runner(Joined.forward, call)
    assert [runner(operands) for _ in range(3)] == [(2, ["a", "new"], 2)] * 3
    call, operands = call_of(Joined(), X, [], {}, flags=[])  # no leaf in a container
    runner = Runner(Joined.forward, call)
    assert [runner(operands) for _ in range(3)] == [(1, ["new"], 1)] * 3


def test_runner_keeps_threads_apart():
    barrier = threading.Barrier(8)

    def forward(self, x, *rest, scale=1.0, **more):
        barrier.wait()  # all are inside now
        return x * self.weight * scale

    call, (x, _, weight, *numbers) = call_of(Layer(), X, scale=2.0, forward=forward)
    runner = Runner(forward, call)

    def run(i):
        return runner([x * i, 2.0 * i, weight * i, *numbers])

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            results = list(pool.map(run, range(8)))
            assert [r[0].item() for r in results] == [2.0 * i**3 for i in range(8)]


def test_runner_serves_a_forward_that_calls_itself():
    def forward(self, x, *rest, scale=1.0, **more):
        if scale > 0:
            inner = runner([x + 1, scale - 1, *operands[2:]])
            return inner + x * self.weight
        return x * self.weight

    call, operands = call_of(Layer(), X, scale=2.0)
    runner = Runner(forward, call)
    assert runner(operands)[0].item() == 1 + 2 + 3


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_runner_keeps_no_tensor_between_calls(fails, nested):
    def forward(self, *args, **kwargs):
        if fails:
            raise ValueError("toy")
        return torch.zeros(1)

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

        def forward(self, x, y=None):
            return self.inner(x) + next(iter(self.parameters()))

    x = torch.ones(2)
    call, operands = call_of(Held(), x, y=[x + 1] if nested else x + 1)
    runner = Runner(forward, call)
    references = [weakref.ref(o) for o in operands if isinstance(o, Tensor)]
    assert len(references) > 6
    for _ in range(2):
        try:
            runner(operands)
        except ValueError:
            assert fails
    del operands, x
    gc.collect()
    assert [r() for r in references] == [None] * len(references)


def test_observe_names_the_attributes_that_a_call_sets():
    def helper(layer):
        layer.inner.cache = 1
        layer.count = 2

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            helper(self)
            return x

    call, operands = call_of(Outer(), X)
    with pytest.raises(UnsupportedValue, match=r"Outer\.forward sets cache, count of the layer"):
        Runner(Outer.forward, call).observe(operands)


KEPT: Any = {}
WEAKLY_KEPT: Any = weakref.WeakKeyDictionary()


def keep(layer, x):
    KEPT[0] = layer.inner
    return x


def keep_weakly(layer, x):
    WEAKLY_KEPT[layer] = 1
    return x


def keep_method(layer, x):
    KEPT[0] = layer.named_parameters
    return x


def table(layer):
    return KEPT.get(id(layer))


def look_up(layer, x):
    table(layer)
    return x


def keep_in_garbage(layer, x):
    circle: list[Any] = [layer]
    circle.append(circle)
    return x


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()


@pytest.mark.parametrize("forward", [keep, keep_weakly, keep_method, look_up])
def test_observe_finds_a_forward_that_keeps_the_layer(forward):
    call, operands = call_of(Kept(), X, forward=forward)
    with torch.no_grad():
        with pytest.raises(UnsupportedValue, match=f"{forward.__name__} keeps the layer"):
            Runner(forward, call).observe(operands)
        Runner(forward, call).observe(operands, may_keep=True)


def test_observe_allows_garbage_that_refers_to_the_layer():
    call, operands = call_of(Kept(), X, forward=keep_in_garbage)
    with torch.no_grad():
        assert Runner(keep_in_garbage, call).observe(operands) is X


def test_alone_leaves_the_tensors_in_its_stand_in():
    call, operands = call_of(Layer(), X, scale=2.0)
    _, one = Runner(Layer.forward, call).alone(operands)
    _, other = Runner(Layer.forward, call).alone(operands)
    assert one.module is not other.module
    assert any(one.module.weight is v for v in operands)


def test_runner_enters_the_autocast_region_of_its_call():
    layer = nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        call, operands = call_of(layer, X)
    assert Runner(nn.Linear.forward, call)(operands).dtype is torch.bfloat16
    call, operands = call_of(layer, X)
    assert Runner(nn.Linear.forward, call)(operands).dtype is torch.float32
