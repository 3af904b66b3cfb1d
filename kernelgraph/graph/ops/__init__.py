"""TODO."""

from kernelgraph.graph.ops.backward import ByReference
from kernelgraph.graph.ops.forward import Body
from kernelgraph.graph.ops.registry import (
    NAMESPACE,
    Lowered,
    lower,
    overload,
    pack,
    packed_operands,
    readable_name,
    register,
    results_of,
    unpack,
)

__all__ = [
    "NAMESPACE",
    "Body",
    "ByReference",
    "Lowered",
    "lower",
    "overload",
    "pack",
    "packed_operands",
    "readable_name",
    "register",
    "results_of",
    "unpack",
]
