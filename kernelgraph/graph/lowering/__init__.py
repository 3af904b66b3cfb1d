"""TODO."""

from kernelgraph.graph.lowering.lower import decision_of, op_for
from kernelgraph.graph.lowering.options import Options, of_backend
from kernelgraph.graph.lowering.sites import KERNEL, Choices, KeepReference, Site, kernelized_with
from kernelgraph.graph.lowering.traced_code import op_call, reader

__all__ = [
    "KERNEL",
    "Choices",
    "KeepReference",
    "Options",
    "Site",
    "decision_of",
    "kernelized_with",
    "of_backend",
    "op_call",
    "op_for",
    "reader",
]
