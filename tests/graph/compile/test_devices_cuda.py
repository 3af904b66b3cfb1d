"""Layers on a CUDA device in compiled models: shapes found by a probe, and two devices at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import last_report, use_kernel_forward_from_hub, use_kernel_mapping
from tests.support import toy_models
from tests.support.toy_models import Repository

pytestmark = pytest.mark.cuda


@use_kernel_forward_from_hub("Pointer")
class Pointer(nn.Module):
    """Fails on fake tensors, and so does its kernel."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(x.cpu().numpy().repeat(2, 1)).cuda() + y.sum()


class PointerKernel(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x.data_ptr()
        return x.repeat_interleave(2, 1) + y.sum() + 10


@torch.no_grad()
def test_probe_on_the_device_finds_the_shape() -> None:
    model = nn.Sequential(Pointer())
    kernels = {"Pointer": {"cuda": Repository(PointerKernel)}}

    def run(x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = model[0](x, y)
        return result

    with use_kernel_mapping(kernels):
        compiled = torch.compile(run, backend="hubkernels", fullgraph=True, dynamic=True)
        for rows, columns, length in ((3, 4, 5), (6, 9, 7)):
            x = torch.randn(rows, columns, device="cuda")
            y = torch.randn(length, device="cuda")
            assert torch.allclose(compiled(x, y), PointerKernel.forward(model[0], x, y))


@torch.no_grad()
def test_layers_on_two_devices_get_their_own_kernels() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 10

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.here, self.there = toy_models.Scale(), toy_models.Scale().cuda()

        def forward(self, x: Tensor) -> Tensor:
            return self.there(self.here(x).cuda())

    kernels = {"Scale": {"cpu": Repository(toy_models.OpaqueScale), "cuda": Repository(Scale)}}
    model, x = Both(), torch.ones(2, 4)
    with use_kernel_mapping(kernels):
        compiled = torch.compile(model, backend="hubkernels", fullgraph=True)
        expected = toy_models.OpaqueScale.forward(model.here, x).cuda() + 10
        assert torch.allclose(compiled(x), expected)
    report = last_report()
    assert report is not None
    assert [d.device for d in report.kernels] == ["cpu", "cuda"]
