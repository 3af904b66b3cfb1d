"""What tests of exported programs share: kernels that are in repositories, and fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kernelgraph import LocalLayerRepository, use_kernel_mapping
from tests.support.toy_repository import METADATA, write_repository

# In numpy: nothing can trace it, nor run it on fakes.
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
    """A kernel for `tests.support.toy_models.Scale`, which adds ``result`` to it."""
    return {
        "__init__.py": "from . import layers\n",
        "layers.py": SCALE.format(result=result, backward=backward),
    }


def write_scale(path: Path, result: int = 10, **more: Any) -> LocalLayerRepository:
    """A repository with such a kernel."""
    write_repository(path, scale_files(result), **more)
    return LocalLayerRepository(path, layer_name="Scale")


@contextmanager
def scales(repository: Any) -> Iterator[None]:
    """Nothing is registered but a kernel for ``Scale``."""
    with use_kernel_mapping({"Scale": {"cpu": repository}}, inherit_mapping=False):
        yield


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
    """Load programs, one after the other, in a process that has neither the model's code nor any
    kernel, and call each with ``inputs``."""
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


__all__ = ["METADATA", "in_fresh_process", "scale_files", "scales", "write_scale"]
