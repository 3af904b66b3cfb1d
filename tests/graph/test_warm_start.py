"""A second process finds in the caches all that the first one compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from kernelgraph import use_kernel_mapping
from tests.graph.toy_models import Chain, OpaqueScale, on_cpu


def compile_model() -> None:
    """For inference and for training; print what the caches say of it, and the results."""
    torch.manual_seed(0)
    model, x = Chain(), torch.ones(2, 4)
    with use_kernel_mapping(on_cpu(Scale=OpaqueScale)):
        compiled = torch.compile(model, backend="hubkernels", fullgraph=True)
        with torch.no_grad():
            y = compiled(x)
        compiled(x).square().sum().backward()
    grad = model.layers[0].weight.grad
    assert grad is not None
    caches = {
        "graphs": ("inductor", "fxgraph_cache_hit", "fxgraph_cache_miss"),
        "autograd": ("aot_autograd", "autograd_cache_hit", "autograd_cache_miss"),
    }
    found = {
        n: [counters[home][hit], counters[home][miss]] for n, (home, hit, miss) in caches.items()
    }
    print(json.dumps({**found, "results": [y.tolist(), grad.tolist()]}))


def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    cold, warm = (
        json.loads(
            subprocess.run(
                [
                    sys.executable,
                    "-c",
                    "from tests.graph import test_warm_start as t; t.compile_model()",
                ],
                check=True,
                capture_output=True,
                text=True,
                cwd=Path(__file__).parents[2],
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            ).stdout
        )
        for _ in range(2)
    )
    assert cold["autograd"] == [0, 2]
    assert warm["autograd"] == [2, 0]
    assert cold["graphs"][0] == warm["graphs"][1] == 0
    assert warm["results"] == cold["results"]
