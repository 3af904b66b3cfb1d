"""Saved programs: exported models in files, together with their kernels.

`writer` describes a program in a `manifest` and puts that into torch's own archive, which
`container` writes and reads. `loader` goes the other way: it checks the file, has `supply` obtain
the kernels, registers the ops and lets torch load the program. `compatibility` compares versions of
torch. `inspector` says whether a file would load, without loading it.

Invariants:

- A file appears under its name only when it is whole.
- Every part of a file is checked against its manifest before any other use of the file.
- Every file of every kernel is checked before the first kernel is imported.
- An op is registered only when all kernels are imported, or missing ones have references.
- Code of a kernel is imported only if the user or the Hub vouches for exactly these files.
- `inspect` runs no code of the file and sends no request to the Hub.
"""

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
