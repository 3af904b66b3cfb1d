"""TODO."""

from kernelgraph.eager.kernelization import KernelForward, candidates, kernelize

__all__ = [
    "KernelForward",
    "candidates",
    "kernelize",
]
