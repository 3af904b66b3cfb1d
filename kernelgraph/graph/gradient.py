"""Where the gradient of an op for training comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class Gradient:
    """Where the gradient of an op for training comes from."""

    wanted: tuple[bool, ...]
    """Of which operands there are gradients."""
    own: Own | None = None
    """The kernel's own backward; None: that of the layer's reference, which is run again."""

    @property
    def kind(self) -> str:
        """In a word, for reports."""
        return "reference" if self.own is None else "kernel"


def wanted_of(
    operands: tuple[object, ...] | list[object], *, every: bool = False
) -> tuple[bool, ...]:
    """Of which operands gradients are wanted: those that require them now, or ``every`` one that
    could."""
    return tuple(
        isinstance(v, Tensor)
        and (v.requires_grad or (every and (v.is_floating_point() or v.is_complex())))
        for v in operands
    )
