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
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.call import (
    Call,
    Template,
    UnsupportedValue,
    digest,
    take_tensors,
    template_text,
)
from kernelgraph.graph.runner import Runner
from kernelgraph.graph.shapes import (
    Result,
    ShapeFunction,
    Told,
    describe_output,
    effects,
    remember,
    static_key,
    tell,
)
from kernelgraph.hub.loading import code_hash
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible

NAMESPACE = "hubkernels"
LOWERING_VERSION = "1"
"""Counted up whenever this package gives the same op name another body."""

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_lock = threading.Lock()
_registered: set[str] = set()
_answers: dict[Any, Lowered] = {}


@dataclass(frozen=True)
class Lowered:
    """A form of call as a registered op."""

    name: str
    """The op's name in `NAMESPACE`."""
    output: Template
    """What the layer returns; its leaves are the op's results."""
    results: tuple[Result, ...]
    """The shapes, dtypes and devices of the results of the call that was lowered."""

    @property
    def qualname(self) -> str:
        """The op's name with its namespace."""
        return f"{NAMESPACE}::{self.name}"


def overload(name: str) -> Any:
    """The op called ``name`` in `NAMESPACE`. Dynamo traces this."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def lower(
    kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[Any], *, training: bool
) -> Lowered:
    """The op that makes ``call`` with ``kernel``, registered if it is not yet.

    Args:
        kernel: The kernel to run.
        layer: The layer that it stands in for: its reference gives the op's gradient.
        call: The form of the call.
        operands: The call's operands. Of tensors only the form counts: fakes will do.
        training: Whether a gradient may flow through the call.

    Raises:
        NoFake: If neither the layer's ``fake``, nor the kernel, nor the reference runs on fakes.
        UnsupportedValue: If the layer returns anything but tensors in tuples, lists and dicts, in
            sizes that depend on values, or writes into its operands or attributes.
        AttributeError: If the kernel reads an attribute that the layer does not have.
        RuntimeError: If the kernel does not return the structure that the layer does.
    """
    form, sizes = call.describe(), static_key(operands)
    # A model calls most of its layers alike; running them on fakes is what takes the time here.
    key = (kernel.layer, kernel.origin, layer, form, sizes, training, torch.get_default_dtype())
    if sizes is not None and key in _answers:
        return _answers[key]
    shapes, told = tell(kernel, layer, call, operands)
    _check_count(call, told, training)
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
    lowered = Lowered(f"{base}_training" if training else base, told.output, told.results)
    with _lock:
        if lowered.name not in _registered:
            written = effects(kernel, layer, call, operands)
            op = _KernelOp(kernel, layer, call, shapes, lowered, written)
            op.register(base, training=training)
            _registered.add(lowered.name)
        if sizes is not None:
            remember(_answers, key, lowered)
    return lowered


_MOST_ARGUMENTS = 64
"""Of an op, in torch's dispatcher."""


def _check_count(call: Call, told: Told, training: bool) -> None:
    count = len(call.types) + (len(told.results) + 1 if training else 0)
    if count > _MOST_ARGUMENTS:
        raise UnsupportedValue(
            f"the op would have {count} arguments, of which torch allows {_MOST_ARGUMENTS}"
        )


def kernel_name(kernel: Kernel) -> str:
    """``<repository>_<layer>_<commit8>``, as an identifier."""
    name = f"{kernel.origin.name}_{kernel.layer.__name__}_{kernel.origin.revision[:8]}"
    # No underscores in front: Inductor writes op names into classes, where Python mangles them.
    name = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_")
    return f"k{name}" if name[0].isdigit() else name


class _KernelOp:
    """The bodies of the ops of one form of call."""

    def __init__(
        self,
        kernel: Kernel,
        layer: Extensible,
        call: Call,
        shapes: Runner,
        lowered: Lowered,
        written: tuple[int, ...],
    ) -> None:
        self._kernel = kernel
        self._layer = layer
        self._call = call
        self._shapes = ShapeFunction(shapes)
        self._run_kernel = Runner(kernel.forward, call)
        self._run_reference = Runner(layer.reference, call)
        self._expected = [(r.dtype, r.device.type, len(r.shape)) for r in lowered.results]
        self._output = lowered.output
        self._single = len(lowered.results) == 1
        self._tensors = call.tensors
        self._is_tensor = [kind == "Tensor" for kind in call.types]
        self._written = written
        # Of those the kernel gets copies, and may return them.
        self._lent = [i for i in call.tensors if i not in written]
        self._sizes: dict[Any, tuple[Any, ...]] = {}

    def register(self, base: str, *, training: bool) -> None:
        """Define the op for inference, or those for training, with fakes and the formula."""
        # Each has a name of its own and none an overload: torch 2.11 to 2.14 abort at exit where
        # two overloads of one op take the same arguments.
        returns = "Tensor" if self._single else f"({', '.join('Tensor' for _ in self._expected)})"
        schema = f"({self._call.schema}) -> {returns}"
        if not training:
            _define(base, schema, self.forward, self.fake)
            return
        grads = ", ".join(f"Tensor? grad_{i}" for i in range(len(self._expected)))
        _define(
            f"{base}_backward",
            f"({grads}, {self._call.schema}, bool[] needs_grad) -> Tensor[]",
            self.backward,
            self.backward_fake,
        )
        self._backward_op = overload(f"{base}_backward")
        _define(f"{base}_training", schema, self.forward, self.fake)
        torch.library.register_autograd(
            f"{NAMESPACE}::{base}_training",
            self._differentiate,
            setup_context=self._save,
            lib=_library,
        )

    # --- the forward op -----------------------------------------------------------------

    def forward(self, *operands: Any) -> Any:
        """The kernel, below autograd: its results own their memory and are contiguous."""
        given = [v.shape if t else v for v, t in zip(operands, self._is_tensor)]  # noqa: B905
        sizes = self._sizes.get(form := tuple(given))
        before = [] if sizes else self._versions(operands)
        if self._written:
            operands = tuple(v.clone() if i in self._written else v for i, v in enumerate(operands))
        with torch.no_grad():
            try:
                result = self._run_kernel(operands)
            except torch.OutOfMemoryError:  # some programs catch it and try a smaller batch
                raise
            except Exception as error:
                raise RuntimeError(
                    f"kernel {self._kernel}, called for layer {self._layer.layer_name}, raised "
                    f"{type(error).__name__}: {error}"
                ) from error
            tensors = self._take(result)
            if sizes is None:
                # The first call with operands of these sizes: what costs too much for each.
                who = f"kernel {self._kernel}, called for layer {self._layer.layer_name},"
                self._check_unwritten(before, operands, who)
                sizes = self._told_sizes(operands)
                remember(self._sizes, form, sizes)
            self._check(tensors, sizes)
            made = owned(tensors, [operands[i] for i in self._lent])
        return made[0] if self._single else tuple(made)

    def _take(self, result: Any) -> list[Any]:
        if isinstance(result, Tensor) and self._output == ("leaf", 0):
            return [result]
        tensors: list[Any] = []
        try:
            output = take_tensors(result, tensors)
        except UnsupportedValue:
            output = ()
        if output != self._output:
            found = describe_output(output) if output else f"a {type(result).__name__}"
            raise self._mismatch(found, describe_output(self._output))
        return tensors

    def _check(self, tensors: Sequence[Tensor], sizes: tuple[Any, ...]) -> None:
        for tensor, (dtype, device, dims), size in zip(tensors, self._expected, sizes):  # noqa: B905
            if (
                tensor.dtype is not dtype
                or tensor.device.type != device
                or (tensor.dim() != dims if size is None else tensor.shape != size)
            ):
                raise self._mismatch(
                    f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}",
                    f"a {dtype} tensor of "
                    + (f"{dims} dimensions" if size is None else f"shape {tuple(size)}")
                    + f" on {device}",
                )

    def _mismatch(self, found: str, expected: str) -> RuntimeError:
        return RuntimeError(
            f"kernel {self._kernel} returned {found} for layer {self._layer.layer_name}; expected "
            f"is {expected}"
        )

    def _told_sizes(self, operands: Sequence[Any]) -> tuple[Any, ...]:
        """The sizes that the results must have; None where they cannot be told."""
        try:
            return tuple(torch.Size(r.shape) for r in self._shapes(operands))
        except Exception:
            return (None,) * len(self._expected)

    def _versions(self, operands: Sequence[Any]) -> list[int]:
        """How often torch has written into each operand, where that is counted."""
        tensors = [operands[i] for i in self._tensors]
        return [0 if t.is_inference() else t._version for t in tensors]

    def _check_unwritten(self, before: list[int], operands: Sequence[Any], who: str) -> None:
        for i, old, new in zip(self._tensors, before, self._versions(operands), strict=True):
            if old != new and i not in self._written:
                raise RuntimeError(
                    f"{who} wrote into its operand {self._call.names[i]}, which does not show on "
                    "fake tensors"
                )

    def fake(self, *operands: Any) -> Any:
        """What `forward` returns, with the shapes alone."""
        results = self._shapes(operands)
        made = [torch.empty(r.shape, dtype=r.dtype, device=r.device) for r in results]
        return made[0] if self._single else tuple(made)

    # --- its gradient: the reference's, recomputed --------------------------------------

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = self._tensors
        ctx.save_for_backward(*(inputs[i] for i in tensors))
        ctx.numbers = [None if i in tensors else v for i, v in enumerate(inputs)]

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = list(ctx.numbers)
        for i, tensor in zip(self._tensors, ctx.saved_tensors, strict=True):
            operands[i] = tensor
        needs = list(ctx.needs_input_grad)
        made = iter(self._backward_op(*grads, *operands, needs))
        return tuple(next(made) if needed else None for needed in needs)

    def backward(self, *arguments: Any) -> list[Tensor]:
        """The gradients of the operands that ``needs_grad`` marks, by running the reference."""
        grads, operands, needs = self._split(arguments)
        with torch.enable_grad(), _torch.recording_gradients():
            leaves = [
                v.detach().requires_grad_(needed) if isinstance(v, Tensor) else v
                for v, needed in zip(operands, needs, strict=True)
            ]
            # Aliases, so that a reference that writes into its input does not write into a leaf.
            inputs = [v.view_as(v) if isinstance(v, Tensor) else v for v in leaves]
            before = self._versions(operands)
            results: list[Any] = []
            take_tensors(self._run_reference(inputs), results)
            self._check_unwritten(before, operands, f"the reference of {self._layer.layer_name}")
            pairs = [
                (r, g.to(r.dtype))
                for r, g in zip(results, grads, strict=True)
                if g is not None and r.requires_grad
            ]
            wanted = [v for v, needed in zip(leaves, needs, strict=True) if needed]
            made: Sequence[Tensor | None] = [None] * len(wanted)
            if pairs and wanted:
                made = torch.autograd.grad(
                    [r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
                )
        whole = [
            torch.zeros_like(v, memory_format=torch.contiguous_format) if g is None else g
            for v, g in zip(wanted, made, strict=True)
        ]
        return owned(whole, [a for a in arguments if isinstance(a, Tensor)])

    def backward_fake(self, *arguments: Any) -> list[Tensor]:
        """What `backward` returns, with the shapes alone."""
        _, operands, needs = self._split(arguments)
        return [
            torch.empty(v.shape, dtype=v.dtype, device=v.device)
            for v, needed in zip(operands, needs, strict=True)
            if needed
        ]

    def _split(self, arguments: tuple[Any, ...]) -> tuple[Any, Any, list[bool]]:
        n = len(self._expected)
        return arguments[:n], arguments[n:-1], arguments[-1]


def _define(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def owned(tensors: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` as an op may return them: contiguous, and sharing no memory with ``inputs``
    nor with each other; copied only where they are not."""
    taken = [_extent(t) for t in inputs]
    made = []
    for tensor in tensors:
        tensor = tensor.detach()
        if tensor.is_conj() or tensor.is_neg():  # a sign that is yet to be put into the memory
            tensor = tensor.resolve_conj().resolve_neg()
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        start, end = _extent(tensor)
        if any(start < e and s < end for s, e in taken):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            start, end = _extent(tensor)
        taken.append((start, end))
        made.append(tensor)
    return made


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the memory that ``tensor`` reaches, on whatever device.

    By address and not by storage: an array from another library, over the same memory, comes
    back in a storage of its own.
    """
    if tensor.numel() == 0:
        return 0, 0
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize
