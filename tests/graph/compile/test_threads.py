"""Threads that compile at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kernelgraph import use_kernel_mapping
from tests.support.compiled_models import by_hand, compiled
from tests.support.toy_models import Chain, OpaqueScale, on_cpu

INNER = ["eager", "aot_eager"]


@pytest.mark.parametrize("inner", INNER)
def test_threads_that_compile_at_once_do_not_disturb_each_other(inner: str) -> None:
    """Each thread compiles a model with its own sizes, under its own mapping."""
    start = threading.Barrier(4)

    models = [Chain(2 + i) for i in range(4)]
    # Not in the threads: the lookup of a backend in torch 2.13 is not safe for threads.
    functions = [compiled(model, inner) for model in models]

    def work(i: int) -> list[tuple[Tensor, Tensor]]:
        model, f = models[i], functions[i]
        pairs = []
        with use_kernel_mapping(on_cpu(Scale=OpaqueScale), inherit_mapping=False):
            start.wait(timeout=60)
            for rows in (3, 5):
                x = torch.randn(rows, 2 + i)
                with torch.no_grad():
                    pairs.append((f(x), by_hand(model, x)))
        return pairs

    with ThreadPoolExecutor(4) as pool:
        for pairs in pool.map(work, range(4)):
            for made, expected in pairs:
                torch.testing.assert_close(made, expected)
