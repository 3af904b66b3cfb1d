"""Exported programs with Triton kernels, on a CUDA device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from kernelgraph import (
    LocalLayerRepository,
    Mode,
    aot_compile,
    export,
    kernelize,
    last_report,
    save,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from kernelgraph.archive.compatibility import release_risk
from kernelgraph.programs.program_ops import namespaces_in, ops_in
from tests.support.archives import TRUSTED
from tests.support.example_decoder import LAYERS
from tests.support.exporting import BOTH, in_fresh_process
from tests.support.sources import import_example
from tests.support.toy_models import error
from tests.support.toy_repository import METADATA, write_repository

pytestmark = pytest.mark.cuda
CRASHES = bool(release_risk({"cuda"}))
needs_safe_loading = pytest.mark.skipif(CRASHES, reason="this torch crashes as it loads packages")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def repository() -> Path:
    root: Path = import_example("kernels/build").build(backends=("cuda",))
    return root


def mapping(repository: Path) -> Any:
    kernels = {name: LocalLayerRepository(repository, layer_name=name) for name in LAYERS}
    return use_kernel_mapping({n: {"cuda": k} for n, k in kernels.items()}, inherit_mapping=False)


def decoder(experts: int) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    example = import_example("decoder")
    # bfloat16: torch 2.11 itself cannot export grouped attention of float32 at varying lengths.
    config = example.DecoderConfig(layers=2, experts=experts)
    model = example.Decoder(config).to("cuda", torch.bfloat16).eval()
    return model, torch.randint(1024, (2, 48), device="cuda")


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "experts"])
@BOTH
def test_decoder_runs_in_a_fresh_process(repository, tmp_path, experts, strict):
    model, ids = decoder(experts)
    dynamic = ({0: Dim("batch", max=64), 1: Dim("length", max=512)},)
    with mapping(repository), torch.no_grad():
        program = export(model, (ids,), mode=Mode.INFERENCE, dynamic_shapes=dynamic, strict=strict)
        other = torch.randint(1024, (3, 17), device="cuda")
        want = kernelize(copy.deepcopy(model), mode=Mode.INFERENCE)(other)
    report = last_report()
    assert report is not None
    assert len(list(ops_in(program))) == 7
    assert error(program.module()(other), want) < 1e-2
    save(program, tmp_path / "a.pt2", bundle=True)
    (answer,) = in_fresh_process(other, [(tmp_path / "a.pt2", "load", TRUSTED)], tmp_path)
    assert "error" not in answer, answer["error"]
    assert error(torch.tensor(answer["result"]), want.cpu()) < 1e-2


@needs_safe_loading
@pytest.mark.parametrize("lowering", ["op", "native"])
def test_package_of_aotinductor_runs_in_a_fresh_process(repository, tmp_path, lowering):
    model, ids = decoder(0)
    with mapping(repository), torch.no_grad():
        program = export(model, (ids,), mode=Mode.INFERENCE, lowering=lowering)
        want = kernelize(copy.deepcopy(model), mode=Mode.INFERENCE)(ids)
    aot_compile(program, tmp_path / "a.pt2", bundle=True)
    (answer,) = in_fresh_process(ids, [(tmp_path / "a.pt2", "aot_load", TRUSTED)], tmp_path)
    assert "error" not in answer, answer["error"]
    assert error(torch.tensor(answer["result"]), want.cpu()) < 1e-2


TWICE = """
import torch
import triton
import triton.language as tl
from torch import nn
from torch.library import triton_op, wrap_triton

@triton.jit
def twice_kernel(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count)
    tl.store(y + at, value * 2 + 10, mask=at < count)

@triton_op("_twice_1::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    count = x.numel()
    wrap_triton(twice_kernel)[(triton.cdiv(count, 256),)](x, y, count, BLOCK=256)
    return y

class Twice(nn.Module):
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return twice(x)
"""


@use_kernel_forward_from_hub("Twice")
class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_triton_op_stays_visible_in_the_program(tmp_path):
    """Inductor compiles the Triton kernel into the package, which then calls no op for it."""
    files = {"__init__.py": "from . import layers\n", "layers.py": TWICE}
    said = {**METADATA, "id": "_twice_1", "name": "twice"}
    write_repository(tmp_path / "repo", files, variant="torch-cuda", metadata=said)
    kernel = LocalLayerRepository(tmp_path / "repo", layer_name="Twice")
    model = nn.Sequential(nn.Linear(64, 64), Twice(), nn.ReLU()).to("cuda").eval()
    x = torch.randn(8, 64, device="cuda")
    with use_kernel_mapping({"Twice": {"cuda": kernel}}, False), torch.no_grad():
        program = export(model, (x,), mode=Mode.INFERENCE, lowering="native")
        want = kernelize(copy.deepcopy(model), mode=Mode.INFERENCE)(x)
    assert list(ops_in(program)) == []
    assert "_twice_1" in namespaces_in(program) or "triton" in str(program.graph)
    torch.testing.assert_close(program.module()(x), want)
    save(program, tmp_path / "program.pt2", bundle=True)
    loads = [(tmp_path / "program.pt2", "load", TRUSTED)]
    if not CRASHES:
        aot_compile(program, tmp_path / "package.pt2", bundle=True)
        loads.append((tmp_path / "package.pt2", "aot_load", TRUSTED))
    for answer in in_fresh_process(x, loads, tmp_path):
        assert "error" not in answer, answer["error"]
        torch.testing.assert_close(torch.tensor(answer["result"]), want.cpu())
