"""A second process finds everything that the first one compiled and tried in the caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from kernelgraph import LocalLayerRepository, last_report, use_kernel_mapping
from tests.support.toy_models import Chain
from tests.support.toy_repository import write_repository

KERNELS = """
import torch

runs = 0


class ScaleFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, shift, eps):
        global runs
        runs += type(x) is torch.Tensor
        ctx.save_for_backward(x, weight)
        return x * weight + shift + eps

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0), None, None


class WithBackward(torch.nn.Module):
    def forward(self, x):
        return ScaleFunction.apply(x, self.weight, self.shift, self.eps)


class WithoutBackward(torch.nn.Module):
    def forward(self, x):
        global runs
        array = x.detach().numpy() * self.weight.detach().numpy() + self.shift.numpy() + self.eps
        runs += 1
        return torch.from_numpy(array)
"""


def compile_model(repository: str, layer: str) -> None:
    """Compile for inference and for training; print the hits of the caches, and the results."""
    torch.manual_seed(0)
    model, x = Chain(), torch.ones(2, 4)
    kernel = LocalLayerRepository(repository, layer_name=layer)
    with use_kernel_mapping({"Scale": {"cpu": kernel}}):
        compiled = torch.compile(model, backend="hubkernels", fullgraph=True)
        with torch.no_grad():
            y = compiled(x)
        compiled(x).square().sum().backward()
    grad, report = model.layers[0].weight.grad, last_report()
    assert grad is not None
    assert report is not None
    caches = {
        "graphs": ("inductor", "fxgraph_cache_hit", "fxgraph_cache_miss"),
        "autograd": ("aot_autograd", "autograd_cache_hit", "autograd_cache_miss"),
    }
    found = {
        n: [counters[home][hit], counters[home][miss]] for n, (home, hit, miss) in caches.items()
    }
    runs = sys.modules[kernel.load().__module__].__dict__["runs"]
    gradients = [decision.gradient for decision in report.kernels]
    print(
        json.dumps(
            {**found, "results": [y.tolist(), grad.tolist()], "runs": runs, "gradients": gradients}
        )
    )


def twice(program: str, scratch: Path, *arguments: str) -> list[Any]:
    """The last line that a program prints, in each of two processes with the same caches.

    Its arguments are a repository of `KERNELS`, and ``arguments``.
    """
    files = {"__init__.py": "from . import layers\n", "layers.py": KERNELS}
    write_repository(scratch / "kernels", files)
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "KERNELGRAPH_CACHE_DIR": "kernelgraph"}
    printed = [
        subprocess.run(
            [sys.executable, "-c", program, str(scratch / "kernels"), *arguments],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[3],
            env={**os.environ, **{k: str(scratch / v) for k, v in caches.items()}},
        ).stdout
        for _ in range(2)
    ]
    return [json.loads(out.splitlines()[-1]) for out in printed]


@pytest.mark.parametrize(
    ("layer", "gradient"),
    [("WithBackward", "kernel"), ("WithoutBackward", "reference: it has no backward")],
)
def test_second_process_compiles_nothing(tmp_path: Path, layer: str, gradient: str) -> None:
    imported = "import sys; from tests.graph.compile.test_warm_start import compile_model"
    cold, warm = twice(f"{imported}; compile_model(*sys.argv[1:])", tmp_path, layer)
    assert cold["autograd"] == [0, 2]
    assert warm["autograd"] == [2, 0]
    assert cold["graphs"][0] == warm["graphs"][1] == 0
    assert warm["results"] == cold["results"]
    assert all(text.startswith(gradient) for text in (*cold["gradients"], *warm["gradients"]))
    # Each layer runs without gradients and with them; the first process also tried the kernel.
    assert warm["runs"] == 4 < cold["runs"]


FASTEST = """
import json, sys, time
import torch
from kernelgraph import LocalLayerRepository, last_report, use_kernel_mapping
from kernelgraph.graph.autotune import contest
from torch._dynamo.utils import counters
from tests.support.toy_models import Chain

measured = []
own = contest.Contest.winner
contest.Contest.winner = lambda self: measured.append(self.layer_name) or own(self)
torch.manual_seed(0)
model, x = Chain(), torch.ones(2, 4)
kernel = LocalLayerRepository(sys.argv[1], layer_name="WithBackward")
compiled = torch.compile(
    model, backend="hubkernels", fullgraph=True, options={"policy": "fastest"}
)
with use_kernel_mapping({"Scale": {"cpu": kernel}}, inherit_mapping=False), torch.no_grad():
    compiled(x)
found = counters["aot_autograd"]
misses = [found["autograd_cache_miss"], counters["inductor"]["fxgraph_cache_miss"]]
print(json.dumps({
    "measured": measured,
    "misses": misses,
    "chosen": [str(d.reason) for d in last_report().decisions],
    "details": [d.detail for d in last_report().decisions],
}))
"""


def test_second_process_measures_nothing(tmp_path: Path) -> None:
    """It traces once, with the winners of the first process, and compiles nothing."""
    cold, warm = twice(FASTEST, tmp_path)
    assert cold["measured"] == ["Scale"]
    assert warm["measured"] == []
    assert warm["misses"] == [0, 0]
    assert warm["chosen"] == cold["chosen"]
    assert warm["details"] == cold["details"]
    assert all("kernel" in detail and "reference" in detail for detail in warm["details"])
