"""A kernel's forward with a gradient that it borrows from the layer's reference, in eager use.

One ``torch.autograd.Function``, which is what is fastest there; in a compiled graph it would bypass
the compile caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraph.graph.calls import (
    Call,
    Runner,
    Template,
    UnsupportedValue,
    flatten_tensors,
)
from kernelgraph.graph.gradients import Recompute
from kernelgraph.graph.infer import observe, owned, sample_inputs, versions
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible


class BorrowedGradient:
    """Makes calls of one form by a kernel, whose gradient is that of the layer's reference.

    Args:
        kernel: The kernel.
        layer: The layer that it stands in for.
        call: The form of the calls.
        operands: Those of one such call: reference and kernel are run on copies of them, which
            tells through which results a gradient flows.

    Raises:
        UnsupportedValue: If one of them does what cannot be done below autograd, or not again.
        Exception: What they raise.
    """

    def __init__(
        self, kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[Any]
    ) -> None:
        for value in operands:
            if isinstance(value, Tensor) and not _is_plain(value):
                kind = f"{str(value.layout)[6:]} {type(value).__name__}"
                raise UnsupportedValue(f"a {kind} is among its operands")
        self.kernel = kernel
        self.call = call
        self.flows = _flows("the layer", layer.reference, call, operands)
        _flows("the kernel", kernel.forward, call, operands)
        self.recompute = Recompute(layer, call)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the kernel on ``module``."""
        operands = self.call.operands_of(module, args, kwargs)
        template: list[Template] = []

        def run() -> Any:
            return self.kernel.forward(module, *args, **kwargs)

        tensors = (operands[i] for i in self.call.tensors)
        results = _apply(self, run, operands, template, *tensors)
        return template[0].unflatten(results)


class _BorrowedGradient(torch.autograd.Function):
    """The arguments before the tensors are of Python's: autograd sees the tensors alone."""

    @staticmethod
    def forward(
        ctx: Any,
        by: BorrowedGradient,
        run: Callable[[], Any],
        operands: Sequence[Any],
        template: list[Template],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        before = versions(tensors)
        made, output = flatten_tensors(run())
        template.append(output)
        if before != versions(tensors):
            raise RuntimeError(
                f"kernel {by.kernel} wrote into its operands, as it never did before"
            )
        if len(made) != len(by.flows):
            raise RuntimeError(
                f"kernel {by.kernel} returned {len(made)} tensors, and the layer {len(by.flows)}"
            )
        results = owned(made, tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(r for r, flows in zip(results, by.flows, strict=True) if not flows)
        )
        ctx.save_for_backward(*tensors)
        ctx.by = by
        ctx.rest = [None if isinstance(v, Tensor) else v for v in operands]
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by: BorrowedGradient = ctx.by
        operands = list(ctx.rest)
        needs = [False] * len(operands)
        asked = ctx.needs_input_grad[-len(by.call.tensors) :]
        for i, tensor, needed in zip(by.call.tensors, ctx.saved_tensors, asked, strict=True):
            operands[i], needs[i] = tensor, needed
        if torch.is_grad_enabled():  # create_graph=True
            made = iter(by.recompute.differentiably(grads, operands, needs))
        else:
            made = iter(by.recompute.gradients(grads, operands, needs))
        return (None, None, None, None, *(next(made) if needed else None for needed in asked))


_apply: Callable[..., tuple[Tensor, ...]] = _BorrowedGradient.apply


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _flows(
    who: str, forward: Callable[..., Any], call: Call, operands: Sequence[Any]
) -> tuple[bool, ...]:
    """Through which results of a forward a gradient flows.

    Raises:
        UnsupportedValue: If it writes into operands or sets attributes, draws random numbers, or
            returns what an op does not, or no tensor.
    """
    devices = {v.device for v in operands if isinstance(v, Tensor)}
    with sample_inputs.apart(operands), torch.enable_grad():
        before = _random_states(devices)
        copies = call.counterparts(
            operands,
            # Not a leaf, so that a write into it shows and raises nothing.
            lambda i, v: v.detach().clone().requires_grad_(v.requires_grad).clone(),
        )
        told, results = observe(Runner(forward, call), copies)
        drawn = not all(map(torch.equal, before, _random_states(devices)))
    if told.written:
        names = ", ".join(call.names[i] for i in told.written)
        raise UnsupportedValue(f"{who} writes into {names}")
    if drawn:  # it would draw others when it is run again
        raise UnsupportedValue(f"{who} draws random numbers")
    return tuple(result.requires_grad for result in results)


def _random_states(devices: Iterable[torch.device]) -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"]
    xpu = [torch.xpu.get_rng_state(d) for d in devices if d.type == "xpu"]
    return [torch.get_rng_state(), *cuda, *xpu]
