"""TODO."""

from kernelgraph.graph.compile.capture import adopt, kernelized_forward
from kernelgraph.graph.compile.trace import Trace, exporting

__all__ = [
    "Trace",
    "adopt",
    "exporting",
    "kernelized_forward",
]
