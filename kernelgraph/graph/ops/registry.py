"""Hub layers as custom ops: ``torch.ops.hubkernels.<repository>_<layer>_<commit8>_<digest8>``.

A name says which kernel runs, at which commit, and for which call signature (see `Call`): calls
with the same signature share an op, whatever layer they are of. An op whose name ends in
``_training`` is for calls that a gradient may flow through. Only these ops have an autograd
formula, which calls the op whose name ends in ``_backward``.

The compile caches of torch hold the name of an op and not its body. So the name covers everything
that the body depends on: the kernel's commit, the code of the reference and of the layer's
``fake``, the call signature, for training the source of the gradient, and `LOWERING_VERSION`.
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
from kernelgraph.graph.infer import (
    OutputSpec,
    Source,
    TensorSpec,
    differentiable,
    effects,
    infer_output,
    static_key,
)
from kernelgraph.graph.ops.backward import (
    ByKernel,
    ByReference,
    Differentiable,
    SavedForBackward,
)
from kernelgraph.graph.ops.fast_path import Operand, OpFunction
from kernelgraph.graph.ops.forward import Body
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible

NAMESPACE = "hubkernels"
LOWERING_VERSION = "3"
"""The version of the bodies: increase it when this package gives an op name another body."""

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_lock = threading.Lock()
_bodies: dict[str, Body] = {}
_lowered: dict[object, Lowered] = {}


@dataclass(frozen=True)
class Lowered:
    """A call as a registered op."""

    name: str
    """The op's name in `NAMESPACE`."""
    output: Template
    """The structure of what the layer returns; its leaves are the first results of the op."""
    results: tuple[TensorSpec, ...]
    """The shapes, dtypes and devices of these results, in the call that was lowered."""
    written: tuple[int, ...] = ()
    """The operands that the layer writes into. The op does not write: the new contents of these
    operands are its next results."""
    packed: tuple[int, ...] = ()
    """The operands that the op takes as one list, where it would have too many arguments."""
    returns: int = 1
    """The number of tensors that the op returns: one by itself, several in a tuple."""

    @property
    def qualname(self) -> str:
        """The op's name with its namespace."""
        return f"{NAMESPACE}::{self.name}"


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


# --- from a call to its op ----------------------------------------------------------------------


def lower(
    kernel: Kernel,
    layer: Extensible,
    call: Call,
    operands: Sequence[Operand],
    *,
    gradient: Gradient | None = None,
    place: tuple[nn.Module, str] | None = None,
) -> Lowered:
    """Return the op that makes ``call`` with ``kernel``; register it if it is new.

    Args:
        kernel: The kernel to run.
        layer: The layer that it stands in for.
        call: The signature of the call.
        operands: The call's operands. Their values do not matter: fakes will do.
        gradient: The source of the gradient; None if no gradient flows through the call.
        place: The instance that is called and its path in the model, for errors.

    Raises:
        UnknownShape: If the shapes of the results cannot be inferred (see `infer_output`).
        UnsupportedValue: If the layer sets attributes, or returns anything but tensors in tuples,
            lists and dicts; or in sizes that depend on values without a ``fake`` that says so.
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
    operands: Sequence[Operand],
    gradient: Gradient | None,
) -> Lowered:
    signature, sizes = call.describe(), static_key(operands)
    # Most calls in a model are alike, and running them on fakes is what takes the time here.
    which = (kernel.layer, kernel.origin, layer, signature, sizes)
    key = (*which, gradient, torch.get_default_dtype())
    if sizes is not None and key in _lowered:
        return _lowered[key]
    shapes, spec = infer_output(kernel, layer, call, operands)
    base = _base_name(kernel, layer, signature, operands, spec, gradient)
    name = base if gradient is None else f"{base}_training"
    with _lock:
        if name not in _bodies:
            body = _body(kernel, layer, call, operands, shapes, spec, gradient)
            register(base, call, body)
            _bodies[name] = body
        body = _bodies[name]
        packed = packed_operands(call)
        lowered = Lowered(name, spec.output, spec.results, body.returned, packed, body.returns)
        if sizes is not None and not spec.fresh:
            remember(_lowered, key, lowered)
    return lowered


def _body(
    kernel: Kernel,
    layer: Extensible,
    call: Call,
    operands: Sequence[Operand],
    shapes: Source,
    spec: OutputSpec,
    gradient: Gradient | None,
) -> Body:
    """Make the body of an op; for training, choose the source of its gradient."""
    written = effects(kernel, layer, call, operands, spec)
    parts = (kernel, layer, call, shapes, spec, written)
    if gradient is None:
        return Body(*parts)
    own = gradient.own
    if own is not None and not (written.kernel or written.layer):
        return ByKernel(own, operands, gradient.wanted, own.flows, *parts)
    flows = differentiable(layer, call, operands, gradient.wanted, written.layer)
    count = len(spec.results) + len(written.layer)
    return ByReference(gradient.wanted, flows or (True,) * count, *parts)


# --- names --------------------------------------------------------------------------------------


def _base_name(
    kernel: Kernel,
    layer: Extensible,
    signature: str,
    operands: Sequence[Operand],
    spec: OutputSpec,
    gradient: Gradient | None,
) -> str:
    """The name of an op without its suffix, with a digest of all that the body depends on."""
    return f"{kernel_name(kernel)}_" + digest(
        LOWERING_VERSION,
        kernel.origin.revision,
        f"{layer.owner.__module__}.{layer.owner.__qualname__}",
        code_hash(layer.reference),
        code_hash(layer.fake) if layer.fake else "",
        signature,
        repr([(str(r.dtype), r.device.type, len(r.shape)) for r in spec.results]),
        spec.output.text(),
        repr((gradient.wanted, gradient.own, [*map(_type_text, operands)])) if gradient else "",
    )


def _type_text(value: Operand) -> object:
    """The properties of an operand that the body of an op for training depends on."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return str(value.dtype), value.device.type, value.dim()


def kernel_name(kernel: Kernel) -> str:
    """``<repository>_<layer>_<commit8>``, as an identifier."""
    return readable_name(kernel.origin.name, kernel.layer.__name__, kernel.origin.revision)


def readable_name(repository: str, layer: str, revision: str) -> str:
    """The part of an op's name that is for people, as an identifier."""
    name = f"{repository}_{layer}_{revision[:8]}"
    # No underscores in front: Inductor writes op names into classes, where Python mangles them.
    name = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_")
    return f"k{name}" if name[0].isdigit() else name


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
    forward, fake = body.forward, body.fake
    if packed:
        forward, fake = _unpacking(forward, packed), _unpacking(fake, packed)
    schema = _schema(call, packed, body.returns)
    if not isinstance(body, Differentiable):
        _define(base, schema, forward, fake)
        return
    _define_backward(f"{base}_backward", body)
    _define(f"{base}_training", schema, forward, fake, body.tags)
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
        ctx.mark_non_differentiable(*self._body.still(results))
        tensors, ctx.numbers = self._body.keep(operands, results)
        ctx.save_for_backward(*tensors)

    def differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[object, ...]:
        """Return a gradient for each argument of the op; None where none is needed."""
        needs = unpack(ctx.needs_input_grad, self._packed)
        saved = list(ctx.saved_tensors)
        made = iter(self._backward_op(*grads[: self._body.count], saved, *ctx.numbers, needs))
        return tuple(pack([next(made) if needed else None for needed in needs], self._packed))
