"""Hub layers as custom ops: ``torch.ops.hubkernels.<repository>_<layer>_<commit8>_<form8>``.

A name says which kernel runs, at which commit, and in which form of call (see `Call`): layers
that call a kernel alike share its op. With ``_training`` it is the op for calls through which a
gradient may flow, the only one with an autograd formula; with ``_backward`` what that formula
calls.

The compile caches of torch hold an op's name and not its body. Therefore the names hold
everything that a body depends on: the kernel's commit, the code of the reference and of the
layer's ``fake``, the form of the call, and `LOWERING_VERSION`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraph.graph import _torch
from kernelgraph.graph.body import Body
from kernelgraph.graph.call import Call, Template, digest, template_text
from kernelgraph.graph.shapes import differentiable, effects, static_key, tell
from kernelgraph.graph.told import Result, remember
from kernelgraph.hub.loading import code_hash
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible

NAMESPACE = "hubkernels"
LOWERING_VERSION = "2"
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
    results: tuple[Result, ...]
    """The shapes, dtypes and devices of these results in the call that was lowered."""
    written: tuple[int, ...] = ()
    """The operands that the layer writes into. The op does not: what is to be in them are its
    next results."""
    packed: tuple[int, ...] = ()
    """The operands that the op takes as one list, where it would have too many arguments."""

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
    training: bool,
    place: tuple[nn.Module, str] | None = None,
) -> Lowered:
    """The op that makes ``call`` with ``kernel``, registered if it is not yet.

    Args:
        kernel: The kernel to run.
        layer: The layer that it stands in for: its reference gives the op's gradient.
        call: The form of the call.
        operands: The call's operands. Of tensors only the form counts: fakes will do.
        training: Whether a gradient may flow through the call.
        place: The instance that is called and its path in the model, for errors.

    Raises:
        NoFake: If nothing tells the shapes of the results (see `tell`).
        UnsupportedValue: If the layer returns anything but tensors in tuples, lists and dicts, in
            sizes that depend on values where no ``fake`` says so, or sets attributes.
        AttributeError: If the kernel reads an attribute that the layer does not have.
        RuntimeError: If the kernel does not return the structure that the layer does.
    """
    lowered = _lower(kernel, layer, call, operands, training)
    if place is not None:
        _bodies[lowered.name].places.add(*place)
    return lowered


def _lower(
    kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[Any], training: bool
) -> Lowered:
    form, sizes = call.describe(), static_key(operands)
    # A model calls most of its layers alike; running them on fakes is what takes the time here.
    wanted = _wanted(operands) if training else ()
    what = (kernel.layer, kernel.origin, layer, form, sizes)
    key = (*what, training, wanted, torch.get_default_dtype())
    if sizes is not None and key in _answers:
        return _answers[key]
    shapes, told = tell(kernel, layer, call, operands)
    base = f"{kernel_name(kernel)}_" + digest(
        LOWERING_VERSION,
        kernel.origin.revision,
        f"{layer.owner.__module__}.{layer.owner.__qualname__}",
        code_hash(layer.reference),
        code_hash(layer.fake) if layer.fake else "",
        form,
        repr([(str(r.dtype), r.device.type, len(r.shape)) for r in told.results]),
        template_text(told.output),
    )
    name = f"{base}_training" if training else base
    with _lock:
        if name not in _bodies:
            written = effects(kernel, layer, call, operands, told)
            body = Body(kernel, layer, call, shapes, told, written, differentiable=training)
            _register(base, call, body)
            _bodies[name] = body
        body = _bodies[name]
        if training and wanted not in body.flows:
            flows = differentiable(layer, call, operands, body.returned)
            remember(body.flows, wanted, flows or (True,) * body.count)
        lowered = Lowered(name, told.output, told.results, body.returned, _packed(call, body))
        if sizes is not None and not told.fresh:
            remember(_answers, key, lowered)
    return lowered


def _wanted(operands: Sequence[Any]) -> tuple[bool, ...]:
    """Of which operands gradients are wanted."""
    return tuple(isinstance(v, Tensor) and v.requires_grad for v in operands)


_MOST_ARGUMENTS = 64
"""Of an op, in torch's dispatcher."""


def _packed(call: Call, body: Body) -> tuple[int, ...]:
    most = len(call.types) + body.count + 1  # those of the backward op
    return call.tensors if most > _MOST_ARGUMENTS else ()


def kernel_name(kernel: Kernel) -> str:
    """``<repository>_<layer>_<commit8>``, as an identifier."""
    name = f"{kernel.origin.name}_{kernel.layer.__name__}_{kernel.origin.revision[:8]}"
    # No underscores in front: Inductor writes op names into classes, where Python mangles them.
    name = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_")
    return f"k{name}" if name[0].isdigit() else name


def _register(base: str, call: Call, body: Body) -> None:
    """Define the op for inference, or those for training, with fakes and the formula.

    Each has a name of its own and none an overload: torch 2.11 to 2.14 abort at exit where two
    overloads of one op take the same arguments.
    """
    packed, count = _packed(call, body), body.count
    taken = pack([f"{t} {n}" for t, n in zip(call.types, call.names, strict=True)], packed)
    if packed:
        taken[0] = "Tensor[] tensors"
    made = ["Tensor"] * (count + len(body.kept))
    returns = "Tensor" if len(made) == 1 else f"({', '.join(made)})"
    schema = f"({', '.join(taken)}) -> {returns}"
    forward, fake = body.forward, body.fake
    if packed:
        forward, fake = (_unpacking(function, packed) for function in (forward, fake))
    if not body.differentiable:
        _define(base, schema, forward, fake)
        return

    def of_backward(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: function(given[:count], unpack(given[count:-1], packed), given[-1])

    grads = [f"Tensor? grad_{i}" for i in range(count)]
    _define(
        f"{base}_backward",
        f"({', '.join([*grads, *taken, 'bool[] needs_grad'])}) -> Tensor[]",
        of_backward(body.backward),
        of_backward(body.backward_fake),
    )
    _define(f"{base}_training", schema, forward, fake)
    formula = _Formula(overload(f"{base}_backward"), call, body)
    torch.library.register_autograd(
        f"{NAMESPACE}::{base}_training",
        formula.differentiate,
        setup_context=formula.save,
        lib=_library,
    )


def _unpacking(function: Callable[..., Any], packed: Sequence[int]) -> Callable[..., Any]:
    return lambda *arguments: function(*unpack(arguments, packed))


class _Formula:
    """The autograd formula of an op: it hands its operands to the backward op."""

    def __init__(self, backward_op: Any, call: Call, body: Body) -> None:
        self._op = backward_op
        self._tensors = call.tensors
        self._count = body.count
        self._kept = body.kept
        self._flows = body.flows
        self._packed = _packed(call, body)

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        operands = unpack(inputs, self._packed)
        results = (output,) if isinstance(output, Tensor) else output
        flows = self._flows.get(_wanted(operands), ())
        # A buffer that a layer counts in is to stay one.
        still = [r for r, flow in zip(results, flows, strict=False) if not flow]
        if self._kept:
            kept = results[-len(self._kept) :]
            still += kept
            for i, before in zip(self._kept, kept, strict=True):
                operands[i] = before
        ctx.mark_non_differentiable(*still)
        ctx.save_for_backward(*(operands[i] for i in self._tensors))
        ctx.numbers = [None if i in self._tensors else v for i, v in enumerate(operands)]

    def differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grads = grads[: self._count]
        operands = list(ctx.numbers)
        for i, tensor in zip(self._tensors, ctx.saved_tensors, strict=True):
            operands[i] = tensor
        needs = unpack(ctx.needs_input_grad, self._packed)
        made = iter(self._op(*grads, *pack(operands, self._packed), needs))
        return tuple(pack([next(made) if needed else None for needed in needs], self._packed))


def _define(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _torch.call_without_dispatch(overload(name), body)
