"""Hub layers as custom ops: ``torch.ops.hubkernels.<repository>_<layer>_<commit8>_<form8>``.

A name says which kernel runs, at which commit, and in which form of call (see `Call`): layers
that call a kernel alike share its op. With ``_training`` it is an op for calls through which a
gradient may flow, the only ones with an autograd formula; with ``_backward`` what that formula
calls.

The compile caches of torch hold an op's name and not its body. Therefore the names hold
everything that a body depends on: the kernel's commit, the code of the reference and of the
layer's ``fake``, the form of the call, for training where the gradient comes from, and
`LOWERING_VERSION`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kernelgraph.cache import remember
from kernelgraph.fingerprint import code_hash, digest
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, Template
from kernelgraph.graph.gradients import Gradient
from kernelgraph.graph.infer import TensorSpec, differentiable, effects, infer_output, static_key
from kernelgraph.graph.ops.backward import ByKernel, ByReference, Differentiable, Kept
from kernelgraph.graph.ops.forward import Body
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible

NAMESPACE = "hubkernels"
LOWERING_VERSION = "3"
"""Counted up whenever this package gives the same op name another body."""

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_lock = threading.Lock()
_bodies: dict[str, Body] = {}
_answers: dict[Any, Lowered] = {}


@dataclass(frozen=True)
class Lowered:
    """A form of call as a registered op."""

    name: str
    """The op's name in `NAMESPACE`."""
    output: Template
    """What the layer returns; its leaves are the op's first results."""
    results: tuple[TensorSpec, ...]
    """The shapes, dtypes and devices of these results in the call that was lowered."""
    written: tuple[int, ...] = ()
    """The operands that the layer writes into. The op does not: what is to be in them are its
    next results."""
    packed: tuple[int, ...] = ()
    """The operands that the op takes as one list, where it would have too many arguments."""
    returns: int = 1
    """How many tensors the op returns; with one, not in a tuple."""

    @property
    def qualname(self) -> str:
        """The op's name with its namespace."""
        return f"{NAMESPACE}::{self.name}"


def overload(name: str) -> Any:
    """The op called ``name`` in `NAMESPACE`."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def pack(operands: Sequence[Any], packed: Sequence[int]) -> list[Any]:
    """An op's arguments: those of its operands that are ``packed`` are a list in front."""
    if len(packed) == 0:
        return list(operands)
    rest = [value for i, value in enumerate(operands) if i not in packed]
    return [[operands[i] for i in packed], *rest]


def results_of(name: str, packed: Sequence[int], operands: Sequence[Any]) -> list[Tensor]:
    """The results of a call of an op; see `pack`."""
    results = overload(name)(*pack(operands, packed))
    return [results] if isinstance(results, Tensor) else list(results)


def unpack(arguments: Sequence[Any], packed: Sequence[int]) -> list[Any]:
    """The inverse of `pack`."""
    if len(packed) == 0:
        return list(arguments)
    listed, *rest = arguments
    operands = dict(zip(packed, listed, strict=True))
    others = iter(rest)
    return [operands[i] if i in operands else next(others) for i in range(len(listed) + len(rest))]


def lower(
    kernel: Kernel,
    layer: Extensible,
    call: Call,
    operands: Sequence[Any],
    *,
    gradient: Gradient | None = None,
    place: tuple[nn.Module, str] | None = None,
) -> Lowered:
    """The op that makes ``call`` with ``kernel``, registered if it is not yet.

    Args:
        kernel: The kernel to run.
        layer: The layer that it stands in for.
        call: The form of the call.
        operands: The call's operands. Of tensors only the form counts: fakes will do.
        gradient: Where the gradient comes from; None: none flows through the call.
        place: The instance that is called and its path in the model, for errors.

    Raises:
        UnknownShape: If nothing tells the shapes of the results (see `infer_output`).
        UnsupportedValue: If the layer returns anything but tensors in tuples, lists and dicts, in
            sizes that depend on values where no ``fake`` says so, or sets attributes.
        AttributeError: If the kernel reads an attribute that the layer does not have.
        RuntimeError: If the kernel does not return the structure that the layer does.
    """
    lowered = _lower(kernel, layer, call, operands, gradient)
    if place is not None:
        _bodies[lowered.name].places.add(*place)
    return lowered


def _lower(
    kernel: Kernel,
    layer: Extensible,
    call: Call,
    operands: Sequence[Any],
    gradient: Gradient | None,
) -> Lowered:
    form, sizes = call.describe(), static_key(operands)
    # A model calls most of its layers alike; running them on fakes is what takes the time here.
    what = (kernel.layer, kernel.origin, layer, form, sizes)
    key = (*what, gradient, torch.get_default_dtype())
    if sizes is not None and key in _answers:
        return _answers[key]
    shapes, told = infer_output(kernel, layer, call, operands)
    base = f"{kernel_name(kernel)}_" + digest(
        LOWERING_VERSION,
        kernel.origin.revision,
        f"{layer.owner.__module__}.{layer.owner.__qualname__}",
        code_hash(layer.reference),
        code_hash(layer.fake) if layer.fake else "",
        form,
        repr([(str(r.dtype), r.device.type, len(r.shape)) for r in told.results]),
        told.output.text(),
        repr((gradient.wanted, gradient.own, [*map(_kind, operands)])) if gradient else "",
    )
    name = base if gradient is None else f"{base}_training"
    with _lock:
        if name not in _bodies:
            written = effects(kernel, layer, call, operands, told)
            parts = (kernel, layer, call, shapes, told, written)
            body = _differentiable(gradient, operands, parts) if gradient else Body(*parts)
            register(base, call, body)
            _bodies[name] = body
        body = _bodies[name]
        packed = packed_operands(call)
        lowered = Lowered(name, told.output, told.results, body.returned, packed, body.returns)
        if sizes is not None and not told.fresh:
            remember(_answers, key, lowered)
    return lowered


def _kind(value: Any) -> Any:
    """What of an operand the body of an op for training depends on."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return str(value.dtype), value.device.type, value.dim()


def _differentiable(
    gradient: Gradient, operands: Sequence[Any], parts: tuple[Any, ...]
) -> Differentiable:
    _, layer, call, _, told, written = parts
    own = gradient.own
    if own is not None and not (written.kernel or written.layer):
        return ByKernel(own, operands, gradient.wanted, own.flows, *parts)
    flows = differentiable(layer, call, operands, gradient.wanted, written.layer)
    count = len(told.results) + len(written.layer)
    return ByReference(gradient.wanted, flows or (True,) * count, *parts)


_MOST_ARGUMENTS = 64
"""Of an op, in torch's dispatcher."""


def packed_operands(call: Call) -> tuple[int, ...]:
    return call.tensors if len(call.types) > _MOST_ARGUMENTS else ()


def kernel_name(kernel: Kernel) -> str:
    """``<repository>_<layer>_<commit8>``, as an identifier."""
    return readable_name(kernel.origin.name, kernel.layer.__name__, kernel.origin.revision)


def readable_name(repository: str, layer: str, revision: str) -> str:
    """The part of an op's name that is for people, as an identifier."""
    name = f"{repository}_{layer}_{revision[:8]}"
    # No underscores in front: Inductor writes op names into classes, where Python mangles them.
    name = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_")
    return f"k{name}" if name[0].isdigit() else name


def register(base: str, call: Call, body: Body) -> None:
    """Define the op for inference, or those for training, with fakes and the formula.

    Each has a name of its own and none an overload: torch 2.11 to 2.14 abort at exit where two
    overloads of one op take the same arguments.
    """
    packed = packed_operands(call)
    taken = pack([f"{t} {n}" for t, n in zip(call.types, call.names, strict=True)], packed)
    if packed:
        taken[0] = "Tensor[] tensors"
    returns = "Tensor" if body.returns == 1 else f"({', '.join(['Tensor'] * body.returns)})"
    schema = f"({', '.join(taken)}) -> {returns}"
    forward, fake = body.forward, body.fake
    if packed:
        forward, fake = (_unpacking(function, packed) for function in (forward, fake))
    if not isinstance(body, Differentiable):
        _define(base, schema, forward, fake)
        return
    count = body.count

    def of_backward(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            kept = Kept(given[count], list(given[count + 1 : -1]))
            return function(given[:count], kept, given[-1])

        return run

    grads = [f"Tensor? grad_{i}" for i in range(count)]
    arguments = [*grads, "Tensor[] saved", *body.numbers, "bool[] needs_grad"]
    _define(
        f"{base}_backward",
        f"({', '.join(arguments)}) -> Tensor[]",
        of_backward(body.backward),
        of_backward(body.backward_fake),
        body.tags,
    )
    _differentiate(f"{base}_backward", _no_second_gradient)
    _define(f"{base}_training", schema, forward, fake, body.tags)
    formula = _Formula(overload(f"{base}_backward"), body, packed)
    _differentiate(f"{base}_training", formula.differentiate, formula.save)


def _differentiate(name: str, backward: Any, save: Any = None) -> None:
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=save, lib=_library
    )


def _unpacking(function: Callable[..., Any], packed: Sequence[int]) -> Callable[..., Any]:
    return lambda *arguments: function(*unpack(arguments, packed))


def _no_second_gradient(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(
        "the gradient of a gradient goes through a kernel, which has none: keep the layer on its "
        "reference for this"
    )


class _Formula:
    """The autograd formula of an op: it hands what it keeps of a call to the backward op."""

    def __init__(self, backward_op: Any, body: Differentiable, packed: Sequence[int]) -> None:
        self._op = backward_op
        self._body = body
        self._packed = packed

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        operands = unpack(inputs, self._packed)
        # Here torch has lists flat, and an argument of its own behind the others.
        needs = ctx.needs_input_grad[: len(operands)]
        if listed := len(self._packed):
            needs = (needs[:listed], *needs[listed:])
        self._body.check_wanted(unpack(needs, self._packed))
        results = (output,) if isinstance(output, Tensor) else output
        ctx.mark_non_differentiable(*self._body.still(results))
        tensors, ctx.numbers = self._body.keep(operands, results)
        ctx.save_for_backward(*tensors)

    def differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = unpack(ctx.needs_input_grad, self._packed)
        saved = list(ctx.saved_tensors)
        made = iter(self._op(*grads[: self._body.count], saved, *ctx.numbers, needs))
        return tuple(pack([next(made) if needed else None for needed in needs], self._packed))


def _define(
    name: str,
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    tags: Sequence[torch.Tag] = (),
) -> None:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, *tags))
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _torch.call_without_dispatch(overload(name), body)
