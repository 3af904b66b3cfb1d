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


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    records.forget()


@use_kernel_forward_from_hub("Twice")
class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@use_kernel_forward_from_hub("Product")
class Product(nn.Module):
    """Slow in its own words, and not to be fused."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(20):
            y = torch.linalg.matrix_exp(x * 0) @ y
        return y


class Waits(nn.Module):
    """Asks the device for a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if x.abs().sum().item() >= 0 else 3)


class Tunes(nn.Module):
    """Times itself in its first call, with events and a wait."""

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
@pytest.mark.parametrize("kernel", [Waits, Tunes], ids=["waits", "tunes itself"])
def test_kernels_that_cannot_be_captured_at_once(policy, kernel):
    """CUDA graphs are cut around what waits, and random numbers are drawn as ever afterwards."""
    _tuned.clear()
    own = model(Twice())
    options = {"policy": policy, "triton.cudagraphs": True}
    with use_kernel_mapping({"Twice": {"cuda": Repository(kernel)}}, inherit_mapping=False):
        steps(torch.compile(own, backend="hubkernels", fullgraph=True, options=options), own)


def test_what_wins_is_used_and_what_loses_is_not():
    own = nn.Sequential(Product(), nn.Linear(64, 64), Twice()).cuda().eval()
    kernels = {"Product": {"cuda": Repository(Same)}, "Twice": {"cuda": Repository(Waits)}}
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
def test_training(policy):
    """A device's own thread runs the backward, and would wait there for the thread that traces."""
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


def test_a_choice_is_kept_for_this_driver():
    kernels = {"Twice": {"cuda": Repository(Same)}}
    options = {"verify": False, "policy": "fastest"}
    with use_kernel_mapping(kernels, inherit_mapping=False), torch.no_grad():
        compiled = torch.compile(model(Twice()), backend="hubkernels", options=options)
        compiled(torch.randn(64, 64, device="cuda"))
    assert re.fullmatch(r"\d+(\.\d+)+", driver_version())
    assert [repr(driver_version()) in key for key in records._winners] == [True]


def test_the_memory_that_measuring_takes(monkeypatch):
    """Weights are those of the layer; what is made up and computed is a few copies of the call.

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
