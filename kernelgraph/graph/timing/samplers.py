"""Samplers of compiled programs: on the host, on a CUDA device, and as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.timing.benchmark import Sampler
from kernelgraph.graph.timing.cuda_graphs import synchronizes

CompiledRegion = Callable[..., Sequence[object]]
"""A compiled region: takes its inputs and returns its results."""

GraphPool: TypeAlias = Any
"""The handle of the memory that several CUDA graphs share; torch's type for it is private."""

clock = time.perf_counter
"""The clock of the host; tests set another one."""


def sampler_of(
    run: CompiledRegion,
    inputs: Sequence[object],
    grad: bool,
    pool: GraphPool | None = None,
) -> Sampler:
    """Return the sampler of a compiled program, which is run twice before.

    Args:
        run: The program, timed forward and, with ``grad``, backward.
        inputs: The inputs that it is run on.
        grad: Whether a gradient can flow through it.
        pool: The memory for the CUDA graph that the program is to be timed in, if it can be in
            one; None: it is timed without.

    Raises:
        Exception: Whatever the program raises.
    """
    call = _with_backward(run, inputs) if grad else lambda: run(*inputs)
    with _torch.compiling_apart():
        for _ in range(2):  # what tunes itself, or compiles its backward, does so now
            call()
    device = next((v.device for v in inputs if isinstance(v, Tensor) and v.is_cuda), None)
    if device is None:
        return _on_host(call)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        if pool is not None and not synchronizes(call):
            call = _as_cuda_graph(call, pool)
    return _on_cuda(call, device)


def _with_backward(run: CompiledRegion, inputs: Sequence[object]) -> Callable[[], object]:
    leaves = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    grads: list[Tensor] = []

    def step() -> object:
        with torch.enable_grad():
            results = [r for r in run(*inputs) if isinstance(r, Tensor) and r.requires_grad]
            if not grads:
                grads.extend(map(torch.ones_like, results))
            return torch.autograd.grad(results, leaves, grads, allow_unused=True)

    return step


def _as_cuda_graph(call: Callable[[], object], pool: GraphPool) -> Callable[[], object]:
    """Return the replay of a CUDA graph of ``call``.

    Nobody looks at its results, whose memory the next graph of the pool uses too.
    """
    graph = torch.cuda.CUDAGraph()
    # What other threads do meanwhile, such as one that loads data, must not fail the capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _on_cuda(call: Callable[[], object], device: torch.device) -> Sampler:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def sample(calls: int) -> float:
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return sample


def _on_host(call: Callable[[], object]) -> Sampler:
    def sample(calls: int) -> float:
        started = clock()
        for _ in range(calls):
            call()
        return clock() - started

    return sample
