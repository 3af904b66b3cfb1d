"""Runs of a layer's reference and of a kernel, forward and backward, on operands made up."""

from __future__ import annotations

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
from kernelgraph.graph.infer import Form, Operands, contiguous_copy, owned, versions
from kernelgraph.graph.verify.tolerance import same_bits
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible


class Untold(Exception):
    """There is nothing to tell a kernel's gradients by."""


class Run(NamedTuple):
    """What a forward returned, and a backward."""

    template: Template
    results: list[Tensor]
    flows: tuple[bool, ...]
    """Through which of the results a gradient flows."""
    gradients: list[Tensor | None]
    """Of the operands that they are wanted of."""


@dataclass
class Trial:
    """What is run: a layer's reference, and a kernel in its place."""

    layer: Extensible
    kernel: Kernel
    call: Call
    maker: Operands
    wanted: tuple[bool, ...]

    def __post_init__(self) -> None:
        self.reference_runner = Runner(self.layer.reference, self.call)
        self.kernel_runner = Runner(self.kernel.forward, self.call)

    @property
    def seeds(self) -> range:
        """Of the runs that are compared: large operands have values enough in one."""
        count = sum(v.numel() if isinstance(v, Tensor) else v.reach for v in self.maker.tensors)
        return range(3 if count < 2**24 else 1)

    @property
    def names(self) -> list[str]:
        """Of the operands that gradients are wanted of."""
        return [n for n, needed in zip(self.call.names, self.wanted, strict=True) if needed]

    def reference(self, seed: int, *, draw: int = 0, wide: bool = False) -> Run:
        """A run of the layer's reference.

        Args:
            seed: Of the operands and the incoming gradients.
            draw: Of the random numbers that it draws.
            wide: Whether in float64.

        Raises:
            Untold: If it writes into its operands.
            UnsupportedValue: If it does what no op can.
            Exception: What it raises.
        """
        with self.maker.apart(draw), torch.enable_grad(), _torch.recording_gradients():
            operands = self.maker.make(seed)
            if wide:
                operands = [_widened(v) if isinstance(v, Tensor) else v for v in operands]
            leaves = [
                v.detach().requires_grad_(needed) if isinstance(v, Tensor) else v
                for v, needed in zip(operands, self.wanted, strict=True)
            ]
            inputs = [v.view_as(v) if isinstance(v, Tensor) else v for v in leaves]
            before = versions(inputs)
            results, template = flatten_tensors(self.reference_runner.observe(inputs))
            if versions(inputs) != before:
                raise Untold("the layer writes into its operands")
            flows = tuple(result.requires_grad for result in results)
            grads = incoming(results, flows, seed)
            flowing = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
            wanted = [v for v, needed in zip(leaves, self.wanted, strict=True) if needed]
            gradients: Sequence[Tensor | None] = [None] * len(wanted)
            if flowing:
                roots, given = zip(*flowing, strict=True)
                gradients = torch.autograd.grad(roots, wanted, given, allow_unused=True)
            return Run(template, [r.detach() for r in results], flows, list(gradients))

    def forward(self, seed: int) -> Run:
        """A run of the kernel, without its backward.

        Raises:
            Exception: What it raises.
        """
        with self.maker.apart(0):
            output = self.kernel_runner.observe(self.maker.make(seed))
            try:
                results, template = flatten_tensors(output)
            except UnsupportedValue:
                return Run(Constant(f"a {type(output).__name__}"), [], (), [])
            return Run(template, [r.clone() for r in results], (), [])


def _widened(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def incoming(results: Sequence[Tensor], flows: Sequence[bool], seed: int) -> list[Tensor | None]:
    """Random gradients of the results that one flows through, equal for equal seeds."""
    made: list[Tensor | None] = []
    for k, (result, flow) in enumerate(zip(results, flows, strict=True)):
        gradient = None
        if flow:
            generator = torch.Generator(result.device).manual_seed(1000 * seed + k)
            # Drawn in the dtypes that are alike in every precision.
            kind = torch.complex64 if result.is_complex() else torch.bfloat16
            drawn = torch.randn(result.shape, dtype=kind, device=result.device, generator=generator)
            gradient = drawn.to(result.dtype)
        made.append(gradient)
    return made


class OnTape:
    """A run of a kernel's forward, whose backward is yet to run; within `Operands.apart`.

    Args:
        trial: The trial.
        seed: Of the operands.
        holds: Whether the kernel gets, and gives, copies.
        sources: What the backward will be given; None: all that the kernel saves.
    """

    def __init__(
        self, trial: Trial, seed: int, *, holds: bool, sources: frozenset[Source] | None = None
    ) -> None:
        self._trial, self._seed = trial, seed
        self._before = trial.maker.make(seed)
        self._operands = [_copy(v) if isinstance(v, Tensor) else v for v in self._before]
        self.tape = Tape(trial.call, self._operands, trial.wanted, sources, hidden_saves=holds)
        results, _ = flatten_tensors(self.tape.run(trial.kernel_runner.observe))
        self.flows = tuple(result.requires_grad for result in results)
        tensors = [v for v in self._operands if isinstance(v, Tensor)]
        self._lent = list(map(contiguous_copy, results)) if holds else owned(results, tensors)
        self.tape.close(results, self._lent, self.flows)
        self.results = list(map(contiguous_copy, self._lent))
        """What it returned."""

    @property
    def written(self) -> list[str]:
        """The operands that the forward wrote into."""
        values = zip(self._trial.call.names, self._operands, self._before, strict=True)
        return [
            name
            for name, now, before in values
            if isinstance(now, Tensor) and not same_bits(now, before)
        ]

    def overwrite(self) -> None:
        """Do to the memory of operands and results what other uses of it would."""
        for tensor in (*self._operands, *self._lent):
            if isinstance(tensor, Tensor):
                _overwrite(tensor)

    def sources(self) -> dict[Source, Tensor]:
        """Copies of what the kernel has saved, as it was then."""
        kept = {SourceKind.OPERAND: self._before, SourceKind.RESULT: self.results}
        return {s: _copy(kept[s.kind][s.number]) for s in self.tape.seen}

    def gradients(
        self,
        grads: Sequence[Tensor | None] | None = None,
        given: Mapping[Source, Tensor] | None = None,
        *,
        copied: bool = False,
    ) -> list[Tensor | None]:
        """Those of the operands that they are wanted of; by default of `incoming` gradients."""
        made = self.tape.gradients(
            self.incoming() if grads is None else grads,
            self.sources() if given is None else given,
            self._trial.wanted,
            copied=copied,
        )
        return [None if g is None else g.detach().clone() for g in made]

    def incoming(self) -> list[Tensor | None]:
        """See `incoming`."""
        return incoming(self.results, self.flows, self._seed)


def _copy(tensor: Tensor) -> Tensor:
    """One with the same strides."""
    return _memory(tensor).clone().as_strided(tensor.shape, tensor.stride())


def _memory(tensor: Tensor) -> Tensor:
    """The memory from the first element to the last. As data: autograd knows nothing of it."""
    form = Form(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    return tensor.data.as_strided((form.reach,), (1,))


def _overwrite(tensor: Tensor) -> None:
    memory = _memory(tensor)
    if memory.is_floating_point() or memory.is_complex():
        memory.fill_(float("nan"))
    elif memory.dtype == torch.bool:
        memory.logical_not_()
    else:  # maybe indices, which have to stay in range
        memory.copy_(memory.flip(0))
