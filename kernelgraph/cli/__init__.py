"""TODO."""

from kernelgraph.cli.commands import main

__all__ = [
    "main",
]
