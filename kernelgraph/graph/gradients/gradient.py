"""The source of the gradient of an op for training."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class SourceKind(str, enum.Enum):
    """The two lists that a tensor saved for a backward may come from."""

    OPERAND = "operand"
    RESULT = "result"


class Source(NamedTuple):
    """One operand or result of a call."""

    kind: SourceKind
    number: int


class Overwrites(NamedTuple):
    """The tensors that a backward writes into, and therefore receives copies of."""

    grads: tuple[int, ...] = ()
    """Incoming gradients, by the numbers of their results."""
    saved: tuple[Source, ...] = ()
    """Operands and results that the kernel saved."""
    private: bool = False
    """Whether it writes into other tensors that the kernel saved."""


class OwnBackward(NamedTuple):
    """How a kernel's own backward has to be run, as a trial run found out.

    Between forward and backward a compiler may put other values into the memory of operands and
    results. So the backward receives those that the kernel saved anew. Other saved tensors are
    the kernel's private ones, and stay.
    """

    sources: tuple[Source, ...] = ()
    """The operands and results that the kernel saves for its backward."""
    flows: tuple[bool, ...] = ()
    """For each result, whether a gradient flows through it."""
    hidden_saves: bool = False
    """Whether the kernel keeps operands or results where no saved-tensor hook sees them. It then
    receives copies and returns copies."""
    overwrites: Overwrites = Overwrites()
    uses_autograd: bool = False
    """Whether its backward uses autograd itself, which then has to record."""


RECOMPUTED = "its backward runs the layer's own forward again, for its gradient"
"""The remedy for a kernel whose own backward may not be used, in the words of a warning."""


@dataclass(frozen=True)
class Gradient:
    """The source of the gradient of an op for training."""

    wanted: tuple[bool, ...]
    """For each operand, whether the op has a gradient of it."""
    own: OwnBackward | None = None
    """The kernel's own backward; None: the layer's reference is run again for the gradient."""
    why: str = field(default="", compare=False)
    """The reason for not using the kernel's own backward."""
    checkpointed: bool = False
    """Whether the op is for calls inside of activation checkpoints. It is another than that for
    equal calls outside: AOTAutograd would merge the two, and then has to save the results of the
    one and must not save those of the other."""

    def __str__(self) -> str:
        return "kernel" if self.own else f"reference: {self.why}" if self.why else "reference"


def wanted_of(operands: Sequence[object], *, every: bool = False) -> tuple[bool, ...]:
    """Tell for each operand whether its gradient is wanted.

    Args:
        operands: The operands of a call.
        every: Mark every operand that could have a gradient, and not only those that require one.
    """
    return tuple(
        isinstance(v, Tensor)
        and (v.requires_grad or (every and (v.is_floating_point() or v.is_complex())))
        for v in operands
    )
