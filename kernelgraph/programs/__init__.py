"""TODO."""

from kernelgraph.programs.baked_kernels import (
    Baked,
    Build,
    blobs_of,
    every_build,
    hex_of,
    kernels_of,
    listed,
    noted_again,
)
from kernelgraph.programs.exporter import export
from kernelgraph.programs.program_ops import (
    Entry,
    Form,
    Installed,
    Nowhere,
    install,
    installed,
    note_traced,
    traced,
)
from kernelgraph.programs.references import (
    Reference,
    advise,
    know_references,
    namespaces_in,
    ops_in,
    without_ops,
)

__all__ = [
    "Baked",
    "Build",
    "Entry",
    "Form",
    "Installed",
    "Nowhere",
    "Reference",
    "advise",
    "blobs_of",
    "every_build",
    "export",
    "hex_of",
    "install",
    "installed",
    "kernels_of",
    "know_references",
    "listed",
    "namespaces_in",
    "note_traced",
    "noted_again",
    "ops_in",
    "traced",
    "without_ops",
]
