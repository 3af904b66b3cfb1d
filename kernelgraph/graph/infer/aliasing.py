"""What an op may return: tensors that are contiguous and share no memory with anything else; and
what it may write into: nothing that it does not say."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelgraph.graph import _torch

ALIGNMENT = 16
"""In bytes; what Inductor takes for granted of an op's results."""


def owned(tensors: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` as an op may return them: contiguous, aligned, at the start of their storage,
    and sharing no memory with ``inputs`` nor with each other; copied only where they are not.

    Compilers take the first three from fake tensors, which are so. Empty ones are copied always:
    autograd sees a write into them too, and by no address of theirs (it is 0) can one tell whose
    memory they have.
    """
    taken = [extent(t) for t in inputs]
    made = []
    for tensor in tensors:
        start, end = extent(tensor)
        fits = (
            tensor.is_contiguous()
            and start < end
            and start % ALIGNMENT == 0
            and not tensor.storage_offset()
            # A sign that is yet to be put into the memory.
            and not (tensor.is_conj() or tensor.is_neg())
            and not any(start < e and s < end for s, e in taken)
        )
        if not fits:
            tensor = contiguous_copy(tensor)
        elif tensor.requires_grad or tensor._is_view():
            tensor = tensor.detach()
        taken.append(extent(tensor))
        made.append(tensor)
    return made


def contiguous_copy(tensor: Tensor) -> Tensor:
    """A copy in memory of its own, without the strides of ``tensor``."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the memory that ``tensor`` reaches, on whatever device.

    By address and not by storage: an array from another library, over the same memory, comes
    back in a storage of its own.
    """
    start = tensor.data_ptr()
    if tensor.is_contiguous() or tensor.numel() == 0:
        return start, start + tensor.nbytes
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def reach(tensor: Tensor) -> int:
    """How many bytes ``tensor`` reaches over."""
    start, end = extent(tensor)
    return end - start


def versions(operands: Sequence[Any]) -> list[int]:
    """How often torch has written into each operand, where that is counted."""
    return [
        _torch.version_of(v) if isinstance(v, Tensor) and not v.is_inference() else 0
        for v in operands
    ]


def check_unwritten(
    before: Sequence[int],
    operands: Sequence[Any],
    names: Sequence[str],
    who: str,
    may: Container[int] = (),
) -> None:
    """See that nothing was written into operands but into those that ``may`` be.

    Args:
        before: Their `versions` before the run.
        operands: The operands.
        names: What each is called.
        who: What ran.
        may: Those that it may write into.

    Raises:
        RuntimeError: If it wrote into another.
    """
    for i, (old, new) in enumerate(zip(before, versions(operands), strict=True)):
        if old != new and i not in may:
            raise RuntimeError(
                f"{who} wrote into its operand {names[i]}, which does not show on fake tensors"
            )
