"""Contests: the candidates that are measured, also for layers that break graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernelgraph import last_report, use_kernel_forward_from_hub
from kernelgraph.graph.autotune import candidates, records
from kernelgraph.report import Reason
from tests.support.costs import CLOCK, Odd, Steps, Work, kernel, spend
from tests.support.tuned_models import compiled, mapping, run, stack


def test_traced_kernel_is_a_candidate(monkeypatch):
    """The op costs more here, so the graph has the ops that the kernel is traced into."""
    own = candidates.program

    def program(region: Any, untuned: Any, candidate: Any) -> Any:
        made = own(region, untuned, candidate)
        return Slowly(made) if candidate.implementation is records.Implementation.OP else made

    class Slowly(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *inputs: Any) -> Any:
            CLOCK.now += 0.2
            return self.inner(*inputs)

    monkeypatch.setattr(candidates, "program", program)
    graphs: list[Any] = []

    def inner(graph_module: Any, inputs: Any) -> Any:
        graphs.append(graph_module)
        return graph_module.forward if hasattr(graph_module, "graph") else graph_module

    with mapping(Work=kernel(0.5, can_torch_compile=True)):
        assert torch.equal(run(stack(1.0)[:1], inner=inner), torch.full((3, 4), 11.0))
    assert "hubkernels" not in str(graphs[-1].graph)
    assert "spend" in str(graphs[-1].graph)
    assert last_report().decisions[0].detail.startswith("traced; kernel traced 500 ms")


class WritesItsArgument(nn.Module):
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return spend(x.add_(10).clone(), 0.5)


class Turns(nn.Module):
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return spend(x.t().contiguous().t() + 10, 0.5)


@pytest.mark.parametrize("hub_layer", [WritesItsArgument, Turns])
def test_traced_kernel_is_no_candidate_if_it_does_something_else(hub_layer):
    """What an op keeps from the graph, writes and other strides, would be in it."""
    with mapping(Work=hub_layer):
        run(stack(1.0)[:1], inner="aot_eager")
    assert last_report().decisions[0].detail.startswith("kernel 500 ms")
    assert "traced" not in last_report().decisions[0].detail


@pytest.mark.parametrize("verify", [True, False])
def test_traced_kernel_is_no_candidate_with_verify(verify):
    with mapping(Work=kernel(0.5, plus=0, can_torch_compile=True)):
        run(stack(1.0)[:1], verify=verify)
    assert ("traced" in last_report().decisions[0].detail) is not verify


def test_kernel_wins_unmeasured_if_the_layer_would_break_a_full_graph():
    with mapping(Odd=kernel(5.0)):
        out = run(nn.Sequential(Odd(1.0)), inner="aot_eager")
    assert torch.equal(out, torch.full((3, 4), 11.0))
    assert "cannot be traced" in last_report().decisions[0].detail


@pytest.mark.parametrize(("seconds", "used"), [(0.5, True), (5.0, False)])
def test_layer_that_breaks_the_graph_is_measured_uncompiled(seconds, used):
    with mapping(Odd=kernel(seconds)):
        out = run(nn.Sequential(Odd(1.0)), fullgraph=False, inner="aot_eager")
    assert torch.equal(out, torch.full((3, 4), 11.0 if used else 1.0))


def test_report_says_why_a_layer_that_breaks_the_graph_keeps_its_reference():
    """Dynamo traces the layer for itself then, and gives the backend no graph of it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Sequential(nn.Linear(4, 4), Odd(0.5))
            self.unknown = nn.ModuleList([Steps()])
            self.after = Work()

        def forward(self, x):
            return self.unknown[0](self.after(self.before(x)))

    with mapping(Odd=kernel(2.0), Work=kernel(0.5)):
        run(Net().eval(), fullgraph=False)
    found = {d.path: (d.layer, d.reason) for d in last_report().decisions}
    assert found == {
        "before.1": ("Odd", Reason.SLOWER),
        "after": ("Work", Reason.KERNEL),
        "unknown.0": ("Steps", Reason.NO_LAYER),
    }


def test_winner_with_graph_breaks_is_not_used_for_a_full_graph():
    """The winners with and without ``fullgraph`` are kept apart."""
    model = nn.Sequential(Odd(1.0))
    with mapping(Odd=kernel(5.0)):
        broken = run(model, fullgraph=False, inner="aot_eager")
        torch.compiler.reset()
        whole = run(model, inner="aot_eager")
    assert torch.equal(broken, torch.full((3, 4), 1.0))
    assert torch.equal(whole, torch.full((3, 4), 11.0))


def test_random_numbers_are_those_without_a_contest():
    model = nn.Sequential(Work(1.0), nn.Dropout(0.5))
    with mapping(Work=kernel(2.0)), torch.no_grad():
        torch.manual_seed(1)
        first = compiled(model)(torch.ones(3, 4))
        torch.manual_seed(1)
        assert torch.equal(first, model(torch.ones(3, 4)))


def test_weights_are_unchanged_by_a_contest():
    class Spoils(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return spend(x * self.weight + 11, 0.1)

    model = stack(1.0)[:1]
    before = model[0].weight.detach().clone()
    with mapping(Work=Spoils):
        run(model)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None


# --- what is run for real gets real tensors -------------------------------------------------------


@use_kernel_forward_from_hub("Pair")
class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return spend(x * 2, 1.0), x + 1


class FastPair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return spend(x * 2, 0.5), x + 1


def asking_for_memory(graph_module: Any, inputs: Any) -> Any:
    """Compiles as Inductor does for CUDA: the program asks each input for its memory."""

    def run(*inputs: Any) -> Any:
        assert all(v.data_ptr() for v in inputs if isinstance(v, Tensor))
        return graph_module(*inputs)

    return run


@pytest.mark.parametrize("grad", [False, True])
def test_results_of_an_earlier_op_are_made_up_as_tensors(grad):
    pair = Pair()

    def twice(x: Tensor) -> Tensor:
        return pair(pair(x)[0].unsqueeze(0))[0]

    f = torch.compile(
        twice,
        backend="hubkernels",
        options={"policy": "fastest", "inner": asking_for_memory, "verify_gradients": False},
    )
    with mapping(Pair=FastPair):
        for size in (3, 5):
            x = torch.ones(size, 4, requires_grad=grad)
            with torch.set_grad_enabled(grad):
                assert torch.equal(f(x), 4 * torch.ones(1, size, 4))
    details = [decision.detail for decision in last_report().decisions]
    assert details
    assert not any("not measured" in detail for detail in details), details


def test_fake_input_is_refused_before_anything_native_sees_it():
    graph_module = torch.fx.symbolic_trace(lambda x: -x)
    candidates.check_real(graph_module, [torch.ones(2), 3, 2.5])
    fake = FakeTensorMode().from_tensor(torch.ones(2))
    for wrong in (fake, (fake,), torch.ones(2, device="meta"), torch._to_functional_tensor(fake)):
        with pytest.raises(candidates.Unmeasurable, match="input 1 of the region is a"):
            candidates.check_real(graph_module, [torch.ones(2), wrong])
    graph_module.register_buffer("held", torch.ones(2, device="meta"))
    with pytest.raises(candidates.Unmeasurable, match="has no memory"):
        candidates.check_real(graph_module, [torch.ones(2)])
