"""The runs of a trial: a layer's reference and a kernel, forward and backward, on made-up operands.

`Trial.reference` runs both passes of the reference, `Trial.forward` the forward of the kernel, and
a `TapedRun` both passes of the kernel, on the `Tape` that it would run on in a compiled graph.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import (
    Call,
    Constant,
    Runner,
    Template,
    UnsupportedValue,
    flatten_tensors,
)
from kernelgraph.graph.gradients import Source, SourceKind, Tape
from kernelgraph.graph.infer import (
    Operands,
    StridedSpec,
    contiguous_copy,
    owned,
    same_bits,
    versions,
)
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible


class CannotCompare(Exception):
    """The reference gives nothing that a kernel's results or gradients can be compared with."""


class Run(NamedTuple):
    """The results of the forward and the backward of a run."""

    template: Template
    """The structure of what the forward returned."""
    results: list[Tensor]
    flows: tuple[bool, ...]
    """For each result, whether a gradient flows through it."""
    gradients: list[Tensor | None]
    """The gradients of the operands that they are wanted of."""


@dataclass
class Trial:
    """A layer's reference, and a kernel in its place, that are to be run on made-up operands."""

    layer: Extensible
    kernel: Kernel
    call: Call
    samples: Operands
    """Makes the operands of each run."""
    wanted: tuple[bool, ...]
    """For each operand, whether its gradient is wanted."""

    def __post_init__(self) -> None:
        self.reference_runner = Runner(self.layer.reference, self.call)
        self.kernel_runner = Runner(self.kernel.forward, self.call)

    @property
    def seeds(self) -> range:
        """The seeds of the runs that are compared: one run of large operands has enough values."""
        count = sum(v.numel() if isinstance(v, Tensor) else v.reach for v in self.samples.tensors)
        return range(3 if count < 2**24 else 1)

    @property
    def names(self) -> list[str]:
        """The names of the operands that gradients are wanted of."""
        return [n for n, wanted in zip(self.call.names, self.wanted, strict=True) if wanted]

    def reference(self, seed: int, *, draw: int = 0, in_float64: bool = False) -> Run:
        """Run the layer's reference.

        Args:
            seed: The seed of the operands and the incoming gradients.
            draw: The seed of the random numbers that the reference draws.
            in_float64: Whether the operands are widened to float64.

        Raises:
            CannotCompare: If the reference writes into its operands.
            UnsupportedValue: If it does what no op can.
            Exception: If it raises.
        """
        with self.samples.apart(draw), torch.enable_grad(), _torch.recording_gradients():
            operands = self.samples.make(seed)
            if in_float64:
                operands = [_widened(v) if isinstance(v, Tensor) else v for v in operands]
            leaves = [
                v.detach().requires_grad_(wanted) if isinstance(v, Tensor) else v
                for v, wanted in zip(operands, self.wanted, strict=True)
            ]
            inputs = [v.view_as(v) if isinstance(v, Tensor) else v for v in leaves]
            before = versions(inputs)
            results, template = flatten_tensors(self.reference_runner.observe(inputs))
            if versions(inputs) != before:
                raise CannotCompare("the layer writes into its operands")
            flows = tuple(result.requires_grad for result in results)
            grads = incoming_gradients(results, flows, seed)
            flowing = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
            sources = [v for v, wanted in zip(leaves, self.wanted, strict=True) if wanted]
            gradients: Sequence[Tensor | None] = [None] * len(sources)
            if flowing:
                roots, incoming = zip(*flowing, strict=True)
                gradients = torch.autograd.grad(roots, sources, incoming, allow_unused=True)
            return Run(template, [r.detach() for r in results], flows, list(gradients))

    def forward(self, seed: int) -> Run:
        """Run the forward of the kernel alone.

        Raises:
            Exception: If it raises.
        """
        with self.samples.apart(0):
            output = self.kernel_runner.observe(self.samples.make(seed))
            try:
                results, template = flatten_tensors(output)
            except UnsupportedValue:
                return Run(Constant(f"a {type(output).__name__}"), [], (), [])
            return Run(template, [r.clone() for r in results], (), [])


def _widened(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def incoming_gradients(
    results: Sequence[Tensor], flows: Sequence[bool], seed: int
) -> list[Tensor | None]:
    """Draw gradients of the results that one flows through, equal ones for equal seeds."""
    made: list[Tensor | None] = []
    for k, (result, flow) in enumerate(zip(results, flows, strict=True)):
        gradient = None
        if flow:
            generator = torch.Generator(result.device).manual_seed(1000 * seed + k)
            # Numbers of these dtypes are the same in every precision.
            dtype = torch.complex64 if result.is_complex() else torch.bfloat16
            shape, device = result.shape, result.device
            drawn = torch.randn(shape, dtype=dtype, device=device, generator=generator)
            gradient = drawn.to(result.dtype)
        made.append(gradient)
    return made


class TapedRun:
    """A run of a kernel on a tape: the forward has run, and the backward may, also several times.

    To be made and used within `Operands.apart`.

    Args:
        trial: The trial.
        seed: The seed of the operands.
        hidden_saves: Whether the kernel receives copies and returns copies, as one needs that
            keeps tensors where no saved-tensor hook sees them.
        sources: The operands and results that the backward will receive; None: all that the
            kernel saves.
    """

    def __init__(
        self,
        trial: Trial,
        seed: int,
        *,
        hidden_saves: bool,
        sources: frozenset[Source] | None = None,
    ) -> None:
        self._trial, self._seed = trial, seed
        self._before = trial.samples.make(seed)
        self._operands = [_copy(v) if isinstance(v, Tensor) else v for v in self._before]
        self.tape = Tape(
            trial.call, self._operands, trial.wanted, sources, hidden_saves=hidden_saves
        )
        # A kernel that keeps the layer for its backward needs one of its own.
        observed = functools.partial(trial.kernel_runner.observe, may_keep=hidden_saves)
        results, _ = flatten_tensors(self.tape.run(observed))
        self.flows = tuple(result.requires_grad for result in results)
        tensors = [v for v in self._operands if isinstance(v, Tensor)]
        self._made = (
            list(map(contiguous_copy, results)) if hidden_saves else owned(results, tensors)
        )
        self.tape.close(results, self._made, self.flows)
        self.results = [contiguous_copy(result) for result in self._made]
        """Copies of what the forward returned."""

    @property
    def written(self) -> list[str]:
        """The names of the operands that the forward wrote into."""
        values = zip(self._trial.call.names, self._operands, self._before, strict=True)
        return [
            name
            for name, now, before in values
            if isinstance(now, Tensor) and not same_bits(now, before)
        ]

    def overwrite(self) -> None:
        """Overwrite operands and results, as a compiler does that reuses their memory."""
        for tensor in (*self._operands, *self._made):
            if isinstance(tensor, Tensor):
                _overwrite(tensor)

    def saved(self) -> dict[Source, Tensor]:
        """Return copies of the operands and results that the kernel saved, as they were then."""
        lists = {SourceKind.OPERAND: self._before, SourceKind.RESULT: self.results}
        return {s: _copy(lists[s.kind][s.number]) for s in self.tape.seen}

    def incoming(self) -> list[Tensor | None]:
        """Return the `incoming_gradients` of the results."""
        return incoming_gradients(self.results, self.flows, self._seed)

    def gradients(
        self,
        grads: Sequence[Tensor | None] | None = None,
        saved: Mapping[Source, Tensor] | None = None,
        *,
        copied: bool = False,
        recording: bool = True,
    ) -> list[Tensor | None]:
        """Run the backward and return the gradients that are wanted.

        Args:
            grads: The gradients of the results; by default `incoming`.
            saved: The operands and results that the kernel saved; by default `saved`.
            copied: Whether the backward receives copies of what else the kernel saved.
            recording: Whether autograd can record in it.
        """
        made = self.tape.gradients(
            self.incoming() if grads is None else grads,
            self.saved() if saved is None else saved,
            self._trial.wanted,
            copied=copied,
            recording=recording,
        )
        return [None if g is None else g.detach().clone() for g in made]


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides."""
    return _memory(tensor).clone().as_strided(tensor.shape, tensor.stride())


def _memory(tensor: Tensor) -> Tensor:
    """The memory of a tensor from the first element to the last; autograd does not see it."""
    form = StridedSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    return tensor.data.as_strided((form.reach,), (1,))


def _overwrite(tensor: Tensor) -> None:
    memory = _memory(tensor)
    if memory.is_floating_point() or memory.is_complex():
        memory.fill_(float("nan"))
    elif memory.dtype == torch.bool:
        memory.logical_not_()
    else:  # these may be indices, which have to stay in range
        memory.copy_(memory.flip(0))
