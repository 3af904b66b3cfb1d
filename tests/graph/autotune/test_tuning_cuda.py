"""``policy="fastest"`` and CUDA graphs, on a CUDA device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import last_report, use_kernel_forward_from_hub, use_kernel_mapping
from kernelgraph.graph.autotune import contest, records
from kernelgraph.report import Reason
from kernelgraph.selection.devices import driver_version
from tests.support.toy_models import Repository

pytestmark = pytest.mark.cuda


@use_kernel_forward_from_hub("Twice")
class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@use_kernel_forward_from_hub("Product")
class Product(nn.Module):
    """Has a slow reference that no compiler fuses."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(20):
            y = torch.linalg.matrix_exp(x * 0) @ y
        return y


class Synchronizes(nn.Module):
    """Asks for a value of the device on the host."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if x.abs().sum().item() >= 0 else 3)


class Tunes(nn.Module):
    """Times itself in its first call, with events and a synchronization."""

    def forward(self, x: Tensor) -> Tensor:
        if not _tuned:
            start = torch.cuda.Event(enable_timing=True)
            start.record()
            torch.cuda.synchronize()
            _tuned.append(True)
        return x * 2


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


_tuned: list[bool] = []


def model(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), layer, nn.Linear(64, 64), nn.ReLU()).cuda().eval()


def steps(compiled: Any, reference: nn.Module) -> None:
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(64, 64, device="cuda")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x).clone(), reference(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", ["always", "fastest"])
@pytest.mark.parametrize("kernel", [Synchronizes, Tunes], ids=["synchronizes", "tunes itself"])
def test_kernel_that_synchronizes_runs_between_cuda_graphs(policy, kernel):
    """CUDA graphs are cut around kernels that synchronize, and random numbers are still drawn."""
    _tuned.clear()
    own = model(Twice())
    options = {"policy": policy, "triton.cudagraphs": True}
    with use_kernel_mapping({"Twice": {"cuda": Repository(kernel)}}, inherit_mapping=False):
        steps(torch.compile(own, backend="hubkernels", fullgraph=True, options=options), own)


def test_kernels_are_used_exactly_if_they_win():
    own = nn.Sequential(Product(), nn.Linear(64, 64), Twice()).cuda().eval()
    kernels = {"Product": {"cuda": Repository(Same)}, "Twice": {"cuda": Repository(Synchronizes)}}
    with use_kernel_mapping(kernels, inherit_mapping=False), torch.no_grad():
        torch.compile(own, backend="hubkernels", options={"policy": "fastest"})(
            torch.randn(64, 64, device="cuda")
        )
    report = last_report()
    assert report is not None
    assert [d.reason for d in report.decisions] == [Reason.KERNEL, Reason.SLOWER]


class CompilesItsBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Double.apply(x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return double(grad)


@torch.compile
def double(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize("policy", ["always", "fastest"])
def test_kernel_with_a_compiled_backward_trains(policy):
    """In the device's own thread the backward would wait for the lock of the tracing thread."""
    own = model(Twice()).train()
    x = torch.randn(64, 64, device="cuda")
    own(x).square().sum().backward()
    expected = [p.grad for p in own.parameters()]
    own.zero_grad()
    kernels, options = {"Twice": {"cuda": Repository(CompilesItsBackward)}}, {"policy": policy}
    with use_kernel_mapping(kernels, inherit_mapping=False):
        compiled = torch.compile(own, backend="hubkernels", fullgraph=True, options=options)
        compiled(x).square().sum().backward()
    report = last_report()
    assert report is not None
    (decision,) = report.decisions
    assert decision.reason in (Reason.KERNEL, Reason.SLOWER)
    assert "not measured" not in decision.detail
    for parameter, gradient in zip(own.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-3, rtol=1e-3)


def test_winner_is_kept_for_this_driver():
    kernels = {"Twice": {"cuda": Repository(Same)}}
    options = {"verify": False, "policy": "fastest"}
    with use_kernel_mapping(kernels, inherit_mapping=False), torch.no_grad():
        compiled = torch.compile(model(Twice()), backend="hubkernels", options=options)
        compiled(torch.randn(64, 64, device="cuda"))
    assert re.fullmatch(r"\d+(\.\d+)+", driver_version())
    assert [repr(driver_version()) in key for key in records._winners] == [True]


def test_contest_takes_memory_for_a_few_copies_of_the_call(monkeypatch):
    """Weights are those of the layer; inputs and results are a few copies of the call's.

    Inductor clears the cache by a buffer of its size while it chooses among its own kernels.
    """

    @use_kernel_forward_from_hub("Heavy")
    class Heavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, 1024, 1024))  # 256 MB

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight[0].sum()

    class Kernel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight[0].sum()

    peaks: list[int] = []
    own = contest.Contest.winner

    def winner(self: Any) -> Any:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = own(self)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        return made

    monkeypatch.setattr(contest.Contest, "winner", winner)
    heavy = nn.Sequential(Heavy()).cuda().eval()
    x = torch.randn(1024, 1024, device="cuda")  # 4 MB
    kernels = {"Heavy": {"cuda": Repository(Kernel)}}
    with use_kernel_mapping(kernels, inherit_mapping=False), torch.no_grad():
        torch.compile(heavy, backend="hubkernels", options={"policy": "fastest"})(x)
    assert len(peaks) == 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    assert peaks[0] - cache <= 4 * x.numel() * x.element_size() + 2**20
