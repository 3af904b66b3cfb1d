"""TODO."""

from kernelgraph.archive.inspector import inspect
from kernelgraph.archive.loader import aot_load, load
from kernelgraph.archive.writer import aot_compile, save

__all__ = [
    "aot_compile",
    "aot_load",
    "inspect",
    "load",
    "save",
]
