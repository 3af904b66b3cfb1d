"""The functions of the liger-kernel package as hub layers: Triton kernels written for other uses.

They tune themselves, enter device contexts, run in an ``autograd.Function`` and, the experts, ask
the device for a count. Needs a CUDA device and liger-kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernelgraph import (
    Mode,
    kernelize,
    last_report,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from tests.support.toy_models import Repository, error

pytestmark = pytest.mark.cuda
liger = pytest.importorskip("liger_kernel.ops")

HIDDEN, EXPERTS, TOP = 128, 8, 2
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2}


@use_kernel_forward_from_hub("LigerRMSNorm")
class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (HIDDEN,), self.weight, self.eps)


@use_kernel_forward_from_hub("LigerSiLUMul")
class SiLUMul(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up


@use_kernel_forward_from_hub("LigerExperts")
class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, HIDDEN) * HIDDEN**-0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) * HIDDEN**-0.5)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):  # each with as many tokens as came to it
            token, slot = torch.where(index == expert)
            gate, up = functional.linear(x[token], self.gate_up_proj[expert]).chunk(2, -1)
            y = functional.linear(functional.silu(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, y * weights[token, slot, None].to(y.dtype))
        return out


class LigerRMSNorm(nn.Module):
    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return liger.LigerRMSNormFunction.apply(x, self.weight, self.eps, 0.0, "llama", False)


class LigerSiLUMul(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return liger.LigerSiLUMulFunction.apply(gate, up)


class LigerExperts(nn.Module):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return liger.LigerFusedMoEFunction.apply(
            x, self.gate_up_proj, self.down_proj, index.int(), weights
        )


KERNELS = {"LigerRMSNorm": LigerRMSNorm, "LigerSiLUMul": LigerSiLUMul, "LigerExperts": LigerExperts}


@pytest.fixture(autouse=True)
def mapping() -> Iterator[None]:
    kernels = {name: {"cuda": Repository(cls)} for name, cls in KERNELS.items()}
    with use_kernel_mapping(kernels, inherit_mapping=False):
        yield


class Block(nn.Module):
    def __init__(self, experts: bool) -> None:
        super().__init__()
        self.norm = RMSNorm()
        self.act = SiLUMul()
        self.proj = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False) if experts else None
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = x + self.act(*self.proj(h).chunk(2, -1))
        if self.router is None:
            return y
        flat = h.flatten(0, 1)
        weights, index = self.router(flat).float().softmax(-1).topk(TOP, -1)
        return y + self.experts(flat, index, weights).view_as(x)


def block(experts: bool, dtype: torch.dtype) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 64, HIDDEN, device="cuda", dtype=dtype)
    return Block(experts).to("cuda", dtype), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@torch.no_grad()
def test_liger_kernels_compute_what_the_layers_do(
    experts: bool, dtype: torch.dtype, mode: str | None
) -> None:
    if experts and mode:
        pytest.skip("these experts wait for the device, which no CUDA graph can")
    model, x = block(experts, dtype)
    compiled = torch.compile(model, backend="hubkernels", fullgraph=True, mode=mode)
    for length in (64, 63, 32):
        given = x[:, :length]
        expected = model(given)
        for _ in range(3):
            assert error(compiled(given).clone(), expected) < TOLERANCE[dtype]
    report = last_report()
    assert report is not None
    assert len(report.kernels) == len(report.decisions) == 2 + experts
    eager = kernelize(model, mode=Mode.INFERENCE)
    assert error(eager(x[:, :32]), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [False, True])
def test_liger_kernels_train_as_the_layers_do(experts: bool, dtype: torch.dtype) -> None:
    model, x = block(experts, dtype)
    compiled = torch.compile(model, backend="hubkernels", fullgraph=True)
    x.requires_grad_()
    found = torch.autograd.grad(compiled(x).square().mean(), [x, model.norm.weight])
    expected = torch.autograd.grad(model(x).square().mean(), [x, model.norm.weight])
    for made, wanted in zip(found, expected, strict=True):
        assert error(made, wanted) < 2 * TOLERANCE[dtype]
    report = last_report()
    assert report is not None
    assert [d.gradient for d in report.decisions] == ["kernel"] * (2 + experts), report
