"""Programs that are compiled ahead of time, or exported to ONNX."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import kernelgraph
from kernelgraph import Mode, aot_compile, aot_load, export, last_report
from kernelgraph.archive.compatibility import release_risk
from kernelgraph.archive.container import Archive
from tests.support.archives import TRUSTED, expected, with_manifest
from tests.support.exporting import in_fresh_process, scales, write_scale
from tests.support.toy_models import Chain, OpaqueScale
from tests.support.toys import only


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "cache"))


def exported(repository: Any) -> Any:
    torch.manual_seed(0)
    model = Chain(4).eval()
    dynamic = ({0: Dim("batch", min=2, max=64)},)
    with scales(repository):
        x = torch.randn(3, 4)
        return export(model, (x,), mode=Mode.INFERENCE, dynamic_shapes=dynamic)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler as on Linux")
def test_package_of_aotinductor_runs_in_a_fresh_process(tmp_path):
    repository = write_scale(tmp_path / "repo", 80)
    x = torch.randn(5, 4)
    want = expected(repository, x)
    package = tmp_path / "model.pt2"
    aot_compile(exported(repository), package, bundle=True)
    # Here the op is registered already; in the fresh process it is not.
    model = aot_load(package, **TRUSTED)
    for _ in range(3):
        torch.testing.assert_close(model(x), want)
    report = last_report()
    assert report is not None
    assert len(report.kernels) == 2
    newer = with_manifest(package, lambda data: data.update(torch="9.1.0"))
    older = with_manifest(package, lambda data: data.update(torch="2.0.1"))
    loads = [(p, "aot_load", o) for p, o in ((package, TRUSTED), (package, {}), (newer, TRUSTED))]
    alone, refused, wrong = in_fresh_process(x, loads, tmp_path)
    torch.testing.assert_close(torch.tensor(alone["result"]), want)
    assert len(alone["kernels"]) == 2
    assert "pass trust_remote_code=True" in refused["error"]
    assert "compiled code runs with the same release alone" in wrong["error"]
    with pytest.raises(RuntimeError, match="compiled code runs with the same release alone"):
        aot_load(older, **TRUSTED)
    with pytest.raises(ValueError, match=r"it is a file for kernelgraph\.aot_load"):
        kernelgraph.load(package, **TRUSTED)
    with Archive(package) as archive:
        code = [name for name in archive.manifest.members if name.endswith(".so")]
        assert code, "the compiled code is what is hashed"


@pytest.mark.parametrize(
    ("version", "devices", "warned"),
    [
        ("2.11.0+cu130", {"cpu", "cuda"}, True),
        ("2.11.0", {"cpu"}, False),
        ("2.13.0", {"cuda"}, False),
    ],
)
def test_torch_that_may_crash_is_warned_about(monkeypatch, version, devices, warned):
    monkeypatch.setattr(torch, "__version__", version)
    assert ("newer torch" in release_risk(devices)) is warned


def test_aot_compile_refuses_what_is_no_program(tmp_path):
    with pytest.raises(TypeError, match="aot_compile takes an ExportedProgram, not Linear"):
        aot_compile(nn.Linear(1, 1), tmp_path / "a.pt2")  # type: ignore[arg-type]


def test_onnx_export_has_the_references(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = Chain(4).eval()
    with only(Scale=OpaqueScale):
        program = export(model, (torch.randn(3, 4),), mode=Mode.INFERENCE)
    torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True)
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert kinds <= {"Mul", "Add", "Gemm", "MatMul", "Transpose"}, kinds
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(
        onnx.load(tmp_path / "model.onnx")
    )
    x = torch.randn(3, 4)
    (made,) = evaluator.run(None, {graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(made), model(x).detach(), rtol=1e-4, atol=1e-5)
