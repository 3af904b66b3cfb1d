"""Gradients of calls that run on a kernel: by its own backward, or by the layer's reference.

`gradient` says where the gradient of an op comes from. There are two ways to compute it. With the
kernel's own backward the forward runs on a `Tape`, which keeps what the backward needs (`tape`);
calls of a single ``torch.autograd.Function`` (`function_calls`) run past autograd from the second
one on (`bypass`). With the reference's gradient, `Recompute` runs the reference again
(`recompute`), from the formula of a registered op or in eager use.

Invariants:
    - A kernel's own backward never runs the forward again.
    - It never reads the memory that an operand or result had in the forward: it receives them
      anew, or copies. A tape keeps the kernel's private tensors, and of others the places.
    - A tape is freed with the memory of its handle.
    - A call past autograd is checked against the first call of its sizes and strides, and one
      that differs is made again on a tape.
    - The gradients of `Recompute` are those of the layer's reference. That the reference writes
      into an operand for which this was not known before is an error.
"""

from kernelgraph.graph.gradients.bypass import BypassedCall, bypass_spec, bypassing_forward
from kernelgraph.graph.gradients.function_calls import FunctionCallSpec
from kernelgraph.graph.gradients.gradient import (
    RECOMPUTED,
    Gradient,
    Overwrites,
    OwnBackward,
    Source,
    SourceKind,
    wanted_of,
)
from kernelgraph.graph.gradients.recompute import Recompute
from kernelgraph.graph.gradients.tape import NoGradient, Tape, Tapes, handle

__all__ = [
    "RECOMPUTED",
    "BypassedCall",
    "FunctionCallSpec",
    "Gradient",
    "NoGradient",
    "Overwrites",
    "OwnBackward",
    "Recompute",
    "Source",
    "SourceKind",
    "Tape",
    "Tapes",
    "bypass_spec",
    "bypassing_forward",
    "handle",
    "wanted_of",
]
