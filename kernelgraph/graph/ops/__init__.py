"""A call signature as a registered custom op: its schema, its fake and its autograd formula.

`lower` takes a kernel, a layer and a `Call` and returns a `Lowered`: the op that makes such calls,
defined in torch (``definition``) under a name that covers all that its body depends on
(``registry``). The body of an op for inference is a `Body`, which runs the kernel and checks its
results (``forward``); from the second call on, a generated function does so with a few cheap tests
(``fast_path``). An op for training has a body with a gradient: the kernel's own, or that of the
reference (``backward``).

Invariants:
    - The results of an op are dense, aligned and at the start of their storage, and share no memory
      with its operands or with each other.
    - They have the shapes, strides, dtypes and devices that the fake of the op gives them: those of
      the layer's results.
    - An op writes into none of its operands. Where the layer does, the new contents are results.
    - A body never changes under a name: equal names mean equal bodies, in every process.
    - Equal calls of the instances of a layer share an op, which is registered once in a process.
    - An op keeps no tensor beyond a call, except for a backward that is still to run.
    - An error of a kernel names the kernel, the layer and its path; being out of memory stays a
      `torch.OutOfMemoryError`.
"""

from kernelgraph.graph.ops.backward import ByReference
from kernelgraph.graph.ops.definition import (
    NAMESPACE,
    overload,
    pack,
    packed_operands,
    register,
    results_of,
    unpack,
)
from kernelgraph.graph.ops.forward import Body
from kernelgraph.graph.ops.registry import Lowered, check_possible, lower, readable_name, saved_by

__all__ = [
    "NAMESPACE",
    "Body",
    "ByReference",
    "Lowered",
    "check_possible",
    "lower",
    "overload",
    "pack",
    "packed_operands",
    "readable_name",
    "register",
    "results_of",
    "saved_by",
    "unpack",
]
