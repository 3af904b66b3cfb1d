"""Programs that are loaded: in a fresh process, with and without their kernels, and by torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kernelgraph
from kernelgraph import (
    LocalLayerRepository,
    Mode,
    export,
    last_report,
    load,
    save,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from kernelgraph.selection.devices import Target
from tests.support.archives import TRUSTED, expected, exported, with_manifest
from tests.support.exporting import in_fresh_process, scale_files, scales, write_scale
from tests.support.other_package import write_kernel
from tests.support.toy_models import Chain, Scale
from tests.support.toy_repository import METADATA, write_repository


def test_program_runs_in_a_process_without_the_model(tmp_path, x):
    """Traced both ways, with and without the kernels in the file; two contents of one kernel."""
    one, two = (write_scale(tmp_path / f"repo{n}", n) for n in (10, 20))
    files = [tmp_path / f"{name}.pt2" for name in ("bundled", "strict", "beside", "other", "moved")]
    save(exported(one), files[0], bundle=True)
    save(exported(one, strict=True), files[1], bundle=True)
    save(exported(one), files[2])
    save(exported(two), files[3], bundle=True)
    save(exported(write_scale(tmp_path / "gone", 30)), files[4])
    os.rename(tmp_path / "gone", tmp_path / "elsewhere")
    answers = in_fresh_process(x, [(file, "load", TRUSTED) for file in files], tmp_path)
    for answer, repository in zip(answers, [one, one, one, two], strict=False):
        assert "error" not in answer, answer["error"]
        torch.testing.assert_close(torch.tensor(answer["result"]), expected(repository, x))
        assert len(answer["kernels"]) == 2
        assert not answer["tests"]
    assert "is not in the file, nor is there such a directory here: save" in answers[4]["error"]


def test_program_for_training_has_its_gradient_in_another_process(tmp_path):
    repository = write_scale(tmp_path / "repo", 15)
    torch.manual_seed(0)
    model, x = Chain(4), torch.randn(3, 4, requires_grad=True)
    with scales(repository):
        program = export(model, (torch.randn(3, 4),), mode=Mode.TRAINING)
    save(program, tmp_path / "a.pt2", bundle=True)
    program.module()(x).square().sum().backward()
    (answer,) = in_fresh_process(x, [(tmp_path / "a.pt2", "load", TRUSTED)], tmp_path)
    torch.testing.assert_close(torch.tensor(answer["gradient"]), x.grad)
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_kernel_that_another_package_loaded_is_loaded_without_that_package(tmp_path, theirs, x):
    """Where the program is loaded, that package need not be."""
    layers = str(scale_files(16)["layers.py"])
    path = write_kernel(tmp_path / "repo", layers=layers)
    repository = theirs.LocalLayerRepository(path, layer_name="Scale")
    want = expected(repository, x)
    save(exported(repository), tmp_path / "a.pt2", bundle=True)
    (answer,) = in_fresh_process(x, [(tmp_path / "a.pt2", "load", TRUSTED)], tmp_path)
    assert "error" not in answer, answer["error"]
    torch.testing.assert_close(torch.tensor(answer["result"]), want)


def test_report_says_which_kernel_runs_where(tmp_path):
    save(exported(write_scale(tmp_path / "repo")), tmp_path / "a.pt2", bundle=True)
    load(tmp_path / "a.pt2", **TRUSTED)
    report = last_report()
    assert report is not None
    assert [d.path for d in report.kernels] == ["layers.0", "layers.2"]
    assert str(report).startswith("load for cpu, INFERENCE: 2 of 2 extensible layers use a kernel")


# --- layers with several results, writes and sizes of values ------------------------------------


COUNTED = """
import torch
from torch import nn

class Counted(nn.Module):
    def forward(self, x):
        self.calls += 1
        return {"half": torch.from_numpy(x.numpy() / 2), "rest": [x + self.calls]}

class Positive(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy()[x.numpy() > 0]) + 10
"""


def positive_sizes(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(torch.library.get_ctx().new_dynamic_size())


@use_kernel_forward_from_hub("Counted")
class Counted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        self.calls += 1
        return {"half": x / 2, "rest": [x + self.calls]}


@use_kernel_forward_from_hub("Positive", fake=positive_sizes)
class Positive(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counted, self.positive = Counted(), Positive()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.counted(x)
        return self.positive(made["half"] + self.counted(x)["rest"][0])


def test_program_keeps_several_results_written_buffers_and_sizes_that_depend_on_values(tmp_path):
    files = {"__init__.py": "from . import layers\n", "layers.py": COUNTED}
    write_repository(tmp_path / "repo", files)
    names = ("Counted", "Positive")
    kernels = {n: {"cpu": LocalLayerRepository(tmp_path / "repo", layer_name=n)} for n in names}
    x = torch.tensor([1.0, -9, 2, -9, 4])
    with use_kernel_mapping(kernels, inherit_mapping=False), torch.no_grad():
        program = export(Counting(), (torch.randn(5),), mode=Mode.INFERENCE)
    save(program, tmp_path / "a.pt2", bundle=True)
    loads = [(tmp_path / "a.pt2", "load", TRUSTED)] * 2
    for answer in in_fresh_process(x, loads, tmp_path):
        assert "error" not in answer, answer["error"]
        kept = x[x > 0]
        torch.testing.assert_close(torch.tensor(answer["result"]), kept * 1.5 + 2 + 10)


# --- kernels that are not available -------------------------------------------------------------


def for_another_system(path: Path) -> Path:
    """A copy of a program whose kernel is built for another system."""

    def change(data: Any) -> None:
        for kernel in data["kernels"].values():
            (build,) = kernel["builds"].values()
            kernel["builds"] = {"torch213-cxx11-cpu-riscv64-linux": build}

    return with_manifest(path, change)


def test_kernel_for_another_system_is_an_error_or_replaced(tmp_path, x):
    repository = write_scale(tmp_path / "repo", 50)
    save(exported(repository), tmp_path / "a.pt2", bundle=True)
    os.rename(tmp_path / "repo", tmp_path / "moved")
    foreign = for_another_system(tmp_path / "a.pt2")
    torch.manual_seed(0)
    reference = Chain(4).eval()(x)
    loads = [
        (foreign, "load", TRUSTED),
        (foreign, "load", {"fallback": "reference"}),
        (tmp_path / "a.pt2", "load", {"fallback": "reference"}),
    ]
    error, fallen_back, refused = in_fresh_process(x, loads, tmp_path)
    assert error["error"].startswith("FileNotFoundError: no build variant of ")
    assert "built for riscv64, this is" in error["error"]
    assert "error" not in fallen_back
    torch.testing.assert_close(torch.tensor(fallen_back["result"]), reference.detach())
    assert fallen_back["kernels"] == []
    # A kernel that is there and not trusted is no reason to run another program than was asked for.
    assert refused["error"].startswith("ValueError: ")


def test_kernel_for_another_device_is_an_error_or_replaced(tmp_path, x, monkeypatch):
    backend = {**METADATA, "backend": {"type": "cuda", "archs": ["9.0"]}}
    save(exported(write_scale(tmp_path / "repo", 53, metadata=backend)), tmp_path / "a.pt2")
    monkeypatch.setattr("kernelgraph.archive.loader.target_of", lambda device: Target("cuda", 80))
    message = r"built for 9\.0, and this device is cuda 8\.0"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.pt2", **TRUSTED)
    torch.manual_seed(0)
    fallen_back = load(tmp_path / "a.pt2", fallback="reference", **TRUSTED)
    torch.testing.assert_close(fallen_back.module()(x), Chain(4).eval()(x))
    report = last_report()
    assert report is not None
    assert not report.kernels
    assert "the kernel could not be loaded" in str(report)


def test_missing_kernel_of_a_layer_that_could_not_be_traced_is_an_error(tmp_path):
    class Busy(Scale):
        kernel_layer_name = "Scale"

        def forward(self, x):
            return x + 1 if x.sum().item() > 0 else x + 2

    with scales(write_scale(tmp_path / "repo", 51)):
        program = export(torch.nn.Sequential(Busy()), (torch.randn(3, 4),), mode=Mode.INFERENCE)
    save(program, tmp_path / "a.pt2", bundle=True)
    os.rename(tmp_path / "repo", tmp_path / "moved")
    with pytest.raises(ValueError, match="layer Scale could not be traced to take its place"):
        load(for_another_system(tmp_path / "a.pt2"), fallback="reference")


# --- torch alone --------------------------------------------------------------------------------


def test_torch_alone_raises_an_error_that_names_kernelgraph_load(tmp_path):
    program = exported(write_scale(tmp_path / "repo", 60))
    again = torch.export.export(program.module(), (torch.randn(3, 4),))
    save(again, tmp_path / "a.pt2", bundle=True)
    for more in ("", "import kernelgraph.graph.ops.registry\n"):
        code = f"import torch\n{more}torch.export.load({str(tmp_path / 'a.pt2')!r})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 1
        assert "load the file with kernelgraph.load" in run.stderr


def test_torch_alone_loads_a_program_whose_ops_are_registered(tmp_path, x):
    repository = write_scale(tmp_path / "repo", 61)
    want = expected(repository, x)
    save(exported(repository), tmp_path / "a.pt2", bundle=True)
    load(tmp_path / "a.pt2", **TRUSTED)
    torch.testing.assert_close(torch.export.load(tmp_path / "a.pt2").module()(x), want)


# --- refused arguments --------------------------------------------------------------------------


def test_load_refuses_other_files_and_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pt2"):
        load(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("text")
    with pytest.raises(ValueError, match=r"text\.pt2: it is no archive of torch's"):
        load(tmp_path / "text.pt2")
    plain = torch.export.export(torch.nn.Linear(1, 1), (torch.ones(1, 1),))
    torch.export.save(plain, tmp_path / "plain.pt2")
    with pytest.raises(ValueError, match=r"was not written by kernelgraph\.save; torch"):
        load(tmp_path / "plain.pt2")
    save(plain, tmp_path / "plain.pt2")
    assert load(tmp_path / "plain.pt2").module()(torch.ones(1, 1)).shape == (1, 1)
    with pytest.raises(ValueError, match="fallback is one of error, reference, not 'none'"):
        load(tmp_path / "plain.pt2", fallback="none")
    with pytest.raises(ValueError, match=r"it is a file for kernelgraph\.load"):
        kernelgraph.aot_load(tmp_path / "plain.pt2")
