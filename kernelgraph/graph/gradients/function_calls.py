"""A call of one ``torch.autograd.Function`` as data: its arguments, results and saved tensors.

The first call of a kernel on a `Tape` is described by a `FunctionCallSpec`. Later calls with
operands of the same sizes and strides are held against it (see `bypass`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from kernelgraph.graph import _torch
from kernelgraph.graph.gradients.gradient import Source, SourceKind
from kernelgraph.graph.gradients.tape import Tape
from kernelgraph.graph.infer import TensorSpec, reach


@dataclass(frozen=True, slots=True)
class DifferentiatedArgument:
    """An argument of a function whose gradient is wanted."""

    argument: int
    """The number of the argument."""
    operand: int
    """The number of the operand that it is."""
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class View:
    """The place of a saved tensor in the tensor that it is a view of."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """The distance from the first element of that tensor, in elements."""


def is_view_at(
    tensor: object, whole: Tensor, shape: torch.Size, stride: tuple[int, ...], offset: int
) -> bool:
    """Whether ``tensor`` is a view of ``whole`` with this shape, stride and offset."""
    return (
        isinstance(tensor, Tensor)
        and tensor.data_ptr() - whole.data_ptr() == offset * whole.itemsize
        and tensor.dtype is whole.dtype
        and tensor.shape == shape
        and tensor.stride() == stride
    )


PRIVATE = -1
"""`SavedTensorSpec.source` of a tensor that is neither an operand nor a result."""


@dataclass(frozen=True, slots=True)
class SavedTensorSpec:
    """A tensor that a function saves for its backward."""

    source: int
    """The index in `FunctionCallSpec.sources` of the tensor that it is in, or `PRIVATE`."""
    view: View | None
    """Its place in the source; None: it is the whole source."""


@dataclass(frozen=True, slots=True)
class FunctionCallSpec:
    """The properties of a kernel's one call of a ``torch.autograd.Function``."""

    function: type[Function]
    needs_input_grad: tuple[bool, ...]
    """That of its context: for each argument, whether a gradient is wanted."""
    arguments: tuple[DifferentiatedArgument, ...]
    """The arguments whose gradients are wanted, in the order of the operands."""
    results: tuple[TensorSpec, ...]
    """The shapes, dtypes and devices of the results."""
    result_strides: tuple[tuple[int, ...], ...]
    """The strides of the results."""
    spans: tuple[int, ...]
    """For each operand, the length of its memory in bytes; 0 for a number."""
    sources: tuple[Source, ...]
    """The operands and results that the backward receives."""
    source_strides: tuple[tuple[int, ...], ...]
    """The strides of each of these."""
    saved: tuple[SavedTensorSpec, ...]
    has_setup_context: bool
    """Whether its context goes to ``setup_context``, and not to the forward."""
    is_registered_op: bool
    """Whether it belongs to a registered op. Torch calls the function of such an op only where
    gradients are recorded."""


def describe_function_call(
    tape: Tape, operands: Sequence[object], made: Sequence[Tensor], sources: Sequence[Source]
) -> FunctionCallSpec | None:
    """Describe the call on a closed tape; None if it is not one that can be made past autograd.

    Args:
        tape: The tape of a call.
        operands: The operands of that call.
        made: The tensors that the caller received for its results.
        sources: The operands and results that the backward receives.
    """
    node: Any = tape.function_node()
    if node is None or tape.tied or len(tape.roots) != len(made):
        return None
    tensors = {
        Source(SourceKind.OPERAND, i): v for i, v in enumerate(operands) if isinstance(v, Tensor)
    }
    tensors |= {Source(SourceKind.RESULT, k): v for k, v in enumerate(made)}
    differentiated = tape.differentiated_operands(node)
    function = _torch.function_of(node)
    # Only the engine knows that an operand whose gradient is wanted but that is no argument has
    # no gradient. Conjugate results would have to be resolved.
    if (
        differentiated is None
        or len(differentiated) != len(tape.leaves)
        or any(v.numel() == 0 for v in tensors.values())
        or any(v.is_complex() for v in made)
        or "vjp" in vars(function)
    ):
        return None
    return FunctionCallSpec(
        function,
        node.needs_input_grad,
        _arguments(node, differentiated, operands),
        tuple(TensorSpec(v.shape, v.dtype, v.device) for v in made),
        tuple(v.stride() for v in made),
        tuple(reach(v) if isinstance(v, Tensor) else 0 for v in operands),
        tuple(sources),
        tuple(tensors[source].stride() for source in sources),
        tuple(_saved_tensors(tape, tensors, sources)),
        _torch.splits_forward(function),
        _torch.is_of_op(function),
    )


def _arguments(
    node: Any, differentiated: Sequence[int], operands: Sequence[Any]
) -> tuple[DifferentiatedArgument, ...]:
    numbers = [j for j, needed in enumerate(node.needs_input_grad) if needed]
    pairs = sorted(zip(numbers, differentiated, strict=True), key=lambda pair: pair[1])
    return tuple(
        DifferentiatedArgument(j, i, operands[i].shape, operands[i].dtype) for j, i in pairs
    )


def _saved_tensors(
    tape: Tape, tensors: dict[Source, Tensor], sources: Sequence[Source]
) -> list[SavedTensorSpec]:
    found = []
    for saved in tape.saved:
        if saved.tensor is not None:
            found.append(SavedTensorSpec(PRIVATE, None))
            continue
        whole = tensors[saved.source]
        is_whole = (saved.shape, saved.stride, saved.offset) == (whole.shape, whole.stride(), 0)
        view = None if is_whole else View(saved.shape, saved.stride, saved.offset)
        found.append(SavedTensorSpec(sources.index(saved.source), view))
    return found
