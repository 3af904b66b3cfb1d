"""The rule that decides where nothing is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kernelgraph
from kernelgraph import cache as disk
from kernelgraph import last_report
from kernelgraph.graph.autotune import candidates
from kernelgraph.report import Reason
from tests.support.costs import Work, kernel
from tests.support.tuned_models import mapping, reasons, run, stack


def test_rule_decides_when_the_time_is_over():
    """Elementwise layers keep their references; others, and unknown ones, use the kernel."""

    @kernelgraph.use_kernel_forward_from_hub("Norm")
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(-1, keepdim=True)) / (x.float().std() + 1).to(x.dtype)

    @kernelgraph.use_kernel_forward_from_hub("Product")
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.transpose(0, 1) @ x

    model = nn.Sequential(Norm(), Product(), Work())
    own = kernel(0.5)
    with mapping(Norm=own, Product=own, Work=own):
        run(model, measure_seconds=0)
    assert reasons() == [Reason.POLICY, Reason.KERNEL, Reason.KERNEL]
    details = [d.detail for d in last_report().decisions]
    assert all("not measured: the 0 s for measuring were over" in d for d in details)
    assert disk.entries() == {}  # no other compile may use a winner by rule


def test_winner_by_rule_is_measured_by_the_next_compile():
    model = stack(1.0)[:1]
    with mapping(Work=kernel(2.0)):
        run(model, measure_seconds=0)
        assert reasons() == [Reason.KERNEL]
        torch.compiler.reset()
        run(model)
        assert reasons() == [Reason.SLOWER]


def test_rule_decides_when_memory_runs_out(monkeypatch):
    def inputs_for(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(candidates, "inputs_for", inputs_for)
    with mapping(Work=kernel(2.0)):
        assert torch.equal(run(stack(1.0)[:1]), torch.full((3, 4), 11.0))
    assert "not measured: out of memory" in last_report().decisions[0].detail


def test_rule_decides_for_a_kernel_that_fails_on_made_up_inputs():
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.numpy().any():
                raise ValueError("only zeros")
            return x + 11

    with mapping(Work=Picky):
        assert torch.equal(run(stack(1.0)[:1]), torch.full((3, 4), 11.0))
    assert "no kernel could be run" in last_report().decisions[0].detail
