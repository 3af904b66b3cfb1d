"""TODO."""

from kernelgraph.graph.autotune.candidates import Pending
from kernelgraph.graph.autotune.cuda_graphs import OpCall, cut_around
from kernelgraph.graph.autotune.policy import decide
from kernelgraph.graph.autotune.records import (
    NATIVE,
    REFERENCE,
    Choice,
    forget,
    kind_of,
    known,
    session_of,
)

__all__ = [
    "NATIVE",
    "REFERENCE",
    "Choice",
    "OpCall",
    "Pending",
    "cut_around",
    "decide",
    "forget",
    "kind_of",
    "known",
    "session_of",
]
