"""TODO."""

from kernelgraph.graph.fx.planner import plan
from kernelgraph.graph.fx.rewriter import replace_layers, rewrite
from kernelgraph.graph.fx.tracer import Tracer

__all__ = [
    "Tracer",
    "plan",
    "replace_layers",
    "rewrite",
]
