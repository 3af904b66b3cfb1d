"""TODO."""

from kernelgraph.graph.gradients.bypass import Direct, Form, form_of, recording
from kernelgraph.graph.gradients.gradient import RECOMPUTED, Gradient, Own, wanted_of
from kernelgraph.graph.gradients.recompute import Recompute
from kernelgraph.graph.gradients.tape import NoGradient, Source, Tape, Tapes, handle

__all__ = [
    "RECOMPUTED",
    "Direct",
    "Form",
    "Gradient",
    "NoGradient",
    "Own",
    "Recompute",
    "Source",
    "Tape",
    "Tapes",
    "form_of",
    "handle",
    "recording",
    "wanted_of",
]
