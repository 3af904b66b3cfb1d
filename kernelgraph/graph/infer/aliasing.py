"""Memory of tensors: its order, what shares it, and results that an op may return.

An op returns dense tensors that share no memory with its operands or each other. It writes into no
operand that its schema does not declare.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelgraph.graph import _torch

ALIGNMENT = 16
"""The alignment in bytes that Inductor assumes for the results of an op."""

Order = tuple[int, ...]
"""The dimensions of a dense tensor from the outermost to the innermost in memory. Empty for a
contiguous one."""


# --- the order of dimensions --------------------------------------------------------------------


def order_of(tensor: Tensor) -> Order:
    """Return the order in which a tensor has its dimensions in memory.

    The order of symbolic strides is that of the traced call. A tensor with gaps has the order that
    it would have without them. One that overlaps itself counts as contiguous.
    """
    sizes, strides = ([_torch.hint(n) for n in ns] for ns in (tensor.shape, tensor.stride()))
    longer = [d for d, n in enumerate(sizes) if n > 1]
    if any(strides[d] == 0 for d in longer):
        return ()
    ordered = iter(sorted(longer, key=lambda d: (-strides[d], d)))
    # Dimensions of size 1 stay where they are: their strides say nothing.
    order = tuple(d if sizes[d] <= 1 else next(ordered) for d in range(len(sizes)))
    return () if order == tuple(range(len(sizes))) else order


def dense_strides(shape: Sequence[Any], order: Order) -> tuple[Any, ...]:
    """Return the strides of a dense tensor of this shape and order."""
    strides: list[Any] = [1] * len(shape)
    step: Any = 1
    for dim in reversed(order or range(len(shape))):
        strides[dim] = step
        step = step * (shape[dim] if type(shape[dim]) is not int else max(shape[dim], 1))
    return tuple(strides)


# --- results that an op may return --------------------------------------------------------------


def owned(
    tensors: Sequence[Tensor], inputs: Sequence[Tensor], orders: Sequence[Order] = ()
) -> list[Tensor]:
    """Return ``tensors`` in a form that an op may return.

    Each result is dense, aligned, at the start of its storage, and shares no memory with
    ``inputs`` or another result. A tensor is copied only where it is not so. Compilers assume the
    first three because fake tensors have them. Empty tensors are always copied: their address is
    0, so it does not show whose memory they share, and autograd tracks writes into them too.

    Args:
        tensors: The results.
        inputs: The tensors whose memory they may not have.
        orders: The order of each result; all are contiguous where it is left out.
    """
    taken = [extent(t) for t in inputs]
    made = []
    for number, tensor in enumerate(tensors):
        start, end = extent(tensor)
        order = orders[number] if orders else ()
        fits = (
            tensor.stride() == dense_strides(tensor.shape, order)
            and start < end
            and start % ALIGNMENT == 0
            and not tensor.storage_offset()
            # A lazy conjugate or negation is not in the memory yet.
            and not (tensor.is_conj() or tensor.is_neg())
            and not any(start < e and s < end for s, e in taken)
        )
        if not fits:
            tensor = dense_copy(tensor, order)
        elif tensor.requires_grad or tensor._is_view():
            tensor = tensor.detach()
        taken.append(extent(tensor))
        made.append(tensor)
    return made


def contiguous_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def dense_copy(tensor: Tensor, order: Order) -> Tensor:
    """Return a copy whose dimensions are in this order."""
    size, strides = tensor.shape, dense_strides(tensor.shape, order)
    made = torch.empty_strided(size, strides, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor.detach())


# --- who shares memory with whom ----------------------------------------------------------------


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


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage, fakes for example, may have an element in common."""
    (start, end), (first, last) = map(_span, (one, other))
    if start >= last or first >= end:
        return False
    alike = one.dtype is other.dtype and one.stride() == other.stride()
    if not alike:
        return True
    # Slices side by side, such as the chunks of a last dimension, differ by a step that none of
    # them can take.
    step = abs(first - start)
    strides, sizes, others = (map(_torch.hint, ns) for ns in (one.stride(), one.shape, other.shape))
    steps = sorted(zip(strides, map(max, sizes, others), strict=True), reverse=True)
    return _reachable(step // one.itemsize, steps)


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the bytes of its storage at which a tensor begins and ends."""
    sizes, strides = (map(_torch.hint, ns) for ns in (tensor.shape, tensor.stride()))
    start = _torch.hint(tensor.storage_offset())
    last = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    return start * tensor.itemsize, (start + last + 1) * tensor.itemsize


def _reachable(distance: int, steps: Sequence[tuple[int, int]]) -> bool:
    """Whether sums of fewer than ``count`` steps of each ``size`` come to ``distance``."""
    if not steps:
        return distance == 0
    (size, count), *smaller = steps
    if size == 0 or count <= 1:
        return _reachable(distance, smaller)
    nearest = distance // size
    return any(
        abs(taken) < count and _reachable(abs(distance - taken * size), smaller)
        for taken in (nearest, nearest + 1)
    )


def copies_of(values: Sequence[Any], numbers: Container[int]) -> list[Any]:
    """Return ``values`` with copies of some of them, which share memory as the originals do.

    Args:
        values: Tensors, and other values, which stay.
        numbers: The numbers of the tensors to copy. A tensor whose memory overlaps that of one of
            them is copied too.
    """
    extents = {i: extent(v) for i, v in enumerate(values) if isinstance(v, Tensor)}
    copied = {i for i in extents if i in numbers}
    storages: dict[int, torch.UntypedStorage] = {}
    made = list(values)
    for i, (start, end) in extents.items():
        beside = [j for j, (first, last) in extents.items() if start < last and first < end]
        if not copied.intersection(beside):
            continue
        if beside == [i]:
            made[i] = contiguous_copy(values[i])
            continue
        storage = values[i].untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        made[i] = torch.empty(0, dtype=values[i].dtype, device=values[i].device).set_(
            storages[storage.data_ptr()],
            values[i].storage_offset(),
            values[i].size(),
            values[i].stride(),
        )
    return made


def memory_of(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor, from its first element to its last, in one dimension.

    Writes into it do not count in the version of ``tensor``.
    """
    plain = tensor.data
    return plain.as_strided((reach(plain) // plain.itemsize,), (1,))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same shape and dtype have the same bits."""
    # A contiguous tensor of one element may have any stride, with which it has no view as bytes.
    flat = (t.detach().contiguous().as_strided((t.numel(),), (1,)) for t in (one, other))
    return torch.equal(*(t.view(torch.uint8) for t in flat))


# --- writes that autograd counts ----------------------------------------------------------------


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
