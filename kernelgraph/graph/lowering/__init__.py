"""From a call site to its op: which kernel stands in for a call of a layer, and as which op.

`options` checks the options of the backend. `sites` has the call site, `Site`, and the decisions
for the call sites of one graph, `GraphDecisions`: its ``kernel_for`` selects a kernel by the
mapping, or raises `KeepReference`. `lower` verifies that kernel as the options say and has its op
registered (`op_for`). `traced_code` writes the Python code that calls the op, for Dynamo to trace.
The wings above use the same steps: `kernelgraph.graph.compile` for calls that Dynamo traces,
`kernelgraph.graph.fx` for nodes of finished graphs, `kernelgraph.programs` for exports.

Invariants:
    - A layer keeps its reference only by `KeepReference`, which carries the row of the report.
    - `Options.parse` returns valid options or raises; it does not change what it is given.
    - A layer that ``kernelize`` bound for compiling has that kernel. Any other layer with a forward
      of its own, or that its condition refuses, keeps its reference.
    - With ``verify``, and where a gradient can flow, `op_for` registers an op only for a kernel
      that was verified as the options ask.
    - The mapping is asked once for each layer class, device and mode of a graph.
"""

from kernelgraph.graph.lowering.lower import decision_of, op_for
from kernelgraph.graph.lowering.options import Compiler, Options, Policy, options_of_backend
from kernelgraph.graph.lowering.sites import (
    KERNEL_ATTRIBUTE,
    GraphDecisions,
    KeepReference,
    Site,
    check_untransformed,
    kernelized_with,
)
from kernelgraph.graph.lowering.traced_code import op_caller, state_reader

__all__ = [
    "KERNEL_ATTRIBUTE",
    "Compiler",
    "GraphDecisions",
    "KeepReference",
    "Options",
    "Policy",
    "Site",
    "check_untransformed",
    "decision_of",
    "kernelized_with",
    "op_caller",
    "op_for",
    "options_of_backend",
    "state_reader",
]
