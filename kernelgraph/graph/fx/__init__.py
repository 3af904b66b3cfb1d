"""The pass over any FX graph: extensible layers that are leaves become kernel ops.

`tracer` makes graphs with extensible layers as leaves. `rewriter` has the pass, for these and for
the graphs of other tracers; `planner` decides about each call, `node_metadata` describes the new
nodes, and `pickling` makes the ops of a pickled graph again. `saved_operands` copies what an op
saves and a later node writes into.

Invariants:

- A graph is changed only after all its calls are decided; an error leaves it as it was.
- A run on example inputs uses fakes and a copy: the caller's modules and tensors stay unchanged.
- An op returns tensors of the layer's ranks, dtypes and devices, in its structure.
- Nodes that are not replaced stay the same nodes, and keep their metadata but for the value.
- No symbolic size is guarded.
- A second run over the same graph changes nothing.
"""

from kernelgraph.graph.fx.planner import plan
from kernelgraph.graph.fx.rewriter import replace_layers, rewrite
from kernelgraph.graph.fx.saved_operands import copy_saved_operands
from kernelgraph.graph.fx.tracer import Tracer

__all__ = [
    "Tracer",
    "copy_saved_operands",
    "plan",
    "replace_layers",
    "rewrite",
]
