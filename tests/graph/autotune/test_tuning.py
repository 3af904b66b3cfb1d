"""``policy="fastest"``: which implementation wins, with layers whose times are given."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kernelgraph
from kernelgraph import Mode, kernelize, last_report, use_kernel_mapping
from kernelgraph import cache as disk
from kernelgraph.graph.timing.benchmark import MARGIN
from kernelgraph.report import Reason
from tests.support.costs import Work, kernel, spend
from tests.support.tuned_models import (
    FASTEST,
    compiled,
    mapping,
    measured_layers,
    reasons,
    run,
    stack,
)


@pytest.mark.parametrize(
    ("seconds", "used"),
    [(0.5, True), (2.0, False), (1.0, False), (1.0 - MARGIN / 2, False)],
    ids=["faster", "slower", "as fast", "hardly faster"],
)
def test_kernel_is_used_if_it_is_faster_by_the_margin(seconds, used):
    model = stack(1.0)[:1]
    with mapping(Work=kernel(seconds)):
        assert torch.equal(run(model), torch.full((3, 4), 11.0 if used else 1.0))
    assert reasons() == [Reason.KERNEL if used else Reason.SLOWER]
    assert "kernel" in last_report().decisions[0].detail
    assert f"{1e3 * seconds:.3g} ms" in str(last_report())


def test_layers_of_other_cost_are_decided_on_their_own():
    with mapping(Work=kernel(0.5)):
        run(stack(1.0, 0.1, 1.0))
    assert reasons() == [Reason.KERNEL, Reason.SLOWER, Reason.KERNEL]


def test_equal_calls_of_a_deep_model_are_measured_once(monkeypatch):
    found = measured_layers(monkeypatch)
    with mapping(Work=kernel(0.5)):
        run(stack(*[1.0] * 8))
    assert found == ["Work"]
    assert reasons() == [Reason.KERNEL] * 8


SECONDS = st.sampled_from([0.1, 0.5, 0.97, 1.0, 1.03, 2.0, 9.0])


@settings(max_examples=25)
@given(st.lists(st.tuples(SECONDS, st.booleans()), min_size=1, max_size=5), SECONDS, st.booleans())
def test_each_layer_gets_its_kernel_exactly_if_that_is_faster(layers, seconds, dynamic):
    """The times of the layer and the kernel decide, whatever else is in the model."""
    torch.compiler.reset()
    disk.clear()
    model = nn.Sequential()
    for own, apart in layers:
        model.append(Work(own))
        if apart:
            model.append(nn.Identity())
    used = [seconds < own * (1 - MARGIN) for own, _ in layers]
    with mapping(Work=kernel(seconds)), torch.no_grad():
        compiled_model = torch.compile(
            model, backend="hubkernels", fullgraph=True, dynamic=dynamic, options=FASTEST
        )
        out = compiled_model(torch.zeros(3, 4))
    assert [reason is Reason.KERNEL for reason in reasons()] == used
    assert torch.equal(out, torch.full((3, 4), float(sum(11 if u else 1 for u in used))))


def test_fastest_of_several_kernels_is_used():
    kernels = {
        Mode.INFERENCE | Mode.TORCH_COMPILE: kernel(0.8, 10),
        Mode.FALLBACK: kernel(0.4, 20),
    }
    with mapping(Work=kernels):
        assert torch.equal(run(stack(1.0)[:1]), torch.full((3, 4), 21.0))
    assert "Kernel20" in last_report().decisions[0].kernel


@pytest.mark.parametrize("grad", [False, True])
def test_kernels_that_read_other_state_compete(grad):
    """The second kernel reads a buffer that neither the layer nor the first kernel reads."""

    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return spend(x * self.weight + 1, 0.9)

    class Second(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return spend(x * self.weight + self.one, 0.2)

    model = stack(1.0)[:1]
    model[0].register_buffer("one", torch.ones(4))
    mode = Mode.TRAINING if grad else Mode.INFERENCE
    with mapping(Work={mode | Mode.TORCH_COMPILE: First, Mode.FALLBACK: Second}):
        out = (
            compiled(model, inner="inductor")(torch.zeros(3, 4))
            if grad
            else run(model, inner="inductor")
        )
    assert torch.equal(out, torch.ones(3, 4))
    assert "Second" in last_report().decisions[0].kernel
    if grad:
        out.sum().backward()
        assert torch.equal(model[0].weight.grad, torch.zeros(4))


def test_second_kernel_that_cannot_be_used_is_no_candidate(caplog):
    class Impure(nn.Module):
        def __init__(self) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x

    kernels = {Mode.INFERENCE | Mode.TORCH_COMPILE: kernel(0.8), Mode.FALLBACK: Impure}
    with mapping(Work=kernels), caplog.at_level(logging.INFO, "kernelgraph"):
        assert torch.equal(run(stack(1.0)[:1]), torch.full((3, 4), 11.0))
    assert "is no candidate for Work" in caplog.text


def test_layer_inside_a_reference_that_wins_gets_its_kernel():
    @kernelgraph.use_kernel_forward_from_hub("Outer")
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.work = Work(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.work(x)

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return spend(x, 50.0) + 100

    with mapping(Outer=Slow, Work=kernel(0.5)):
        assert torch.equal(run(nn.Sequential(Outer())), torch.full((3, 4), 11.0))
    assert sorted(str(reason) for reason in reasons()) == sorted(
        map(str, [Reason.SLOWER, Reason.KERNEL])
    )


def test_kernelized_layer_keeps_its_kernel():
    model = stack(1.0)[:1]
    with mapping(Work=kernel(5.0)):
        kernelize(model, mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
        assert torch.equal(run(model), torch.full((3, 4), 11.0))


def test_dynamic_sizes_are_measured_at_those_of_the_trace():
    with mapping(Work=kernel(0.5)):
        model = torch.compile(stack(1.0)[:1], backend="hubkernels", dynamic=True, options=FASTEST)
        with torch.no_grad():
            assert model(torch.zeros(6, 4)).shape == (6, 4)
            assert torch.equal(model(torch.zeros(9, 4)), torch.full((9, 4), 11.0))
    assert reasons() == [Reason.KERNEL]


def test_graph_in_which_kernels_lost_is_that_without_kernels():
    """It is the same graph, node by node."""
    graphs: list[str] = []

    def inner(graph_module: Any, inputs: Any) -> Any:
        graphs.append(str(graph_module.graph))
        return graph_module.forward

    model = stack(1.0, 1.0)
    with mapping(Work=kernel(2.0)):
        run(model, inner=inner)
    torch.compiler.reset()
    with use_kernel_mapping({}, inherit_mapping=False):
        run(model, inner=inner)
    assert graphs[-1] == graphs[-2]


def test_fastest_is_the_default_policy(monkeypatch):
    monkeypatch.delenv("KERNELGRAPH_POLICY")
    model = stack(1.0)[:1]
    with mapping(Work=kernel(2.0)), torch.no_grad():
        out = torch.compile(model, backend="hubkernels", options={"inner": "eager"})(
            torch.zeros(3, 4)
        )
    assert torch.equal(out, torch.full((3, 4), 1.0))


def test_log_has_two_lines_for_each_contest(caplog):
    with mapping(Work=kernel(0.5)), caplog.at_level(logging.INFO, "kernelgraph"):
        run(stack(1.0, 2.0))
    assert "choosing for Work, 1 of 2 kinds of call; 0.0 of 30 s for measuring" in caplog.text
    assert "chosen for Work: op (kernel 500 ms, reference 1e+03 ms)" in caplog.text


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("seconds", "reason"), [(0.5, Reason.KERNEL), (2.0, Reason.SLOWER)])
def test_graph_in_parts_is_tuned_part_by_part(seconds, reason):
    """A DistributedDataParallel has several graphs: each call is measured in its own."""
    size = 600  # a linear layer of this size is larger than a bucket of 1 MiB

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = Work(1.0, size), Work(3.0, size)
            self.linear = nn.Linear(size, size)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.linear(self.first(x)))

    torch.manual_seed(0)
    model, x = Chain(), torch.randn(3, size)
    expected = model(x)
    with mapping(Work=kernel(seconds, plus=0)):
        parallel = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
        parts: list[Any] = []

        def inner(graph_module: Any, inputs: Any) -> Any:
            parts.append(graph_module)
            return torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)

        out = torch.compile(parallel, backend="hubkernels", options={**FASTEST, "inner": inner})(x)
    torch.testing.assert_close(out, expected)
    assert len(parts) > 2
    assert reasons() == [reason, Reason.KERNEL]
    out.sum().backward()
    assert model.first.weight.grad is not None
