"""The Triton kernels of the example repository in compiled models, on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernelgraph import (
    CUDAProperties,
    Device,
    LocalLayerRepository,
    Mode,
    kernelize,
    last_report,
    use_kernel_mapping,
)
from kernelgraph.selection.devices import target_of
from tests.support.sources import import_example
from tests.support.toy_models import error

pytestmark = pytest.mark.cuda


LAYERS = ("RMSNorm", "SiluAndMul", "MoEExperts")


TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


ROUTED = 0.2
"""In bfloat16 a token whose two best experts are nearly equal may go to either."""


@pytest.fixture(scope="module")
def repository() -> Path:
    root: Path = import_example("kernels/build").build(backends=("cuda",))
    return root


@pytest.fixture(autouse=True)
def mapping(repository: Path) -> Iterator[None]:
    kernels = {name: LocalLayerRepository(repository, layer_name=name) for name in LAYERS}
    with use_kernel_mapping({n: {"cuda": k} for n, k in kernels.items()}, inherit_mapping=False):
        yield


def decoder(experts: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    example = import_example("decoder")
    model = example.Decoder(example.DecoderConfig(layers=2, experts=experts)).to("cuda", dtype)
    return model, torch.randint(1024, (2, 48), device="cuda")


def tolerance(experts: int, dtype: torch.dtype) -> float:
    return ROUTED if experts and dtype is torch.bfloat16 else TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_decoder_infers_with_kernels(inner: str, experts: int, dtype: torch.dtype) -> None:
    model, input_ids = decoder(experts, dtype)
    compiled = torch.compile(model, backend="hubkernels", fullgraph=True, options={"inner": inner})
    with torch.no_grad():
        for length in (48, 47, 31):
            ids = input_ids[:, :length]
            assert error(compiled(ids), model(ids)) < tolerance(experts, dtype)
    report = last_report()
    assert report is not None
    assert len(report.kernels) == len(report.decisions) == 7


@pytest.mark.parametrize("experts", [0, 4])
def test_decoder_trains_with_kernels(experts: int) -> None:
    model, input_ids = decoder(experts, torch.float32)
    compiled = torch.compile(model, backend="hubkernels", fullgraph=True)
    compiled(input_ids).square().mean().backward()
    made = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(input_ids).square().mean().backward()
    for name, p in model.named_parameters():
        assert made[name] is not None
        assert error(made[name], p.grad) < 5e-3, name


@pytest.mark.parametrize("experts", [0, 4])
@torch.no_grad()
def test_decoder_runs_as_a_cuda_graph(experts: int) -> None:
    model, input_ids = decoder(experts, torch.float32)
    compiled = torch.compile(model, backend="hubkernels", fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        ids = torch.randint_like(input_ids, 1024)
        assert error(compiled(ids).clone(), model(ids)) < TOLERANCE[torch.float32]


@torch.no_grad()
def test_kernelized_decoder_runs_under_inductor() -> None:
    model, input_ids = decoder(4, torch.float32)
    expected = model(input_ids)
    kernelize(model, mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
    assert error(model(input_ids), expected) < TOLERANCE[torch.float32]
    compiled = torch.compile(model, fullgraph=True)
    assert error(compiled(input_ids), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [0, 4])
def test_training_steps_use_the_backwards_of_kernels(
    experts: int, dtype: torch.dtype, mode: str | None
) -> None:
    """They do so in CUDA graphs too, and where a backward comes after a second forward."""
    model, input_ids = decoder(experts, dtype)
    compiled = torch.compile(model, backend="hubkernels", fullgraph=True, mode=mode)
    weight = model.blocks[0].attention_norm.weight

    def gradient(run: Any, *batches: Tensor) -> Tensor:
        model.zero_grad(set_to_none=True)
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        losses = [run(batch).float().square().mean() for batch in batches]
        for loss in losses:
            loss.backward()
        assert weight.grad is not None
        return weight.grad.clone()

    other = input_ids.flip(0, 1)
    for batches in [(input_ids,)] * 4 + [(other,), (input_ids, other), (input_ids, other)]:
        made, wanted = gradient(compiled, *batches), gradient(model, *batches)
        assert error(made, wanted) < 3 * tolerance(experts, dtype)
    report = last_report()
    assert report is not None
    assert {decision.gradient for decision in report.decisions} == {"kernel"}, report


@torch.no_grad()
def test_capability_of_the_device_selects_the_kernel(repository: Path) -> None:
    target = target_of("cuda")
    major, minor = torch.cuda.get_device_capability()
    assert target.capability == 10 * major + minor
    kernel = LocalLayerRepository(repository, layer_name="RMSNorm")
    here = Device("cuda", CUDAProperties(target.capability, target.capability))
    elsewhere = Device("cuda", CUDAProperties(10, 20))
    model, input_ids = decoder(0, torch.float32)
    for device, kernels in ((here, 5), (elsewhere, 0)):
        with use_kernel_mapping({"RMSNorm": {device: kernel}}, inherit_mapping=False):
            torch.compile(model, backend="hubkernels", options={"inner": "eager"})(input_ids)
        report = last_report()
        assert report is not None
        assert len(report.kernels) == kernels
        torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [0, 4])
@torch.no_grad()
def test_kernels_pass_verification(experts: int, dtype: torch.dtype) -> None:
    model, input_ids = decoder(experts, dtype)
    expected = model(input_ids)
    random = torch.cuda.get_rng_state()
    options = {"inner": "eager", "verify": True}
    compiled = torch.compile(model, backend="hubkernels", fullgraph=True, options=options)
    assert error(compiled(input_ids), expected) < tolerance(experts, dtype)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    report = last_report()
    assert report is not None
    assert len(report.kernels) == len(report.decisions) == 7, report
