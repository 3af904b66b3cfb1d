"""Hub layers as custom ops: ``torch.ops.hubkernels.<repository>_<layer>_<commit8>_<digest8>``.

A name says which kernel runs, at which commit, and for which call signature (see `Call`): equal
calls of the instances of a layer share an op. An op whose name ends in ``_training`` is for calls
that a gradient may flow through. Only these ops have an autograd formula, which calls the op whose
name ends in ``_backward``.

The compile caches of torch hold the name of an op and not its body. So the name covers everything
that the body depends on: the kernel's commit, the code of the reference and of the layer's
``fake``, the call signature, for training the source of the gradient, and `LOWERING_VERSION`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernelgraph.cache import remember
from kernelgraph.fingerprint import code_hash, digest
from kernelgraph.graph.calls import Call, Template, UnsupportedValue
from kernelgraph.graph.gradients import Gradient
from kernelgraph.graph.infer import (
    Effects,
    InferOutput,
    Order,
    OutputSpec,
    TensorSpec,
    differentiable,
    infer_output,
    order_of,
    static_key,
)
from kernelgraph.graph.ops.backward import ByKernel, ByReference, Differentiable
from kernelgraph.graph.ops.definition import NAMESPACE, packed_operands, register
from kernelgraph.graph.ops.fast_path import Operand
from kernelgraph.graph.ops.forward import Body
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible

LOWERING_VERSION = "4"
"""The version of the bodies: increase it when this package gives an op name another body."""

_lock = threading.Lock()
_bodies: dict[str, Body] = {}
_lowered: dict[object, Lowered] = {}
_inferred: dict[object, tuple[InferOutput, OutputSpec]] = {}


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
    aliases: tuple[tuple[int, int], ...] = ()
    """The numbers of results that the layer does not compute, but returns as they were given to
    it, with the numbers of these operands. What the op returns for them is not to be used."""

    @property
    def qualname(self) -> str:
        """The op's name with its namespace."""
        return f"{NAMESPACE}::{self.name}"


class SavedByOp(NamedTuple):
    """The tensors that an op for training saves for its backward."""

    operands: frozenset[int]
    """The numbers of its operands that it saves as they are given to it."""
    results: frozenset[int]
    """The numbers of its results that it saves."""
    packed: tuple[int, ...]
    """The operands that the op takes as one list."""


def saved_by(name: str) -> SavedByOp:
    """Return what the op for training called ``name`` saves; nothing for an unknown op."""
    body = _bodies.get(name)
    if not isinstance(body, Differentiable):
        return SavedByOp(frozenset(), frozenset(), ())
    return SavedByOp(*body.saved, packed_operands(body.call))


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
        UnsupportedValue: If the shapes of the results cannot be inferred (see `infer_output`), or
            the layer does what no op can: it sets attributes, draws random
            numbers, returns views of its arguments, or anything but tensors in tuples, lists and
            dicts; or in sizes that depend on values without a ``fake`` that says so. Also if the
            kernel has shown, when an op ran it, that no op can.
        AttributeError: If the kernel reads an attribute that the layer does not have.
        RuntimeError: If the layer's ``fake`` raises.
    """
    lowered = _lower(kernel, layer, call, operands, gradient)
    body = _bodies[lowered.name]
    if body.gave_way:
        raise UnsupportedValue(f"{kernel}: {body.gave_way}")
    if place is not None:
        body.places.add(*place)
    return lowered


def check_possible(
    kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[Operand]
) -> tuple[InferOutput, OutputSpec]:
    """Infer the output of a call; see `infer_output` for what this returns and raises.

    `lower` does this too, once for calls that are alike. To call it first spares a trial of a
    kernel that no op can run.
    """
    sizes = static_key(operands)
    key = (kernel.layer, kernel.origin, layer, call.describe(), sizes, torch.get_default_dtype())
    if sizes is None or key not in _inferred:
        found = infer_output(kernel, layer, call, operands)
        if sizes is None or found[1].fresh:
            return found
        remember(_inferred, key, found)
    return _inferred[key]


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
    shapes, spec = check_possible(kernel, layer, call, operands)
    base = _base_name(kernel, layer, signature, operands, spec, gradient)
    name = base if gradient is None else f"{base}_training"
    with _lock:
        if name not in _bodies:
            body = _body(kernel, layer, call, operands, shapes, spec, gradient)
            register(base, call, body)
            _bodies[name] = body
        body = _bodies[name]
        packed = packed_operands(call)
        written, returns = body.returned, body.returns
        lowered = Lowered(name, spec.output, spec.results, written, packed, returns, spec.aliases)
        if sizes is not None and not spec.fresh:
            remember(_lowered, key, lowered)
    return lowered


def _body(
    kernel: Kernel,
    layer: Extensible,
    call: Call,
    operands: Sequence[Operand],
    shapes: InferOutput,
    spec: OutputSpec,
    gradient: Gradient | None,
) -> Body:
    """Make the body of an op; for training, choose the source of its gradient."""
    written = Effects.of(spec)
    parts = (kernel, layer, call, shapes, spec, written)
    if gradient is None:
        return Body(*parts)
    own = gradient.own
    if own is not None:
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
        code_hash(kernel.forward),  # a repository may make several classes of one name
        f"{layer.owner.__module__}.{layer.owner.__qualname__}",
        code_hash(layer.reference),
        code_hash(layer.fake) if layer.fake else "",
        signature,
        repr([(str(r.dtype), r.device.type, len(r.shape), r.order) for r in spec.results]),
        # A kernel may write into operands of some layouts only: its first calls show that.
        repr([*map(_order, operands)]),
        repr(tuple(Effects.of(spec))),
        spec.output.text(),
        repr((gradient.wanted, gradient.own, [*map(_type_text, operands)])) if gradient else "",
        *(["checkpointed"] if gradient and gradient.checkpointed else []),
    )


def _order(value: Operand) -> Order:
    strided = isinstance(value, Tensor) and value.layout is torch.strided
    return order_of(value) if strided else ()


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
