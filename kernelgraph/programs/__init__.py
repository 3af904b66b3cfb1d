"""A model as an ``ExportedProgram`` with its kernels baked in.

`exporter` runs ``torch.export`` with layers that call ops. `export_ops` makes these ops: it turns a
call into data (`portable_json`, `portable_call`, `portable_sizes`), and `program_ops` registers an
op from that data and a kernel, where the model is exported as well as where a saved program is
loaded. `references` traces the layers' own forwards, for gradients, for other runtimes and for
machines without the kernel. `baked_kernels` records which kernels a program has. Files are not
written or read here: that is `kernelgraph.archive`.

Invariants:

- An op is made from JSON and a kernel alone, also in the process that exports the model.
- The name of an op has a digest of that JSON and of the kernel's revision.
- Reading such JSON runs no code that it names: it gives data, stand-in classes and torch's own.
- ``export`` leaves the model as it was, also when it raises.
- An op for training has a reference for each of its calls in the program, or ``export`` raises.
- A kernel is recorded by content: its commit on the Hub, or the digests of all its files.
"""

from kernelgraph.programs.baked_kernels import (
    Baked,
    Build,
    KernelRecords,
    LoadedLayer,
    blobs_of,
    hex_of,
    record_again,
    record_kernel,
    record_traced,
    traced_kernels,
    with_every_build,
    with_listing,
)
from kernelgraph.programs.exporter import export
from kernelgraph.programs.portable_json import Json, as_array, as_object, as_pair, as_text
from kernelgraph.programs.program_ops import (
    InstalledOp,
    KernelMember,
    ProgramOp,
    ProgramOpSpec,
    add_advice,
    install,
    installed_ops,
    namespaces_in,
    ops_in,
    replace_with_references,
    use_references,
)
from kernelgraph.programs.references import Reference

__all__ = [
    "Baked",
    "Build",
    "InstalledOp",
    "Json",
    "KernelMember",
    "KernelRecords",
    "LoadedLayer",
    "ProgramOp",
    "ProgramOpSpec",
    "Reference",
    "add_advice",
    "as_array",
    "as_object",
    "as_pair",
    "as_text",
    "blobs_of",
    "export",
    "hex_of",
    "install",
    "installed_ops",
    "namespaces_in",
    "ops_in",
    "record_again",
    "record_kernel",
    "record_traced",
    "replace_with_references",
    "traced_kernels",
    "use_references",
    "with_every_build",
    "with_listing",
]
