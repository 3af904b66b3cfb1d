"""Measures what a call of a kernel costs in a graph compiled by Inductor, over the kernel itself.

    python examples/benchmarks/op_call.py

It compares three calls: the hub layer's forward called directly, as ``kernelize`` without
``TORCH_COMPILE`` does; the op that kernelgraph makes of it; and an op defined and implemented by
hand around the same forward, the least that torch offers. The kernel does almost nothing, so the
time is that of the call. The cost of a call is the difference between graphs with 64 and with 16
calls of one layer, which leaves out the graph and its guards. Targets: at most 4 us over the direct
call, and at most 1.1 of the bare op.

On a machine with a GPU the same graphs are also timed as CUDA graphs, where the target is at
most 1.02 of the kernel alone, captured by hand.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kernelgraph
from kernelgraph import Mode

FEW, MANY = 16, 64
ROUNDS = 40
CALLS = 50
SIZE = 64


@kernelgraph.use_kernel_forward_from_hub("Scale")
class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.eps


class Kernel(nn.Module):
    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.weight, alpha=self.eps)


class ToyRepository:
    """A repository whose kernel is already loaded."""

    def load(self) -> type[nn.Module]:
        return Kernel


_library: Any = torch.library.Library("op_call", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "bare(Tensor x, Tensor weight, float eps) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _bare(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.add(x, weight, alpha=eps)


_library.impl("bare", _bare, "CompositeExplicitAutograd")
torch.library.register_fake("op_call::bare", _bare, lib=_library)


class Bare(Scale):
    kernel_layer_name = None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.op_call.bare(x, self.weight, self.eps)
        return result


def calls(layer: Callable[[Tensor], Tensor], count: int) -> Callable[[Tensor], Tensor]:
    """Return a function that calls ``layer`` repeatedly."""

    def run(x: Tensor) -> Tensor:
        for _ in range(count):
            x = layer(x)
        return x

    # Dynamo keeps compiled code by code object and searches all entries of one. So each function
    # has its own.
    run.__code__ = run.__code__.replace(co_name=f"run_{count}")
    return run


def programs(device: str, options: dict[str, Any]) -> dict[str, Callable[[int], Any]]:
    """Return the programs to compare: functions from a number of calls to a program."""

    def direct(count: int) -> Any:
        layer = kernelgraph.kernelize(Scale().to(device), mode=Mode.INFERENCE)
        return calls(layer.forward, count)

    def compiled(cls: type[nn.Module], backend: str) -> Callable[[int], Any]:
        def make(count: int) -> Any:
            run = calls(cls().to(device), count)
            always = {"policy": "always"} if backend == "hubkernels" else {}
            return torch.compile(
                run, backend=backend, fullgraph=True, options={**options, **always}
            )

        return make

    return {
        "direct": direct,
        "bare op": compiled(Bare, "inductor"),
        "hubkernels": compiled(Scale, "hubkernels"),
    }


def cpu_times() -> dict[str, float]:
    """Return microseconds per call, the least of rounds in which all programs take turns."""
    x = torch.ones(1, SIZE)
    made = {
        (name, count): make(count)
        for name, make in programs("cpu", {}).items()
        for count in (FEW, MANY)
    }
    best = dict.fromkeys(made, float("inf"))
    for run in made.values():
        for _ in range(3):
            run(x)
    for _ in range(ROUNDS):
        for key, run in made.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                run(x)
            best[key] = min(best[key], (time.perf_counter() - start) / CALLS * 1e6)
    names = dict.fromkeys(name for name, _ in made)
    return {name: (best[name, MANY] - best[name, FEW]) / (MANY - FEW) for name in names}


def cuda_graph_times() -> dict[str, float]:
    """Return microseconds per call in CUDA graphs, from the medians of replays in turns."""
    x = torch.ones(1 << 16, SIZE, device="cuda")
    made = programs("cuda", {"triton.cudagraphs": True})
    runs: dict[tuple[str, int], Callable[[], Any]] = {}
    for name, make in made.items():
        for count in (FEW, MANY):
            run: Callable[[], Any] = functools.partial(make(count), x)
            runs[name, count] = captured(run) if name == "direct" else run
    event: Any = torch.cuda.Event
    seen: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for round_ in range(ROUNDS):
        for key, run in runs.items():
            start, end = (event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                run()
            end.record()
            end.synchronize()
            if round_ > 3:  # after the warm-up and the recording
                seen[key].append(start.elapsed_time(end) / 10 * 1e3)
    median = {key: sorted(times)[len(times) // 2] for key, times in seen.items()}
    return {name: (median[name, MANY] - median[name, FEW]) / (MANY - FEW) for name in made}


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that replays the kernels of ``run`` as a CUDA graph."""
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def main() -> None:
    torch.set_num_threads(1)
    with kernelgraph.use_kernel_mapping(
        {"Scale": {"cpu": ToyRepository(), "cuda": ToyRepository()}}
    ):
        with torch.inference_mode():
            times = cpu_times()
        print("CPU, us a call: " + ", ".join(f"{name} {t:.2f}" for name, t in times.items()))
        print(f"  over the direct call {times['hubkernels'] - times['direct']:.2f} us (aim: 4)")
        print(f"  of the bare op {times['hubkernels'] / times['bare op']:.3f} (aim: 1.1)")
        if torch.cuda.is_available():
            with torch.inference_mode():
                times = cuda_graph_times()
            print("CUDA graphs, us a call: " + ", ".join(f"{n} {t:.3f}" for n, t in times.items()))
            print(f"  of the kernel alone {times['hubkernels'] / times['direct']:.3f} (aim: 1.02)")
            print(f"  of the bare op {times['hubkernels'] / times['bare op']:.3f}")


if __name__ == "__main__":
    main()
