"""Where the gradient of an op for training comes from."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


RECOMPUTED = "its backward runs the layer's own forward again, for its gradient"
"""What is done about a kernel whose own backward may not be used, in words."""


@dataclass(frozen=True)
class Gradient:
    """Where the gradient of an op for training comes from."""

    wanted: tuple[bool, ...]
    """Of which operands there are gradients."""
    own: OwnBackward | None = None
    """The kernel's own backward; None: that of the layer's reference, which is run again."""
    why: str = field(default="", compare=False)
    """Why not the kernel's own."""

    def __str__(self) -> str:
        return "kernel" if self.own else f"reference: {self.why}" if self.why else "reference"


def wanted_of(operands: Sequence[Any], *, every: bool = False) -> tuple[bool, ...]:
    """Of which operands gradients are wanted: of those that require them, or of ``every`` one
    that could."""
    return tuple(
        isinstance(v, Tensor)
        and (v.requires_grad or (every and (v.is_floating_point() or v.is_complex())))
        for v in operands
    )
