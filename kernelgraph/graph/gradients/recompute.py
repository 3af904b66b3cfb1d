"""The gradient of a call by its layer's reference, which is run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, Runner, flatten_tensors
from kernelgraph.graph.infer import check_unwritten, owned, versions
from kernelgraph.layers import Extensible


class Recompute:
    """The backward of calls of one form, by the layer's reference.

    Args:
        layer: The layer that is called.
        call: The form of the call.
        returned: The operands whose contents after the call are results too, behind the others.
        place: Words for where in the model the operands of a call are from, for errors.
    """

    def __init__(
        self,
        layer: Extensible,
        call: Call,
        returned: Sequence[int] = (),
        place: Callable[[Sequence[Any]], str] = lambda operands: "",
    ) -> None:
        self._layer = layer
        self._call = call
        self._returned = returned
        self._place = place
        self._run = Runner(layer.reference, call)

    def gradients(
        self, grads: Sequence[Tensor | None], operands: Sequence[Any], needs: Sequence[bool]
    ) -> list[Tensor]:
        """The gradients of the operands that ``needs`` marks, contiguous and in memory of their
        own; zeros where there is none.

        Args:
            grads: Those of the results; None where there is none.
            operands: The operands of the call, as they were before it.
            needs: Of which operands gradients are wanted.
        """
        with torch.enable_grad(), _torch.recording_gradients():
            leaves = self._call.counterparts(
                operands, lambda i, v: v.detach().requires_grad_(needs[i])
            )
            wanted = [v for v, needed in zip(leaves, needs, strict=True) if needed]
            made = self._differentiate(leaves, operands, grads, wanted)
        whole = [
            torch.zeros_like(v, memory_format=torch.contiguous_format) if g is None else g
            for v, g in zip(wanted, _once(made, wanted), strict=True)
        ]
        return owned(whole, [v for v in (*grads, *operands) if isinstance(v, Tensor)])

    def differentiably(
        self, grads: Sequence[Tensor | None], operands: Sequence[Any], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """`gradients` that can be differentiated again, for ``create_graph=True``; None where
        there is none."""
        with torch.enable_grad():
            # Of views: of the operands themselves it would be more, where one is made of another.
            views = self._call.counterparts(operands, lambda i, v: v.view_as(v))
            wanted = [v for v, needed in zip(views, needs, strict=True) if needed]
            made = self._differentiate(views, operands, grads, wanted, create_graph=True)
        return _once(made, wanted)

    def _differentiate(
        self,
        leaves: Sequence[Any],
        operands: Sequence[Any],
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

    def _results(self, leaves: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
        # Not of the leaves themselves: a reference may write into what it is given.
        inputs = self._call.counterparts(
            leaves, lambda i, v: v.clone() if i in self._returned else v.view_as(v)
        )
        before = versions(operands)
        results, _ = flatten_tensors(self._run(inputs))
        results += [inputs[i] for i in self._returned]
        who = f"the reference of {self._layer.layer_name}{self._place(operands)}"
        check_unwritten(before, operands, self._call.names, who)
        return results


def _once(made: Sequence[Tensor | None], wanted: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients ``made``: of weights that are tied, the whole goes to the first."""
    first = {id(v): k for k, v in reversed(list(enumerate(wanted)))}
    pairs = zip(made, wanted, strict=True)
    return [g if first[id(v)] == k else None for k, (g, v) in enumerate(pairs)]
