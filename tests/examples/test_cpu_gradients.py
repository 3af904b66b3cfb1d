"""The gradients of the C++ kernels are those of the decoder's layers: the kernels may train."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

from kernelgraph.graph.gradients.gradient import Overwrites, wanted_of
from kernelgraph.graph.verify.trial import judge
from tests.support.op_calls import call_of, kernel_of, layer_of
from tests.support.sources import import_example
from tests.support.trials import forget_verdicts

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def layer_and_arguments(
    name: str, dtype: torch.dtype, rows: int
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return a layer of the decoder and arguments for it."""
    decoder = import_example("decoder")
    x = torch.randn(rows, 32).to(dtype)
    if name == "MoEExperts":
        module = decoder.MoEExperts(6, 32, 24)
        for weight in module.parameters():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        index = torch.zeros(rows, 2, dtype=torch.int64)
        return module.to(dtype), (x, index, torch.rand(rows, 2).to(dtype))
    if name == "RMSNorm":
        return decoder.RMSNorm(32, 1e-5).to(dtype), (x,)
    return decoder.SiluAndMul(), (x,)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ["RMSNorm", "SiluAndMul", "MoEExperts"])
def test_kernel_may_train_with_its_own_backward(
    cpu: ModuleType, name: str, dtype: torch.dtype, rows: int
) -> None:
    module, args = layer_and_arguments(name, dtype, rows)
    kernel = kernel_of(getattr(cpu.layers, name))
    call, operands = call_of(module, *args, forward=kernel.forward)
    forget_verdicts()
    wanted = wanted_of(operands, every=True)
    found = judge(layer_of(module), module, kernel, call, operands, wanted)
    assert found.own is not None, found
    assert (found.wrong, found.output, found.contiguous) == ("", "", False)
    assert (found.own.hidden_saves, found.own.overwrites) == (False, Overwrites())
