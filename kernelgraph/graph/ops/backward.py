"""The ops of one form of call for training: a forward, and what its autograd formula calls.

Either the gradient is that of the kernel's own backward (`ByKernel`), which finds what the forward
has kept for it under a handle, one more result of the forward; or it is that of the layer's
reference (`ByReference`), which is run again on the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraph.cache import remember
from kernelgraph.graph.calls import Leaf, UnsupportedValue, flatten_tensors
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
from kernelgraph.graph.infer import check_unwritten, contiguous_copy, owned, versions
from kernelgraph.graph.ops.fast_path import Known
from kernelgraph.graph.ops.forward import Body, like


class Kept(NamedTuple):
    """What autograd keeps of a call, and hands to the backward op."""

    tensors: list[Tensor]
    numbers: list[Any]


class Differentiable(Body):
    """A `Body` with a gradient.

    Args:
        wanted: Of which operands there are gradients.
        flows: Through which results a gradient flows.
        args, kwargs: Those of `Body`.
    """

    differentiable = True

    numbers: Sequence[str] = ()
    """`Kept.numbers` in the schema of the backward op."""

    tags: Sequence[torch.Tag] = ()
    """Of both ops."""

    def __init__(
        self, wanted: Sequence[bool], flows: Sequence[bool], *args: Any, **kwargs: Any
    ) -> None:
        self.wanted = wanted
        self._flows = flows
        super().__init__(*args, **kwargs)

    def keep(self, operands: Sequence[Any], results: Sequence[Tensor]) -> Kept:
        """What autograd is to keep of a call."""
        raise NotImplementedError

    def check_wanted(self, needs: Sequence[bool]) -> None:
        """See that gradients are needed of no other operands than they were when the op was made.

        Raises:
            RuntimeError: If one is.
        """
        for i, (needed, wanted) in enumerate(zip(needs, self.wanted, strict=True)):
            if needed and not wanted:
                raise RuntimeError(
                    f"kernel {self._kernel} was compiled to give no gradient of its operand "
                    f"{self._call.names[i]} of layer {self._layer.layer_name}, and one is needed "
                    "now: compile the model anew"
                )

    def still(self, results: Sequence[Tensor]) -> list[Tensor]:
        """The results that no gradient flows through: a buffer that a layer counts in is to stay
        one."""
        flows = [*self._flows, *[False] * (len(results) - len(self._flows))]
        return [result for result, flow in zip(results, flows, strict=True) if not flow]

    def backward(
        self, grads: Sequence[Tensor | None], kept: Kept, needs: Sequence[bool]
    ) -> list[Tensor]:
        """The backward op: the gradients of the operands that ``needs`` marks."""
        raise NotImplementedError

    def backward_fake(
        self, grads: Sequence[Tensor | None], kept: Kept, needs: Sequence[bool]
    ) -> list[Tensor]:
        """What `backward` returns, with the shapes alone."""
        raise NotImplementedError


class ByReference(Differentiable):
    """An op whose gradient is the reference's, recomputed from the operands.

    The op returns what was in the operands that the layer writes into as its last results: by the
    time of the backward they have been written over.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        call = self._call
        self._recompute = Recompute(self._layer, call, self.returned, self.places.describe)
        named = [f"{kind} {name}" for kind, name in zip(call.types, call.names, strict=True)]
        _, self.numbers = self._recompute.split(named)

    @property
    def returns(self) -> int:
        return self.count + len(self.returned)

    def _copying(self, *operands: Any) -> Any:
        return self._with_originals(super()._copying(*operands), contiguous_copy, operands)

    def fake(self, *operands: Any) -> Any:
        return self._with_originals(super().fake(*operands), like, operands)

    def _with_originals(
        self, made: Any, copy: Callable[[Tensor], Tensor], operands: Sequence[Any]
    ) -> Any:
        if not self.returned:
            return made
        return (*made, *(copy(operands[i]) for i in self.returned))

    def keep(self, operands: Sequence[Any], results: Sequence[Tensor]) -> Kept:
        if self.returned:
            originals = dict(zip(self.returned, results[self.count :], strict=True))
            operands = [originals.get(i, v) for i, v in enumerate(operands)]
        return Kept(*self._recompute.split(operands))

    def backward(
        self, grads: Sequence[Tensor | None], kept: Kept, needs: Sequence[bool]
    ) -> list[Tensor]:
        return self._recompute.gradients(grads, self._recompute.join(*kept), needs)

    def backward_fake(
        self, grads: Sequence[Tensor | None], kept: Kept, needs: Sequence[bool]
    ) -> list[Tensor]:
        operands = self._recompute.join(*kept)
        return [like(v) for v, needed in zip(operands, needs, strict=True) if needed]


class ByKernel(Differentiable):
    """The gradient is that of the kernel's own backward; its forward runs once.

    Args:
        own: What that backward needs and does.
        operands: Those of one call: all have operands of these dtypes, device types and ranks.
        args, kwargs: Those of `Differentiable`.
    """

    numbers = ("SymInt[] sizes",)
    """Of the operands that gradients are wanted of, one after the other."""

    tags = (torch.Tag.cudagraph_unsafe,)
    """What a forward keeps is not where a replay of a CUDA graph would look for it: Inductor cuts
    the graph around these."""

    def __init__(
        self, own: OwnBackward, operands: Sequence[Any], *args: Any, **kwargs: Any
    ) -> None:
        self._own = own
        self._sources = own.sources
        self._copied_sources = [source in own.overwrites.saved for source in own.sources]
        self._copies_saved = any(self._copied_sources)
        self.tapes = Tapes()
        super().__init__(*args, **kwargs)
        self._wants = {
            i: (operands[i].dtype, operands[i].device.type, operands[i].dim())
            for i, wanted in enumerate(self.wanted)
            if wanted
        }
        self._direct: dict[Any, FunctionCallSpec | None] = {}
        self.forward = bypassing_forward(
            self._run_kernel,
            self.wanted,
            specs=self._direct,
            first_call=self._first,
            tensors_of=self._taken,
            keep=self.tapes.keep,
        )

    @property
    def returns(self) -> int:
        return self.count + 1

    def _first(self, form: Any, operands: tuple[Any, ...]) -> Any:
        """A call of which nothing is known: all is checked, and told for those that follow."""
        if torch.is_inference_mode_enabled() or any(
            operands[i].is_inference() for i in self._wants
        ):
            made = self._checked(None, operands)  # whose gradient nobody can ask for
            return (*(made if self.count > 1 else (made,)), handle())
        tape = Tape(
            self._call,
            operands,
            self.wanted,
            frozenset(self._sources),
            hidden_saves=self._own.hidden_saves,
        )
        sizes = tuple([v.shape if isinstance(v, Tensor) else v for v in operands])
        before = versions(operands) if sizes not in self._known else None
        try:
            result = tape.run(self._run_kernel)
        except Exception as error:
            self._fail(error, operands)
        if before is not None:
            who = f"kernel {self._kernel}, called for {self._where(operands)},"
            check_unwritten(before, operands, self._call.names, who)
            remember(self._known, sizes, Known(self._told_sizes(operands)))
        tensors = self._tensors(result, self._known[sizes], operands)
        if self._own.hidden_saves:
            made = [contiguous_copy(tensor) for tensor in tensors]
        else:
            made = owned(tensors, [operands[i] for i in self._lent])
        try:
            tape.close(tensors, made, self._flows)
        except NoGradient as error:
            raise RuntimeError(
                f"kernel {self._kernel}, called for {self._where(operands)}: {error}, which it had "
                'when it was tried; pass options={"own_backward": False}'
            ) from None
        if form not in self._direct and not (
            self._own.hidden_saves or self._own.overwrites.private
        ):
            remember(self._direct, form, bypass_spec(tape, operands, made, self._sources))
        return (*made, self.tapes.keep(tape))

    def _taken(self, result: Any) -> Sequence[Tensor] | None:
        if isinstance(self._output, Leaf):
            return (result,) if isinstance(result, Tensor) else None
        try:
            tensors, output = flatten_tensors(result)
        except UnsupportedValue:
            return None
        return tensors if output == self._output else None

    def fake(self, *operands: Any) -> Any:
        made = super().fake(*operands)
        return (*(made if self.count > 1 else (made,)), handle())

    def keep(self, operands: Sequence[Any], results: Sequence[Tensor]) -> Kept:
        sizes = [n for i in self._wants for n in operands[i].shape]
        lists = {SourceKind.OPERAND: operands, SourceKind.RESULT: results}
        saved = [lists[source.kind][source.number] for source in self._sources]
        return Kept([results[-1], *saved], [sizes])

    def backward(
        self, grads: Sequence[Tensor | None], kept: Kept, needs: Sequence[bool]
    ) -> list[Tensor]:
        under, *saved = kept.tensors
        tape = self.tapes.get(under)
        if tape is None:
            raise RuntimeError(
                f"what kernel {self._kernel} has kept for its backward is gone with the tensor "
                "that stood for it: something has copied what autograd saves, as "
                'torch.autograd.graph.save_on_cpu does. Pass options={"own_backward": False}'
            )
        if self._copies_saved:
            pairs = zip(saved, self._copied_sources, strict=True)
            saved = [tensor.clone() if copied else tensor for tensor, copied in pairs]
        own = [g if g is None or g.is_contiguous() else g.contiguous() for g in grads]
        for k in self._own.overwrites.grads:
            own[k] = None if (gradient := grads[k]) is None else contiguous_copy(gradient)
        try:
            if isinstance(tape, BypassedCall):
                made = tape.gradients(own, saved, needs)
            else:
                given = dict(zip(self._sources, saved, strict=True))
                made = tape.gradients(own, given, needs, copied=self._own.overwrites.private)
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

    def backward_fake(
        self, grads: Sequence[Tensor | None], kept: Kept, needs: Sequence[bool]
    ) -> list[Tensor]:
        """Sizes are the operands' own; the device is that of the results' gradients."""
        device = next((g.device for g in grads if g is not None), kept.tensors[0].device)
        (sizes,), at, made = kept.numbers, 0, []
        for i, (dtype, kind, dims) in self._wants.items():
            if needs[i]:
                on = device if device.type == kind else torch.device(kind)
                made.append(torch.empty(sizes[at : at + dims], dtype=dtype, device=on))
            at += dims
        return made
