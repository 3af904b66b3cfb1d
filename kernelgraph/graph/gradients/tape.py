"""A run of a kernel's forward, with what the kernel's own backward needs, kept until that runs.

The forward runs on leaves, so that autograd, or the kernel's ``torch.autograd.Function``, builds
a small graph of its own. The memory of operands and results is not the kernel's to keep: a
compiler that has seen their last use puts other values there. So hooks for saved tensors note
which of them the kernel saves, and the backward is given them anew
(https://docs.pytorch.org/docs/stable/autograd.html#saved-tensors-hooks-doc). The rest is kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call
from kernelgraph.graph.gradients.gradient import Source, SourceKind
from kernelgraph.graph.infer import contiguous_copy, extent


class NoGradient(Exception):
    """A result that a gradient is to flow through has none."""


class _Record:
    """What a run of a forward saves, and what its backward is given of that.

    An object of its own: what autograd keeps refers to it, and the tape to what autograd keeps. A
    cycle through autograd's nodes would never be freed.
    """

    __slots__ = ("copied", "given", "saved")

    def __init__(self) -> None:
        self.saved: list[_Saved] = []
        self.given: Mapping[Source, Tensor] = {}
        self.copied = False
        """Whether the kernel's backward gets copies of what is its own."""

    def pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(self, tensor.detach())
        self.saved.append(saved)
        return saved


class _Saved:
    """A tensor that the kernel saved: one of its own, or where it is in an operand or a result."""

    __slots__ = ("base", "offset", "record", "shape", "source", "stride", "tensor")

    def __init__(self, record: _Record, tensor: Tensor) -> None:
        self.record = record
        self.tensor: Tensor | None = tensor

    def place(self, source: Source, whole: Tensor) -> None:
        """Let go of the tensor, which is in the memory of ``whole``."""
        tensor = self.tensor
        assert tensor is not None
        self.source, self.base = source, whole.stride()
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.offset = (tensor.data_ptr() - whole.data_ptr()) // tensor.itemsize
        self.tensor = None


def _unpack(saved: _Saved) -> Tensor:
    if saved.tensor is not None:
        return saved.tensor.clone() if saved.record.copied else saved.tensor
    whole = saved.record.given[saved.source]
    if whole.stride() != saved.base:  # the compiler has laid it out anew
        whole = laid_out(whole, saved.base)
    if saved.offset == 0 and saved.shape == whole.shape and saved.stride == saved.base:
        return whole
    offset = whole.storage_offset() + saved.offset
    return whole.as_strided(saved.shape, saved.stride, offset)


def laid_out(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """A copy of ``tensor`` in other strides."""
    made = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)


class Tape:
    """One run of a forward.

    Args:
        call: The form of the call.
        operands: What the forward is to be called with.
        wanted: Of which operands gradients are wanted.
        sources: The operands and results that the backward will be given; what else the kernel
            saves of them is copied. None: all.
        holds: Whether the kernel keeps operands or results where no hook sees it: it gets copies.
    """

    def __init__(
        self,
        call: Call,
        operands: Sequence[Any],
        wanted: Sequence[bool],
        sources: frozenset[Source] | None,
        *,
        holds: bool = False,
    ) -> None:
        self.seen: set[Source] = set()
        """The operands and results that the kernel has saved."""
        self._record = _Record()
        self._sources = sources
        self._holds = holds
        self._lent: list[tuple[Source, Tensor]] = []
        self.saves: list[_Saved] = []
        """What the kernel saved."""
        self.roots: list[tuple[int, GradientEdge]] = []
        """The results that a gradient flows through, and where it goes from each."""
        self.leaves: dict[int, Tensor] = {}
        """The operands that gradients are wanted of; of weights that are tied the first."""

        def own(i: int, operand: Tensor) -> Tensor:
            made = contiguous_copy(operand) if holds else operand.detach()
            if wanted[i]:
                self.leaves[i] = made.requires_grad_()
            return made

        self.inputs = call.counterparts(operands, own)
        """What to call the forward with."""
        tensors = [v for v in self.inputs if isinstance(v, Tensor)]
        self.tied = len({id(v) for v in tensors}) < len(tensors)
        """Whether some of the weights are."""
        if not holds:
            given = enumerate(operands)
            self._lent += [
                (Source(SourceKind.OPERAND, i), v) for i, v in given if isinstance(v, Tensor)
            ]

    @property
    def kept(self) -> list[Tensor]:
        """What the kernel saved that is its own."""
        return [saved.tensor for saved in self.saves if saved.tensor is not None]

    def run(self, forward: Callable[[Sequence[Any]], Any]) -> Any:
        """What ``forward`` returns of `inputs`; autograd sees it."""
        with _torch.recording_gradients(), saved_tensors_hooks(self._record.pack, _unpack):
            return forward(self.inputs)

    def close(
        self, results: Sequence[Tensor], made: Sequence[Tensor], flows: Sequence[bool]
    ) -> None:
        """End the recording.

        Args:
            results: What the forward returned.
            made: What is given out in their place, the same memory or copies.
            flows: Through which of them a gradient flows.

        Raises:
            NoGradient: If it cannot.
        """
        if not self._holds:
            self._lent += [(Source(SourceKind.RESULT, k), tensor) for k, tensor in enumerate(made)]
        for saved in self._record.saved:
            self._settle(saved)
        self.saves = self._record.saved
        self._record.saved, self._lent, self.inputs = [], [], []
        for k, (result, flow) in enumerate(zip(results, flows, strict=True)):
            if flow:
                self.roots.append((k, self._root(k, result)))
        if not self._holds:
            for leaf in self.leaves.values():
                _hollow(leaf)

    def _root(self, number: int, result: Tensor) -> GradientEdge:
        if not result.requires_grad:
            raise NoGradient(f"result {number} has no gradient")
        if result.grad_fn is None or self._holds or result._is_view():
            with _torch.recording_gradients():
                return get_gradient_edge(result)
        # As get_gradient_edge, which makes a view to keep the graph alive by; this is quicker.
        _hollow(result)
        return GradientEdge(result.grad_fn, result.output_nr, result)  # type: ignore[arg-type]

    def _settle(self, saved: _Saved) -> None:
        """Tell what of the saved is in memory that is not the kernel's."""
        tensor = saved.tensor
        assert tensor is not None
        if tensor.numel() == 0:
            return
        start, end = extent(tensor)
        for source, whole in self._lent:
            first, last = extent(whole)
            if start < last and first < end:
                self.seen.add(source)
                known = self._sources is None or source in self._sources
                inside = first <= start and end <= last
                # Of numbers there are others in the same memory: other parts, and conjugates.
                same = _reading(tensor) == _reading(whole)
                if known and inside and same:
                    saved.place(source, whole)
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
    ) -> list[Tensor | None]:
        """The gradients of the operands that ``needs`` marks; None where there is none.

        Args:
            grads: Those of the results.
            given: The operands and results that the kernel has saved.
            needs: Of which operands gradients are wanted now, at most those of the forward.
            copied: Whether the backward writes into what else the kernel saved, and gets copies.
        """
        self._record.given, self._record.copied = given, copied
        try:
            with _torch.recording_gradients(enabled=False):
                found = self._found(grads, needs)
        finally:
            self._record.given = {}
        return [found.get(i) for i, needed in enumerate(needs) if needed]

    def _found(
        self, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> dict[int, Tensor | None]:
        leaves = {i: leaf for i, leaf in self.leaves.items() if needs[i]}
        flowing = [(edge, g) for k, edge in self.roots if (g := grads[k]) is not None]
        if not flowing or not leaves:
            return {}
        edges, own = zip(*flowing, strict=True)
        made = torch.autograd.grad(
            edges, list(leaves.values()), own, retain_graph=True, allow_unused=True
        )
        return dict(zip(leaves, made, strict=True))

    def ends(self, node: Any) -> list[int] | None:
        """The operands that gradients of a ``torch.autograd.Function`` are of, one for each of its
        arguments that it makes a gradient of; None if they are not all operands."""
        indices = {id(leaf): i for i, leaf in self.leaves.items()}
        at = [
            indices.get(id(getattr(end, "variable", None)))
            for end, _ in node.next_functions
            if end is not None
        ]
        found = [i for i in at if i is not None]
        if not len(set(found)) == len(at) == sum(node.needs_input_grad):
            return None
        return found

    def node(self) -> Any:
        """The one ``torch.autograd.Function`` that the whole graph is, if so, with all results."""
        node: Any = self.roots[0][1].node if self.roots else None
        if not isinstance(node, BackwardCFunction):
            return None
        if _torch.count_of_results(node) != len(self.roots):
            return None
        edges = [(edge.node is node, edge.output_nr) for _, edge in self.roots]
        return node if edges == [(True, k) for k in range(len(edges))] else None


def _reading(tensor: Tensor) -> tuple[torch.dtype, bool, bool]:
    """How the memory of ``tensor`` is read."""
    return tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _hollow(tensor: Tensor) -> None:
    """Take a tensor's memory from it; the graph that it is in stays."""
    key = tensor.dtype, tensor.device
    if key not in _hollows:
        _hollows[key] = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    tensor.data = _hollows[key]


_hollows: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def handle() -> Tensor:
    """A handle that no tape is under."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


class _Handle(weakref.ref[Any]):
    """To the memory of a handle."""

    __slots__ = ("address",)
    address: int


class Tapes:
    """Tapes under handles: scalars on the CPU, which a graph keeps as long as it can run the
    backward. A tape goes with the memory of its handle, by whose address it is known."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, _Handle]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, tape: object) -> Tensor:
        """A handle for ``tape``."""
        made = handle()
        # To the storage: autograd may keep another tensor over it.
        reference = _Handle(made.untyped_storage(), self._gone)
        reference.address = address = made.data_ptr()
        self._kept[address] = tape, reference
        return made

    def _gone(self, reference: _Handle) -> None:
        # Another handle may have the memory by now.
        if (found := self._kept.get(reference.address)) is not None and found[1] is reference:
            del self._kept[reference.address]

    def get(self, handle: Tensor) -> Any:
        """The tape under ``handle``; None if that is a copy of one."""
        found = self._kept.get(handle.data_ptr())
        return None if found is None else found[0]
