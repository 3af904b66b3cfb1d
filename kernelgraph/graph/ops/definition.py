"""Ops as torch knows them: the schema, the fake and the autograd formula, defined from a body.

An op's arguments are the operands of a call. An op has at most 64; where a call has more operands,
its tensors are one list in front (see `pack`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call
from kernelgraph.graph.ops.backward import Differentiable, SavedForBackward
from kernelgraph.graph.ops.fast_path import Operand, OpFunction
from kernelgraph.graph.ops.forward import Body

NAMESPACE = "hubkernels"

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


# --- calling an op ------------------------------------------------------------------------------


def overload(name: str) -> Any:
    """Return the op called ``name`` in `NAMESPACE`."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def pack(operands: Sequence[object], packed: Sequence[int]) -> list[Any]:
    """Return the arguments of an op: a list of the ``packed`` operands, then the others."""
    if len(packed) == 0:
        return list(operands)
    rest = [value for i, value in enumerate(operands) if i not in packed]
    return [[operands[i] for i in packed], *rest]


def unpack(arguments: Sequence[Any], packed: Sequence[int]) -> list[Any]:
    """Return the operands that `pack` made ``arguments`` of."""
    if len(packed) == 0:
        return list(arguments)
    listed, *rest = arguments
    operands = dict(zip(packed, listed, strict=True))
    others = iter(rest)
    return [operands[i] if i in operands else next(others) for i in range(len(listed) + len(rest))]


def results_of(name: str, packed: Sequence[int], operands: Sequence[Operand]) -> list[Tensor]:
    """Call the op called ``name`` and return its results; see `pack` for ``packed``."""
    results = overload(name)(*pack(operands, packed))
    return [results] if isinstance(results, Tensor) else list(results)


_MAX_ARGUMENTS = 64
"""The number of arguments that torch's dispatcher allows an op."""


def packed_operands(call: Call) -> tuple[int, ...]:
    """The operands of a call that its op takes as one list."""
    return call.tensors if len(call.types) > _MAX_ARGUMENTS else ()


# --- defining ops in torch ----------------------------------------------------------------------


def register(base: str, call: Call, body: Body) -> None:
    """Define the op for inference, or the ops for training, with their fakes and the formula.

    Each has a name of its own and none an overload: torch 2.11 to 2.14 abort at exit where two
    overloads of one op take the same arguments.

    Args:
        base: The name of the ops without their suffixes.
        call: The signature of the calls.
        body: The functions of the ops.
    """
    packed = packed_operands(call)
    functions: list[OpFunction] = [body.forward, body.fake, body.transformed]
    forward, fake, transformed = [_unpacking(f, packed) if packed else f for f in functions]
    schema = _schema(call, packed, body.returns)
    if not isinstance(body, Differentiable):
        _define(base, schema, forward, fake)
        _torch.under_transforms(_library, base, transformed)
        return
    _define_backward(f"{base}_backward", body)
    _define(f"{base}_training", schema, forward, fake, body.tags)
    _torch.under_transforms(_library, f"{base}_training", transformed)
    formula = _Formula(overload(f"{base}_backward"), body, packed)
    _set_formula(f"{base}_training", formula.differentiate, formula.save)


def _schema(call: Call, packed: Sequence[int], returns: int) -> str:
    declared = pack([f"{t} {n}" for t, n in zip(call.types, call.names, strict=True)], packed)
    if packed:
        declared[0] = "Tensor[] tensors"
    results = "Tensor" if returns == 1 else f"({', '.join(['Tensor'] * returns)})"
    return f"({', '.join(declared)}) -> {results}"


def _unpacking(function: OpFunction, packed: Sequence[int]) -> OpFunction:
    return lambda *arguments: function(*unpack(arguments, packed))


def _define_backward(name: str, body: Differentiable) -> None:
    """Define the op that the autograd formula of the op for training calls."""
    count = body.count
    grads = [f"Tensor? grad_{i}" for i in range(count)]
    declared = [*grads, "Tensor[] saved", *body.numbers, "bool[] needs_grad"]

    def collecting(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        def run(*arguments: Any) -> list[Tensor]:
            saved = SavedForBackward(arguments[count], list(arguments[count + 1 : -1]))
            return function(arguments[:count], saved, arguments[-1])

        return run

    _define(
        name,
        f"({', '.join(declared)}) -> Tensor[]",
        collecting(body.backward),
        collecting(body.backward_fake),
        body.tags,
    )
    _set_formula(name, _no_second_gradient)
    _torch.batch_by_loop(_library, overload(name))


def _define(
    name: str,
    schema: str,
    function: Callable[..., object],
    fake: Callable[..., object],
    tags: Sequence[torch.Tag] = (),
) -> None:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, *tags))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _torch.call_without_dispatch(overload(name), function)


def _set_formula(
    name: str, backward: Callable[..., object], save: Callable[..., None] | None = None
) -> None:
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=save, lib=_library
    )


def _no_second_gradient(ctx: object, *grads: object) -> NoReturn:
    raise RuntimeError(
        "the gradient of a gradient goes through a kernel, which has none: keep the layer on its "
        "reference for this"
    )


class _Formula:
    """The autograd formula of an op: it passes what it saves of a call to the backward op."""

    def __init__(
        self, backward_op: Callable[..., list[Tensor]], body: Differentiable, packed: Sequence[int]
    ) -> None:
        self._backward_op = backward_op
        self._body = body
        self._packed = packed

    # Both get the ``ctx`` of a ``torch.autograd.Function``, which has the attributes set on it.

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor | Sequence[Tensor]) -> None:
        """Save what the backward needs; torch calls this after the forward."""
        operands = unpack(inputs, self._packed)
        # Here torch has lists flat, and an argument of its own behind the others.
        needs = ctx.needs_input_grad[: len(operands)]
        if listed := len(self._packed):
            needs = (needs[:listed], *needs[listed:])
        self._body.check_wanted(unpack(needs, self._packed))
        results = (output,) if isinstance(output, Tensor) else output
        ctx.mark_non_differentiable(*self._body.non_differentiable(results))
        tensors, ctx.numbers = self._body.keep(operands, results)
        ctx.save_for_backward(*tensors)

    def differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[object, ...]:
        """Return a gradient for each argument of the op; None where none is needed."""
        needs = unpack(ctx.needs_input_grad, self._packed)
        saved = list(ctx.saved_tensors)
        made = iter(self._backward_op(*grads[: self._body.count], saved, *ctx.numbers, needs))
        return tuple(pack([next(made) if needed else None for needed in needs], self._packed))
