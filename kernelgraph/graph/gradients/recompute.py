"""The gradient of a call by its layer's reference, which is run again for it.

`Recompute` is the backward. A registered op calls it from its autograd formula; in eager use
`Recompute.call` makes a call whose ``torch.autograd.Function`` has it for its backward. One
function is the fastest there; in a compiled graph it would bypass the compile caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, Runner, flatten_tensors
from kernelgraph.graph.infer import Snapshot, check_unwritten, owned, versions
from kernelgraph.layers import Extensible

T = TypeVar("T")

WATCHED_BACKWARDS = 4
"""The number of backwards of one call signature in which it is compared what the reference has
written and drawn: batch norm, for one, writes without raising a version."""


class Recompute:
    """The backward of calls of one signature, by the layer's reference.

    Args:
        layer: The layer that is called.
        call: The signature of the calls.
        returned: The operands whose contents after the call are results too, behind the others.
        place: Describes where in the model the operands of a call come from, for error messages.
    """

    def __init__(
        self,
        layer: Extensible,
        call: Call,
        returned: Sequence[int] = (),
        place: Callable[[Sequence[object]], str] = lambda operands: "",
    ) -> None:
        self._layer = layer
        self._call = call
        self._returned = returned
        self._place = place
        self._run = Runner(layer.reference, call)
        self._watched = 0
        """The number of backwards that were watched."""
        self._is_tensor = tuple(kind == "Tensor" for kind in call.types)

    # --- what autograd keeps of a call ------------------------------------------------------

    def split(self, operands: Sequence[T]) -> tuple[list[T], list[T]]:
        """Separate operands, or a list with an item for each, into tensors and numbers."""
        tensors: list[T] = []
        numbers: list[T] = []
        for value, is_tensor in zip(operands, self._is_tensor, strict=True):
            (tensors if is_tensor else numbers).append(value)
        return tensors, numbers

    def join(self, tensors: Sequence[object], numbers: Sequence[object]) -> list[Any]:
        """Undo `split`."""
        tensor, number = iter(tensors), iter(numbers)
        return [next(tensor) if is_tensor else next(number) for is_tensor in self._is_tensor]

    # --- the forward, in eager use ----------------------------------------------------------

    def call(
        self,
        forward: Callable[[], Sequence[Tensor]],
        operands: Sequence[object],
        flows: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        """Call a forward below autograd, and give its results the gradient of the reference.

        Args:
            forward: Makes the call and returns its result tensors.
            operands: The operands of the call.
            flows: For each result, whether a gradient flows through it.
        """
        tensors, numbers = self.split(operands)
        return _apply(self, forward, flows, numbers, *tensors)

    # --- the backward -----------------------------------------------------------------------

    def gradients(
        self, grads: Sequence[Tensor | None], operands: Sequence[object], needs: Sequence[bool]
    ) -> list[Tensor]:
        """Compute the gradients of the operands that ``needs`` marks.

        They are contiguous, in memory of their own, and zeros where there is none.

        Args:
            grads: The gradients of the results; None where there is none.
            operands: The operands of the call, as they were before it.
            needs: For each operand, whether its gradient is wanted.
        """
        kept = self._call.program_data_kept(self._layer)
        with kept, torch.enable_grad(), _torch.recording_gradients():
            leaves = self._call.counterparts(
                operands, lambda i, v: v.detach().requires_grad_(needs[i])
            )
            wanted = [v for v, needed in zip(leaves, needs, strict=True) if needed]
            found = self._differentiate(leaves, operands, grads, wanted)
        complete = [
            torch.zeros_like(v, memory_format=torch.contiguous_format) if g is None else g
            for v, g in zip(wanted, _once(found, wanted), strict=True)
        ]
        return owned(complete, [v for v in (*grads, *operands) if isinstance(v, Tensor)])

    def differentiable_gradients(
        self, grads: Sequence[Tensor | None], operands: Sequence[object], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Compute `gradients` that can be differentiated again, for ``create_graph=True``.

        None stands for a gradient that does not exist.
        """
        with self._call.program_data_kept(self._layer), torch.enable_grad():
            # With respect to views: where one operand is made of another, the gradient of the
            # operand itself would include the other's.
            views = self._call.counterparts(operands, lambda i, v: v.view_as(v))
            wanted = [v for v, needed in zip(views, needs, strict=True) if needed]
            found = self._differentiate(views, operands, grads, wanted, create_graph=True)
        return _once(found, wanted)

    def _differentiate(
        self,
        leaves: Sequence[object],
        operands: Sequence[object],
        grads: Sequence[Tensor | None],
        wanted: Sequence[Tensor],
        *,
        create_graph: bool = False,
    ) -> Sequence[Tensor | None]:
        results = self._results(leaves, operands)
        pairs = [
            (r, g.to(r.dtype))
            for r, g in zip(results, grads, strict=True)
            if g is not None and r.requires_grad
        ]
        if not pairs or not wanted:
            return [None] * len(wanted)
        return torch.autograd.grad(
            [r for r, _ in pairs],
            wanted,
            [g for _, g in pairs],
            allow_unused=True,
            create_graph=create_graph,
        )

    def _results(self, leaves: Sequence[object], operands: Sequence[object]) -> list[Tensor]:
        # Not of the leaves themselves: a reference may write into its inputs.
        inputs = self._call.counterparts(
            leaves, lambda i, v: v.clone() if i in self._returned else v.view_as(v)
        )
        snapshot = self._snapshot(operands)
        before = versions(operands)
        results, _ = flatten_tensors(self._run(inputs))
        results += [inputs[i] for i in self._returned]
        who = f"the reference of {self._layer.layer_name}{self._place(operands)}"
        if snapshot is not None:
            self._check_untouched(snapshot, who)
        check_unwritten(before, operands, self._call.names, who)
        return results

    def _snapshot(self, operands: Sequence[object]) -> Snapshot | None:
        """Return what the first backwards are compared with; None for the later ones."""
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if self._watched >= WATCHED_BACKWARDS or capturing:
            return None
        self._watched += 1
        return Snapshot(operands)

    def _check_untouched(self, snapshot: Snapshot, who: str) -> None:
        """Undo what a run of the reference has done besides returning results, and raise."""
        if written := snapshot.written():
            snapshot.restore(written)
            names = ", ".join(self._call.names[i] for i in sorted(written))
            raise RuntimeError(f"{who} wrote into its operand {names}, unlike in its trial run")
        if snapshot.generators.changed():
            snapshot.generators.restore()
            raise RuntimeError(f"{who} drew random numbers, and its gradient cannot be recomputed")


class _RecomputedGradient(torch.autograd.Function):
    """A call of any forward, whose backward is that of a `Recompute`.

    Autograd sees only the tensors; the arguments in front of them are Python objects.
    """

    @staticmethod
    def forward(
        ctx: Any,
        recompute: Recompute,
        run: Callable[[], Sequence[Tensor]],
        flows: Sequence[bool],
        numbers: Sequence[object],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        results = owned(run(), tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(result for result, flow in zip(results, flows, strict=True) if not flow)
        )
        ctx.save_for_backward(*tensors)
        ctx.recompute, ctx.numbers = recompute, numbers
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        recompute: Recompute = ctx.recompute
        asked = ctx.needs_input_grad[_FIRST_TENSOR:]
        operands = recompute.join(ctx.saved_tensors, ctx.numbers)
        needs = recompute.join(asked, [False] * len(ctx.numbers))
        if torch.is_grad_enabled():  # create_graph=True
            found = iter(recompute.differentiable_gradients(grads, operands, needs))
        else:
            found = iter(recompute.gradients(grads, operands, needs))
        no_tensors = (None,) * _FIRST_TENSOR
        return (*no_tensors, *(next(found) if needed else None for needed in asked))


_FIRST_TENSOR = 4
"""How many arguments stand in front of the tensors."""

_apply: Callable[..., tuple[Tensor, ...]] = _RecomputedGradient.apply


def _once(found: Sequence[Tensor | None], wanted: Sequence[Tensor]) -> list[Tensor | None]:
    """Leave the gradient of tied weights, which is the whole of it, to the first of them."""
    first = {id(v): k for k, v in reversed(list(enumerate(wanted)))}
    pairs = zip(found, wanted, strict=True)
    return [g if first[id(v)] == k else None for k, (g, v) in enumerate(pairs)]
