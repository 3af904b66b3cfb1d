"""Where the gradient of an op for training comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class Own(NamedTuple):
    """What a kernel's own backward needs and does, as a run of it has told.

    Between forward and backward the memory of operands and results is the graph's, which may have
    put other values into it by then: what the kernel has saved of them is given to its backward
    anew. What else it saved is the kernel's own.
    """

    operands: tuple[int, ...] = ()
    """Those that the kernel saves for its backward."""
    results: tuple[int, ...] = ()
    """Those that it saves."""
    flows: tuple[bool, ...] = ()
    """Through which results a gradient flows."""
    holds: bool = False
    """Whether it keeps operands or results where nobody sees it: it gets, and gives, copies."""
    spoils: tuple[str, ...] = ()
    """What its backward writes into, and gets copies of: ``grad 0``, ``operand 1``, ``result 0``,
    and ``saved`` for what is the kernel's own."""


RECOMPUTED = "its backward runs the layer's own forward again, for its gradient"
"""What is done about a kernel whose own backward may not be used, in words."""


@dataclass(frozen=True)
class Gradient:
    """Where the gradient of an op for training comes from."""

    wanted: tuple[bool, ...]
    """Of which operands there are gradients."""
    own: Own | None = None
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
