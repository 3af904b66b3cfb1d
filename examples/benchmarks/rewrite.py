"""Measures the FX pass: its cost, that it grows linearly with the graph, its share of a compile.

It runs three times: as the backend runs it, on graph modules of Dynamo, which generate code only
when they are called; on graph modules of torch.fx, whose code is generated at once; and as
`kernelgraph.rewrite`, which also gives the new nodes fake values.

The graphs are chains of pointwise ops in which every tenth node is an extensible layer, a leaf,
whose kernel is already loaded. They are built with torch.fx, with fake values, and never run.

    python examples/benchmarks/rewrite.py

The compiles that the pass is compared with run in the same process on smaller graphs of the same
kind, after the pass, and are scaled up by their number of nodes: Inductor's, with
empty caches, and that of aot_eager, which traces the graph once more and generates no code.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
import torch._inductor.config
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule

import kernelgraph
from kernelgraph.graph.fx.planner import plan
from kernelgraph.graph.fx.rewriter import replace_layers
from kernelgraph.graph.lowering.options import Options
from kernelgraph.graph.lowering.sites import GraphDecisions
from kernelgraph.selection.scopes import current_mapping

NODES = (12_500, 25_000, 50_000)
COMPILED = {"aot_eager": 2_000, "inductor": 500}
EVERY = 10
REPEATS = 3
SIZE = 16


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
        return x * self.weight + self.eps


class ToyRepository:
    """A repository whose kernel is already loaded."""

    def load(self) -> type[nn.Module]:
        return Kernel


Run = Callable[[fx.GraphModule], None]


def backend_s(graph_module: fx.GraphModule) -> None:
    choices = GraphDecisions(Options(), current_mapping())
    replace_layers(plan(graph_module, choices), choices)


def public(graph_module: fx.GraphModule) -> None:
    kernelgraph.rewrite(graph_module, mode=kernelgraph.Mode.INFERENCE)


PASSES: dict[str, tuple[Run, type[fx.GraphModule]]] = {
    "the pass on Dynamo's graph": (backend_s, _LazyGraphModule),
    "the pass on torch.fx's graph": (backend_s, fx.GraphModule),
    "kernelgraph.rewrite": (public, fx.GraphModule),
}


def graph_of(
    nodes: int, kind: type[fx.GraphModule] = _LazyGraphModule
) -> tuple[fx.GraphModule, Tensor]:
    """Return a chain of ``nodes`` nodes, every tenth a layer, and its fake input."""
    mode = FakeTensorMode()
    value = mode.from_tensor(torch.ones(8, SIZE))
    graph, root = fx.Graph(), nn.Module()
    node = graph.placeholder("x")
    node.meta["val"] = value
    for i in range(nodes):
        if i % EVERY == 0:
            root.add_module(f"layer{i}", Scale())
            node = graph.call_module(f"layer{i}", (node,))
        else:
            node = graph.call_function(torch.relu if i % 2 else torch.tanh, (node,))
        node.meta["val"] = value
    graph.output((node,))
    return kind(root, graph), value


def seconds_of_pass(name: str, nodes: int) -> float:
    """Return the fastest of a few runs: disturbances only slow a run down."""
    run, kind = PASSES[name]
    best = float("inf")
    for _ in range(REPEATS):
        graph_module, _ = graph_of(nodes, kind)
        gc.collect()
        start = time.perf_counter()
        run(graph_module)
        best = min(best, time.perf_counter() - start)
        left = graph_module.graph.find_nodes(op="call_module", sort=False)
        assert not left, left
    return best


def seconds_of_compile(backend: str, nodes: int) -> float:
    """Compile such a graph, after the pass."""
    graph_module, value = graph_of(nodes)
    backend_s(graph_module)
    context = TracingContext(value.fake_mode)  # type: ignore[attr-defined]
    gc.collect()
    start = time.perf_counter()
    with tracing(context), torch._inductor.config.patch(force_disable_caches=True):
        lookup_backend(backend)(graph_module, [value])
    return time.perf_counter() - start


def main() -> None:
    mapping = {"Scale": {"cpu": ToyRepository()}}
    compiles = {}
    with torch.no_grad(), kernelgraph.use_kernel_mapping(mapping, inherit_mapping=False):
        for name in PASSES:
            seconds_of_pass(name, NODES[0] // 10)  # imports, and the op's registration
        print("seconds for 1000 nodes")
        for backend, nodes in COMPILED.items():
            seconds_of_compile(backend, EVERY)
            compiles[backend] = seconds_of_compile(backend, nodes) / nodes * 1e3
            print(f"{backend} on {nodes} nodes: {compiles[backend]:.3f}")
        for name in PASSES:
            for nodes in NODES:
                took = seconds_of_pass(name, nodes) / nodes * 1e3
                shares = ", ".join(f"{took / c:.2%} of {key}" for key, c in compiles.items())
                print(f"{name}, {nodes} nodes: {took:.4f}, {shares}")


if __name__ == "__main__":
    main()
