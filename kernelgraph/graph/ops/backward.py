"""The bodies of ops for training: a forward op, and the backward op that its formula calls.

The gradient has one of two sources. `ByKernel` runs the kernel's own backward, which finds what
its forward kept under a handle, one more result of the forward. `ByReference` runs the layer's
reference again, on the operands, and takes its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraph.cache import remember
from kernelgraph.graph.calls import Call, Leaf, UnsupportedValue, flatten_tensors
from kernelgraph.graph.gradients import (
    BypassedCall,
    FunctionCallSpec,
    NoGradient,
    OwnBackward,
    Recompute,
    SourceKind,
    Tape,
    Tapes,
    bypass_spec,
    bypassing_forward,
    handle,
)
from kernelgraph.graph.infer import (
    Effects,
    InferOutput,
    OutputSpec,
    Snapshot,
    contiguous_copy,
    dense_copy,
    owned,
)
from kernelgraph.graph.ops.fast_path import Operand, OpResult
from kernelgraph.graph.ops.forward import Body, TensorType, like
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible


class SavedForBackward(NamedTuple):
    """The values that autograd saves in a forward and passes to the backward op."""

    tensors: list[Tensor]
    numbers: list[Any]
    """As `Differentiable.numbers` declares them in the schema."""


class Differentiable(Body):
    """A `Body` with a gradient.

    Args:
        wanted: Whether there is a gradient of each operand.
        flows: Whether a gradient flows through each result.
        kernel, layer, call, shapes, spec, effects: As for `Body`.
    """

    differentiable = True

    numbers: Sequence[str] = ()
    """The declarations of `SavedForBackward.numbers` in the schema of the backward op."""

    tags: Sequence[torch.Tag] = ()
    """The tags of both ops."""

    def __init__(
        self,
        wanted: Sequence[bool],
        flows: Sequence[bool],
        kernel: Kernel,
        layer: Extensible,
        call: Call,
        shapes: InferOutput,
        spec: OutputSpec,
        effects: Effects,
    ) -> None:
        self.wanted = wanted
        self._flows = flows
        super().__init__(kernel, layer, call, shapes, spec, effects)

    @property
    def saved(self) -> tuple[frozenset[int], frozenset[int]]:
        """The numbers of the operands and of the results that autograd saves of a call."""
        raise NotImplementedError

    def keep(self, operands: Sequence[Operand], results: Sequence[Tensor]) -> SavedForBackward:
        """Return the values of a call that autograd is to save."""
        raise NotImplementedError

    def check_wanted(self, needs: Sequence[bool]) -> None:
        """Check that gradients are needed only of operands that the op was made to have them of.

        Raises:
            RuntimeError: If one is needed of another operand.
        """
        for i, (needed, wanted) in enumerate(zip(needs, self.wanted, strict=True)):
            if needed and not wanted:
                raise RuntimeError(
                    f"kernel {self._kernel} was compiled to give no gradient of its operand "
                    f"{self.call.names[i]} of layer {self._layer.layer_name}, and one is needed "
                    "now: compile the model again"
                )

    def non_differentiable(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Return the results that no gradient flows through.

        A buffer that a layer counts in, for one: it must not come to require a gradient.
        """
        flows = [*self._flows, *[False] * (len(results) - len(self._flows))]
        return [result for result, flow in zip(results, flows, strict=True) if not flow]

    def backward(
        self, grads: Sequence[Tensor | None], kept: SavedForBackward, needs: Sequence[bool]
    ) -> list[Tensor]:
        """The backward op: return the gradients of the operands that ``needs`` marks."""
        raise NotImplementedError

    def backward_fake(
        self, grads: Sequence[Tensor | None], kept: SavedForBackward, needs: Sequence[bool]
    ) -> list[Tensor]:
        """Return fakes of the results of `backward`."""
        raise NotImplementedError


class ByReference(Differentiable):
    """An op whose gradient is the reference's, recomputed from the operands.

    The op returns what was in the operands that the layer writes into as its last results: by the
    time of the backward they have been written over.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        call = self.call
        self._recompute = Recompute(self._layer, call, self.returned, self.places.describe)
        named = [f"{kind} {name}" for kind, name in zip(call.types, call.names, strict=True)]
        _, self.numbers = self._recompute.split(named)

    @property
    def returns(self) -> int:
        return self.count + len(self.returned)

    def _check_call(self, key: object, operands: tuple[Operand, ...]) -> Any:
        made = super()._check_call(key, operands)
        return self._with_originals(made, contiguous_copy, operands)

    def fake(self, *operands: Any) -> Any:
        return self._with_originals(super().fake(*operands), like, operands)

    def transformed(self, *operands: Any) -> Any:
        return self._with_originals(super().transformed(*operands), Tensor.clone, operands)

    def _with_originals(
        self, made: Any, copy: Callable[[Tensor], Tensor], operands: Sequence[Any]
    ) -> Any:
        if not self.returned:
            return made
        return (*_as_tuple(made), *(copy(operands[i]) for i in self.returned))

    @property
    def saved(self) -> tuple[frozenset[int], frozenset[int]]:
        return frozenset(self.call.tensors) - set(self.returned), frozenset()

    def keep(self, operands: Sequence[Any], results: Sequence[Tensor]) -> SavedForBackward:
        if self.returned:
            originals = dict(zip(self.returned, results[self.count :], strict=True))
            operands = [originals.get(i, v) for i, v in enumerate(operands)]
        return SavedForBackward(*self._recompute.split(operands))

    def backward(
        self, grads: Sequence[Tensor | None], kept: SavedForBackward, needs: Sequence[bool]
    ) -> list[Tensor]:
        return self._recompute.gradients(grads, self._recompute.join(*kept), needs)

    def backward_fake(
        self, grads: Sequence[Tensor | None], kept: SavedForBackward, needs: Sequence[bool]
    ) -> list[Tensor]:
        operands = self._recompute.join(*kept)
        return [like(v) for v, needed in zip(operands, needs, strict=True) if needed]


class ByKernel(Differentiable):
    """The gradient is that of the kernel's own backward; its forward runs once.

    A call runs on a `Tape`, with autograd around the kernel, unless an earlier call with such
    operands has shown that the kernel is a single ``torch.autograd.Function``: then it runs
    without autograd (see `bypassing_forward`).

    Args:
        own: How the kernel's own backward has to be run.
        operands: The operands of one call; all calls have operands of these dtypes, device types
            and ranks.
        args: As for `Differentiable`.
    """

    numbers = ("SymInt[] sizes",)
    """The sizes of the operands that gradients are wanted of, one after the other."""

    tags = (torch.Tag.cudagraph_unsafe,)
    """A replay of a CUDA graph would not find what a forward keeps: Inductor cuts the graph around
    ops with this tag."""

    def __init__(self, own: OwnBackward, operands: Sequence[Operand], *args: Any) -> None:
        self._own = own
        self._sources = own.sources
        self._copied_sources = [source in own.overwrites.saved for source in own.sources]
        self._copies_saved = any(self._copied_sources)
        self.tapes = Tapes()
        super().__init__(*args)
        self._wants = {
            i: TensorType(operands[i].dtype, operands[i].device.type, operands[i].dim())
            for i, wanted in enumerate(self.wanted)
            if wanted
        }
        self._bypassed: dict[object, FunctionCallSpec | None] = {}
        self.forward = bypassing_forward(
            self._run_kernel,
            self.wanted,
            specs=self._bypassed,
            first_call=self._call_on_tape,
            tensors_of=self._returned_tensors,
            keep=self.tapes.keep,
        )

    @property
    def returns(self) -> int:
        return self.count + 1

    # --- the forward op -----------------------------------------------------------------

    def _call_on_tape(self, key: object, operands: tuple[Operand, ...]) -> tuple[Tensor, ...]:
        """Call the kernel with autograd and all checks; record the call under ``key`` for those
        that may bypass autograd."""
        if torch.is_inference_mode_enabled() or any(
            operands[i].is_inference() for i in self._wants
        ):
            # Nobody can ask for a gradient of this call.
            return (*_as_tuple(self._check_call(None, operands)), handle())
        tape = Tape(
            self.call,
            operands,
            self.wanted,
            frozenset(self._sources),
            hidden_saves=self._own.hidden_saves,
        )
        sizes = tuple([v.shape if isinstance(v, Tensor) else v for v in operands])
        snapshot = self._snapshot(operands) if sizes not in self._checked_calls else None
        try:
            if self._own.hidden_saves:
                result, tape.layer = tape.run(self._run_kernel.alone)
            else:
                result = tape.run(self._run_kernel)
        except Exception as error:
            self._fail(error, operands)
        if sizes not in self._checked_calls:
            remember(self._checked_calls, sizes, self._checked(operands))
        tensors = self._tensors(result, self._checked_calls[sizes], operands)
        if self._own.hidden_saves:
            made = [*map(dense_copy, tensors, self._orders)]
        else:
            made = owned(tensors, [operands[i] for i in self.call.tensors], self._orders)
        try:
            tape.close(tensors, made, self._flows)
        except NoGradient as error:
            raise self._lost_gradient(error, operands) from None
        if snapshot is not None and not self._leaves_no_trace(snapshot, operands):
            return self._call_on_tape(key, operands)
        own = self._own
        if key not in self._bypassed and not (
            own.hidden_saves or own.overwrites.private or own.uses_autograd
        ):
            remember(self._bypassed, key, bypass_spec(tape, operands, made, self._sources))
        return (*made, self.tapes.keep(tape))

    def _leaves_no_trace(self, snapshot: Snapshot, operands: Sequence[Operand]) -> bool:
        written = snapshot.written()
        if not written:
            return super()._leaves_no_trace(snapshot, operands)
        snapshot.restore(written)  # but what the kernel has kept for its backward is not
        names = ", ".join(self.call.names[i] for i in sorted(written))
        self._use_reference(f"it writes into {names} where gradients are wanted", operands)
        return False

    def _returned_tensors(self, result: object) -> Sequence[Tensor] | None:
        """The tensors in what the kernel returned; None if the layer returns another structure."""
        if isinstance(self._output, Leaf):
            return (result,) if isinstance(result, Tensor) else None
        try:
            tensors, output = flatten_tensors(result)
        except UnsupportedValue:
            return None
        return tensors if output == self._output else None

    def _lost_gradient(self, error: NoGradient, operands: Sequence[Operand]) -> RuntimeError:
        return RuntimeError(
            f"kernel {self._kernel}, called for {self._where(operands)}: {error}, although it had "
            'one in the trial of the kernel; pass options={"own_backward": False}'
        )

    def fake(self, *operands: Operand) -> tuple[Tensor, ...]:
        return (*_as_tuple(super().fake(*operands)), handle())

    @property
    def saved(self) -> tuple[frozenset[int], frozenset[int]]:
        by_kind: dict[SourceKind, set[int]] = {kind: set() for kind in SourceKind}
        for source in self._sources:
            by_kind[source.kind].add(source.number)
        return frozenset(by_kind[SourceKind.OPERAND]), frozenset(by_kind[SourceKind.RESULT])

    def transformed(self, *operands: Operand) -> tuple[Tensor, ...]:
        return (*_as_tuple(super().transformed(*operands)), handle())

    def keep(self, operands: Sequence[Operand], results: Sequence[Tensor]) -> SavedForBackward:
        sizes = [n for i in self._wants for n in operands[i].shape]
        lists = {SourceKind.OPERAND: operands, SourceKind.RESULT: results}
        saved = [lists[source.kind][source.number] for source in self._sources]
        return SavedForBackward([results[-1], *saved], [sizes])

    # --- the backward op ----------------------------------------------------------------

    def backward(
        self, grads: Sequence[Tensor | None], kept: SavedForBackward, needs: Sequence[bool]
    ) -> list[Tensor]:
        under, *saved = kept.tensors
        tape = self.tapes.get(under)
        if tape is None:
            raise self._lost_tape()
        if self._copies_saved:
            pairs = zip(saved, self._copied_sources, strict=True)
            saved = [tensor.clone() if copied else tensor for tensor, copied in pairs]
        incoming = [g if g is None or g.is_contiguous() else g.contiguous() for g in grads]
        for k in self._own.overwrites.grads:
            incoming[k] = None if (gradient := grads[k]) is None else contiguous_copy(gradient)
        try:
            if isinstance(tape, BypassedCall):
                made = tape.gradients(incoming, saved, needs)
            else:
                by_source = dict(zip(self._sources, saved, strict=True))
                copied = self._own.overwrites.private
                made = tape.gradients(incoming, by_source, needs, copied=copied)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"the backward of kernel {self._kernel}, called for layer "
                f"{self._layer.layer_name}, raised {type(error).__name__}: {error}"
            ) from error
        missing = [gradient for gradient in made if gradient is None]
        if missing:
            zeros = map(torch.zeros_like, self.backward_fake(grads, kept, needs))
            made = [z if g is None else g for g, z in zip(made, zeros, strict=True)]
        return owned(
            [g for g in made if g is not None],
            [v for v in (*grads, *saved, *tape.kept) if v is not None],
        )

    def _lost_tape(self) -> RuntimeError:
        return RuntimeError(
            f"the backward of kernel {self._kernel} cannot find what its forward kept: something "
            "has copied what autograd saves, as torch.autograd.graph.save_on_cpu does; pass "
            'options={"own_backward": False}'
        )

    def backward_fake(
        self, grads: Sequence[Tensor | None], kept: SavedForBackward, needs: Sequence[bool]
    ) -> list[Tensor]:
        """Return fakes of the gradients: in the sizes of the operands, on the device of the
        results' gradients."""
        device = next((g.device for g in grads if g is not None), kept.tensors[0].device)
        (sizes,), at, made = kept.numbers, 0, []
        for i, (dtype, kind, dims) in self._wants.items():
            if needs[i]:
                on = device if device.type == kind else torch.device(kind)
                made.append(torch.empty(sizes[at : at + dims], dtype=dtype, device=on))
            at += dims
        return made


def _as_tuple(results: OpResult) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results
