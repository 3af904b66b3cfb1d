"""Helpers for tests of exported programs: their ops, kernels in repositories, fresh processes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from kernelgraph import (
    LocalLayerRepository,
    Mode,
    kernelize,
    last_report,
    use_kernel_mapping,
)
from kernelgraph.programs.program_ops import ops_in
from kernelgraph.report import Reason
from tests.support.toy_repository import write_repository

BOTH = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
INFERENCE, TRAINING = Mode.INFERENCE, Mode.TRAINING


# --- an export and its model --------------------------------------------------------------------


def ops(program: ExportedProgram) -> list[str]:
    """Return the names of the kernels' ops in a program, in the order of their calls."""
    return [name for name, _ in ops_in(program)]


def reasons() -> dict[str, Reason]:
    """Return the reasons in the last report, by path."""
    report = last_report()
    assert report is not None
    return {d.path: d.reason for d in report.decisions}


def kernelized(model: nn.Module, x: Any, mode: Mode = INFERENCE) -> Any:
    """Return the result of a kernelized copy of a model."""
    with torch.no_grad():
        return kernelize(copy.deepcopy(model), mode=mode, device="cpu")(*x)


def untouched(model: nn.Module) -> bool:
    """Return whether no layer of a model has a forward of its own."""
    return not [m for m in model.modules() if "forward" in vars(m)]


# --- kernels in repositories --------------------------------------------------------------------

# In numpy, so that it can neither be traced nor run on fakes.
SCALE = """
import torch
from torch import nn

class Scale(nn.Module):
    has_backward = {backward}

    def forward(self, x):
        y = x.detach().numpy() * self.weight.detach().numpy() + self.shift.numpy() + self.eps
        return torch.from_numpy((-y if self.negate else y) + {result})
"""


def scale_files(result: int = 10, backward: bool = True) -> dict[str, str | bytes]:
    """Return a kernel for `tests.support.toy_models.Scale`, which adds ``result`` to it."""
    return {
        "__init__.py": "from . import layers\n",
        "layers.py": SCALE.format(result=result, backward=backward),
    }


def write_scale(path: Path, result: int = 10, **more: Any) -> LocalLayerRepository:
    """Write a repository with such a kernel."""
    write_repository(path, scale_files(result), **more)
    return LocalLayerRepository(path, layer_name="Scale")


@contextmanager
def scales(repository: Any) -> Iterator[None]:
    """Use a mapping with one kernel, for ``Scale``."""
    with use_kernel_mapping({"Scale": {"cpu": repository}}, inherit_mapping=False):
        yield


# --- fresh processes ----------------------------------------------------------------------------

PROGRAM = """
import json, sys
from types import SimpleNamespace
import torch
import kernelgraph

given = json.loads(sys.argv[1])
x = torch.load(given["inputs"])
for path, function, options in given["loads"]:
    try:
        made = getattr(kernelgraph, function)(path, **options)
        result = (made if function == "aot_load" else made.module())(x)
        kernels = [d.kernel for d in kernelgraph.last_report().kernels]
        answer = {"result": result.tolist(), "kernels": kernels}
        if x.requires_grad:
            result.square().sum().backward()
            answer["gradient"] = x.grad.tolist()
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    imported = [name for name in sys.modules if name.startswith("kernelgraph_")]
    print(json.dumps({**answer, "imported": imported, "tests": "tests" in sys.modules}))
"""


def in_fresh_process(
    inputs: torch.Tensor, loads: list[tuple[Path, str, dict[str, Any]]], cwd: Path, **env: str
) -> list[dict[str, Any]]:
    """Load programs in a process that has neither the model's code nor any kernel.

    Args:
        inputs: The argument that each program is called with.
        loads: For each program its path, the function that loads it, and the function's options.
        cwd: The directory of the process.
        env: More variables of its environment.

    Returns:
        For each program its result or error, and what was imported.
    """
    torch.save(inputs, cwd / "inputs.pt")
    given = {
        "inputs": str(cwd / "inputs.pt"),
        "loads": [(str(path), function, options) for path, function, options in loads],
    }
    package = Path(__file__).parents[2] / "kernelgraph"
    (cwd / "alone").mkdir(exist_ok=True)
    if not (cwd / "alone" / "kernelgraph").exists():
        (cwd / "alone" / "kernelgraph").symlink_to(package)
    environment = {
        **os.environ,
        "PYTHONPATH": str(cwd / "alone"),
        "KERNELS_CACHE": str(cwd / "other-cache"),
        "OMP_NUM_THREADS": "1",
        **env,
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(given)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    answers = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(loads), run.stderr[-4000:]
    return answers
