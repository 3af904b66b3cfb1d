"""Memory of tensors: results that an op may return, and writes into operands.

An op returns tensors that are contiguous and share no memory with its operands or each other. It
writes into no operand that its schema does not declare.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from kernelgraph.graph import _torch

ALIGNMENT = 16
"""The alignment in bytes that Inductor assumes for the results of an op."""


def owned(tensors: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return ``tensors`` in a form that an op may return.

    Each result is contiguous, aligned, at the start of its storage, and shares no memory with
    ``inputs`` or another result. A tensor is copied only where it is not so. Compilers assume the
    first three because fake tensors have them. Empty tensors are always copied: their address is
    0, so it does not show whose memory they share, and autograd tracks writes into them too.
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
            # A lazy conjugate or negation is not in the memory yet.
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
    """Return a contiguous copy."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of the memory of ``tensor`` and the one after its last.

    Storages do not tell: an array of another library over the same memory becomes a tensor with
    another storage.
    """
    start = tensor.data_ptr()
    if tensor.is_contiguous() or tensor.numel() == 0:
        return start, start + tensor.nbytes
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def reach(tensor: Tensor) -> int:
    """Return the number of bytes from the first to the last element of ``tensor``."""
    start, end = extent(tensor)
    return end - start


def versions(operands: Sequence[object]) -> list[int]:
    """Return the version counter of each operand; 0 where there is none."""
    return [
        _torch.version_of(v) if isinstance(v, Tensor) and not v.is_inference() else 0
        for v in operands
    ]


def check_unwritten(
    before: Sequence[int],
    operands: Sequence[object],
    names: Sequence[str],
    who: str,
    may: Container[int] = (),
) -> None:
    """Check that a run wrote into no operands but those in ``may``.

    Args:
        before: The `versions` of the operands before the run.
        operands: The operands.
        names: Their names, for the error.
        who: The kernel or reference that ran, for the error.
        may: The numbers of the operands that it may write into.

    Raises:
        RuntimeError: If it wrote into another operand.
    """
    for i, (old, new) in enumerate(zip(before, versions(operands), strict=True)):
        if old != new and i not in may:
            raise RuntimeError(
                f"{who} wrote into its operand {names[i]}, which does not show on fake tensors"
            )
