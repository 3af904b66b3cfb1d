"""torch.compile: capture the calls of layers while Dynamo traces, and the backend.

`capture` wraps the forwards of extensible classes (`adopt`), so that each call becomes one op node
where Dynamo traces it. `trace` has the state of one graph while it is traced (`Trace`). Dynamo then
gives the graph to `backend`, whose function ``hubkernels`` is the entry point that torch finds by
its name: it has the calls tuned, replaces layers that are still modules, publishes the report, and
has the inner compiler compile the graph. Exports set a `Trace` of their own (`exporting`).

Invariants:
    - Outside of Dynamo a wrapped forward only runs the forward that it wraps.
    - A layer that keeps its reference leaves the graph that there would be without kernelgraph.
    - All that a decision depends on is guarded: Python values, and what the mapping in force has
      for the layers of the graph.
    - Nothing that is captured depends on the instance, unless its layer has a condition: blocks of
      one class share a compiled graph.
    - Under other backends only layers that ``kernelize`` bound for compiling have kernels.
"""

from kernelgraph.graph.compile.capture import adopt, kernelized_forward
from kernelgraph.graph.compile.trace import Trace, exporting

__all__ = [
    "Trace",
    "adopt",
    "exporting",
    "kernelized_forward",
]
