"""TODO."""

from kernelgraph.graph.gradients.bypass import Direct, Form, form_of, recording
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
    "Direct",
    "Form",
    "Gradient",
    "NoGradient",
    "Overwrites",
    "OwnBackward",
    "Recompute",
    "Source",
    "SourceKind",
    "Tape",
    "Tapes",
    "form_of",
    "handle",
    "recording",
    "wanted_of",
]
