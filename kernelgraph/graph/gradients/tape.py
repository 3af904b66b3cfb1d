"""A run of a kernel's forward, kept with what the kernel's own backward needs until that runs.

The forward runs on leaves, so that autograd, or the kernel's ``torch.autograd.Function``, builds
a small graph of its own. The memory of operands and results is not the kernel's to keep: a
compiler that has seen their last use puts other values there. So hooks for saved tensors note
which of them the kernel saves, and the backward receives them anew
(https://docs.pytorch.org/docs/stable/autograd.html#saved-tensors-hooks-doc). The other saved
tensors stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call
from kernelgraph.graph.gradients.gradient import Source, SourceKind
from kernelgraph.graph.infer import contiguous_copy, extent

T = TypeVar("T")


class NoGradient(Exception):
    """A result that a gradient should flow through has none."""


class _Record:
    """The tensors that a run of a forward saves, and what its backward receives for them.

    An object of its own: what autograd keeps refers to it, and the tape to what autograd keeps. A
    cycle through autograd's nodes would never be freed.
    """

    __slots__ = ("copied", "given", "saved")

    def __init__(self) -> None:
        self.saved: list[_SavedTensor] = []
        self.given: Mapping[Source, Tensor] = {}
        self.copied = False
        """Whether the kernel's backward receives copies of the kernel's private tensors."""

    def pack(self, tensor: Tensor) -> _SavedTensor:
        saved = _SavedTensor(self, tensor.detach())
        self.saved.append(saved)
        return saved


class _SavedTensor:
    """A tensor that the kernel saved: a private one, or a view of an operand or a result."""

    __slots__ = ("base", "offset", "record", "shape", "source", "stride", "tensor")

    def __init__(self, record: _Record, tensor: Tensor) -> None:
        self.record = record
        self.tensor: Tensor | None = tensor
        """The tensor, if it is private to the kernel."""

    def replace_by_view(self, source: Source, whole: Tensor) -> None:
        """Release the tensor, and note which view of ``whole`` it is."""
        tensor = self.tensor
        assert tensor is not None
        self.source, self.base = source, whole.stride()
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.offset = (tensor.data_ptr() - whole.data_ptr()) // tensor.itemsize
        self.tensor = None


def _unpack(saved: _SavedTensor) -> Tensor:
    if saved.tensor is not None:
        return saved.tensor.clone() if saved.record.copied else saved.tensor
    whole = saved.record.given[saved.source]
    if whole.stride() != saved.base:  # the compiler has changed the layout
        whole = with_strides(whole, saved.base)
    if saved.offset == 0 and saved.shape == whole.shape and saved.stride == saved.base:
        return whole
    offset = whole.storage_offset() + saved.offset
    return whole.as_strided(saved.shape, saved.stride, offset)


def with_strides(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """Copy ``tensor`` into memory with other strides."""
    made = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)


class Tape:
    """One run of a forward, for a backward that runs later.

    Args:
        call: The signature of the call.
        operands: The operands that the forward is called with.
        wanted: For each operand, whether its gradient is wanted.
        sources: The operands and results that the backward will receive; other tensors that the
            kernel saves of them are copied. None: all.
        hidden_saves: Whether the kernel keeps operands or results where no hook sees it. It then
            receives copies.
    """

    def __init__(
        self,
        call: Call,
        operands: Sequence[object],
        wanted: Sequence[bool],
        sources: frozenset[Source] | None,
        *,
        hidden_saves: bool = False,
    ) -> None:
        self.seen: set[Source] = set()
        """The operands and results that the kernel has saved."""
        self._record = _Record()
        self._sources = sources
        self._hidden_saves = hidden_saves
        self._external: list[tuple[Source, Tensor]] = []
        """The operands and results whose memory is not the kernel's to keep."""
        self.saved: list[_SavedTensor] = []
        """The tensors that the kernel saved."""
        self.roots: list[tuple[int, GradientEdge]] = []
        """For each result that a gradient flows through, its number and its gradient edge."""
        self.leaves: dict[int, Tensor] = {}
        """The operands whose gradients are wanted; of tied weights only the first."""

        self.layer: object = None
        """The stand-in for the layer, if no other call has it."""

        def leaf(i: int, operand: Tensor) -> Tensor:
            made = contiguous_copy(operand) if hidden_saves else operand.detach()
            if wanted[i]:
                self.leaves[i] = made.requires_grad_()
            return made

        self.inputs = call.counterparts(operands, leaf)
        """The operands that the forward is really called with."""
        tensors = [v for v in self.inputs if isinstance(v, Tensor)]
        self.tied = len({id(v) for v in tensors}) < len(tensors)
        """Whether some weights are tied."""
        if not hidden_saves:
            self._external += [
                (Source(SourceKind.OPERAND, i), v)
                for i, v in enumerate(operands)
                if isinstance(v, Tensor)
            ]

    @property
    def kept(self) -> list[Tensor]:
        """The saved tensors that are private to the kernel."""
        return [saved.tensor for saved in self.saved if saved.tensor is not None]

    def run(self, forward: Callable[[Sequence[object]], T]) -> T:
        """Call ``forward`` with `inputs`, recorded by autograd."""
        with _torch.recording_gradients(), saved_tensors_hooks(self._record.pack, _unpack):
            return forward(self.inputs)

    def close(
        self, results: Sequence[Tensor], made: Sequence[Tensor], flows: Sequence[bool]
    ) -> None:
        """End the recording.

        Args:
            results: The result tensors of the forward.
            made: The tensors that the caller receives in their place, with the same memory or as
                copies.
            flows: For each result, whether a gradient flows through it.

        Raises:
            NoGradient: If a result that a gradient should flow through has none.
        """
        if not self._hidden_saves:
            self._external += [(Source(SourceKind.RESULT, k), v) for k, v in enumerate(made)]
        for saved in self._record.saved:
            self._classify(saved)
        self.saved = self._record.saved
        self._record.saved, self._external, self.inputs = [], [], []
        for k, (result, flow) in enumerate(zip(results, flows, strict=True)):
            if flow:
                self.roots.append((k, self._root(k, result)))
        if not self._hidden_saves:
            for leaf in self.leaves.values():
                _drop_memory(leaf)

    def _root(self, number: int, result: Tensor) -> GradientEdge:
        if not result.requires_grad:
            raise NoGradient(f"result {number} has no gradient")
        if result.grad_fn is None or self._hidden_saves or result._is_view():
            with _torch.recording_gradients():
                return get_gradient_edge(result)
        # get_gradient_edge makes a view to keep the graph alive; this is quicker.
        _drop_memory(result)
        return GradientEdge(result.grad_fn, result.output_nr, result)  # type: ignore[arg-type]

    def _classify(self, saved: _SavedTensor) -> None:
        """Find out whether a saved tensor is private, and if not, which view it is."""
        tensor = saved.tensor
        assert tensor is not None
        if tensor.numel() == 0:
            return
        start, end = extent(tensor)
        for source, whole in self._external:
            first, last = extent(whole)
            if start < last and first < end:
                self.seen.add(source)
                known = self._sources is None or source in self._sources
                inside = first <= start and end <= last
                # The same memory can hold other numbers too: real parts, and conjugates.
                same = _interpretation(tensor) == _interpretation(whole)
                if known and inside and same:
                    saved.replace_by_view(source, whole)
                else:
                    saved.tensor = tensor.clone()
                return

    def gradients(
        self,
        grads: Sequence[Tensor | None],
        given: Mapping[Source, Tensor],
        needs: Sequence[bool],
        *,
        copied: bool = False,
        recording: bool = True,
    ) -> list[Tensor | None]:
        """Run the backward, and return the gradients of the operands that ``needs`` marks.

        None stands for a gradient that does not exist.

        Args:
            grads: The gradients of the results.
            given: The operands and results that the kernel has saved.
            needs: For each operand, whether its gradient is wanted now. Only gradients that were
                wanted in the forward may be.
            copied: Whether the backward writes into the kernel's private tensors, and therefore
                receives copies.
            recording: Whether autograd can record in the backward, where that enables gradients.
        """
        self._record.given, self._record.copied = given, copied
        try:
            with _torch.recording_gradients(enabled=False, below=not recording):
                found = self._differentiate(grads, needs)
        finally:
            self._record.given = {}
        return [found.get(i) for i, needed in enumerate(needs) if needed]

    def _differentiate(
        self, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> dict[int, Tensor | None]:
        leaves = {i: leaf for i, leaf in self.leaves.items() if needs[i]}
        flowing = [(edge, g) for k, edge in self.roots if (g := grads[k]) is not None]
        if not flowing or not leaves:
            return {}
        edges, incoming = zip(*flowing, strict=True)
        found = torch.autograd.grad(
            edges, list(leaves.values()), incoming, retain_graph=True, allow_unused=True
        )
        return dict(zip(leaves, found, strict=True))

    def function_node(self) -> object:
        """Return the node of the one ``torch.autograd.Function`` that made the results.

        None if they come from another kind of node, from several, or are not all that it made.
        """
        node: Any = self.roots[0][1].node if self.roots else None
        if not isinstance(node, BackwardCFunction):
            return None
        if _torch.count_of_results(node) != len(self.roots):
            return None
        edges = [(edge.node is node, edge.output_nr) for _, edge in self.roots]
        return node if edges == [(True, k) for k in range(len(edges))] else None

    def differentiated_operands(self, node: Any) -> list[int] | None:
        """Return which operand each argument is that a function computes a gradient for.

        None if one of these arguments is no operand, or the same operand as another.

        Args:
            node: The function's node in the graph.
        """
        indices = {id(leaf): i for i, leaf in self.leaves.items()}
        operands = [
            indices.get(id(getattr(edge, "variable", None)))
            for edge, _ in node.next_functions
            if edge is not None
        ]
        found = [i for i in operands if i is not None]
        if not len(set(found)) == len(operands) == sum(node.needs_input_grad):
            return None
        return found


def _interpretation(tensor: Tensor) -> tuple[torch.dtype, bool, bool]:
    """Return what numbers the memory of ``tensor`` stands for."""
    return tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _drop_memory(tensor: Tensor) -> None:
    """Take a tensor's memory from it; the graph that it is in stays."""
    key = tensor.dtype, tensor.device
    if key not in _empty_tensors:
        _empty_tensors[key] = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    tensor.data = _empty_tensors[key]


_empty_tensors: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def handle() -> Tensor:
    """Create a handle that no tape is kept under."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


class _Handle(weakref.ref[torch.UntypedStorage]):
    """A weak reference to the memory of a handle."""

    __slots__ = ("address",)
    address: int


class Tapes:
    """Tapes under handles: scalars on the CPU, which a graph keeps as long as it can run the
    backward. A tape is freed with the memory of its handle, whose address identifies it."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[object, _Handle]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, tape: object) -> Tensor:
        """Keep ``tape``, and return its handle."""
        made = handle()
        # A reference to the storage: autograd may keep another tensor over it.
        reference = _Handle(made.untyped_storage(), self._free)
        reference.address = address = made.data_ptr()
        self._kept[address] = tape, reference
        return made

    def _free(self, reference: _Handle) -> None:
        # Another handle may have the memory by now.
        if (found := self._kept.get(reference.address)) is not None and found[1] is reference:
            del self._kept[reference.address]

    def get(self, handle: Tensor) -> Any:
        """Return the tape under ``handle``; None if that is a copy of a handle."""
        found = self._kept.get(handle.data_ptr())
        return None if found is None else found[0]
