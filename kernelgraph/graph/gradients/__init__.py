"""Gradients of calls that run on a kernel: by its own backward, or by the layer's reference.

`gradient` says where the gradient of an op comes from. There are two ways to compute it. With the
kernel's own backward the forward runs on a `Tape`, which keeps what the backward needs (`tape`);
calls of a single ``torch.autograd.Function`` (`function_calls`) run past autograd from the second
one on (`bypass`). With the reference's gradient, `Recompute` runs the reference again
(`recompute`), from the formula of a registered op or in eager use.

Invariants:
    - A kernel's forward runs once for each call: its own backward never runs it again.
    - A backward never reads the memory of an operand or result after the forward. It receives
      them anew, and they may have other strides than in the forward.
    - A tape is freed with its handle, and holds no memory of operands or results, unless the
      kernel has hidden saves.
    - A call past autograd is checked against the first call of its sizes and strides, and one
      that differs in anything runs on a tape.
    - The gradients of `Recompute` are those of the layer's reference. An operand that the
      reference writes into without declaring it is an error.
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
