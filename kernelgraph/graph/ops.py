"""Hub layers as custom ops: ``torch.ops.hubkernels.<repository>_<layer>_<commit8>_<form8>``.

A name says which kernel runs, at which commit, and in which form of call (see `Call`): layers
that call a kernel alike share its op. With ``_training`` it is the op for calls through which a
gradient may flow, the only one with an autograd formula; with ``_backward`` what that formula
calls.

The compile caches of torch hold an op's name and not its body. Therefore the names hold
everything that a body depends on: the kernel's commit, the reference's code, the form of the
call, and `LOWERING_VERSION`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelgraph.graph._torch import forgetting_unbacked_symbols
from kernelgraph.graph.call import Call, Runner, Template, digest, put_leaves, take_leaves
from kernelgraph.graph.state import stable_repr
from kernelgraph.hub.loading import code_hash
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible

NAMESPACE = "hubkernels"
LOWERING_VERSION = "1"
"""Counted up whenever this package gives the same op name another body."""

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_lock = threading.Lock()
_lowered: dict[str, Lowered] = {}


@dataclass(frozen=True)
class Lowered:
    """A form of call as a registered op."""

    name: str
    """The op's name in `NAMESPACE`."""
    output: Template
    """What the layer returns; its leaves are the op's results."""


class NoFake(Exception):
    """The shape of a layer's output cannot be told."""


@dataclass(frozen=True)
class _Output:
    """What is known of a result of an op before it runs."""

    dtype: torch.dtype
    device: torch.device
    dim: int


def lower(
    kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[Any], *, training: bool
) -> Lowered:
    """The op that makes ``call`` with ``kernel``, registered if it is not yet.

    Args:
        kernel: The kernel to run.
        layer: The layer that it stands in for: its reference gives the op's gradient.
        call: The form of the call.
        operands: The call's operands, with fake tensors; the fake mode is on.
        training: Whether a gradient may flow through the call.

    Raises:
        NoFake: If neither the layer's ``fake``, nor the kernel, nor the reference runs on fakes.
        UnsupportedValue: If the layer returns anything but tensors in tuples, lists and dicts.
    """
    shapes, fakes, output = _shape_function(kernel, layer, call, operands)
    expected = tuple(_Output(t.dtype, t.device, t.dim()) for t in fakes)
    form = digest(
        LOWERING_VERSION,
        kernel.origin.revision,
        f"{layer.owner.__module__}.{layer.owner.__qualname__}",
        code_hash(layer.reference),
        call.describe(),
        repr([(str(o.dtype), o.device.type, o.dim) for o in expected]),
        repr(output),
    )
    base = f"{kernel_name(kernel)}_{form}"
    lowered = Lowered(f"{base}_training" if training else base, output)
    with _lock:
        if lowered.name not in _lowered:
            op = _KernelOp(kernel, layer, call, shapes, expected, output)
            op.register(base, training=training)
            _lowered[lowered.name] = lowered
    return lowered


def kernel_name(kernel: Kernel) -> str:
    """``<repository>_<layer>_<commit8>``, as an identifier."""
    name = f"{kernel.origin.name}_{kernel.layer.__name__}_{kernel.origin.revision[:8]}"
    # No underscores in front: Inductor writes op names into classes, where Python mangles them.
    name = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_")
    return f"k{name}" if name[0].isdigit() else name


def _shape_function(
    kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[Any]
) -> tuple[Runner, list[Tensor], Template]:
    """The first of the layer's ``fake``, the kernel and the reference that runs on fakes."""
    if layer.fake is not None:
        shapes = Runner(layer.fake, call)
        return (shapes, *_run_fake(shapes, operands))
    errors = []
    for what, forward in (("kernel", kernel.forward), ("reference", layer.reference)):
        shapes = Runner(forward, call)
        try:
            return (shapes, *_run_fake(shapes, operands))
        except Exception as error:
            errors.append(f"the {what}: {type(error).__name__}: {str(error).splitlines()[0:1]}")
    raise NoFake(
        f"the output's shape of layer {layer.layer_name} cannot be told by running it on fake "
        f"tensors; pass fake= where the layer is made extensible ({'; '.join(errors)})"
    )


def _run_fake(shapes: Runner, operands: Sequence[Any]) -> tuple[list[Tensor], Template]:
    tensors: list[Any] = []
    with torch.no_grad(), forgetting_unbacked_symbols():
        output = take_leaves(shapes(operands), tensors)
    if not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError("the layer returns a number, which no custom op can")
    return tensors, output


class _KernelOp:
    """The bodies of the ops of one form of call."""

    def __init__(
        self,
        kernel: Kernel,
        layer: Extensible,
        call: Call,
        shapes: Runner,
        expected: tuple[_Output, ...],
        output: Template,
    ) -> None:
        self._kernel = kernel
        self._layer = layer
        self._call = call
        self._run_shapes = shapes
        self._run_kernel = Runner(kernel.forward, call)
        self._run_reference = Runner(layer.reference, call)
        self._expected = expected
        self._output = output
        self._single = len(expected) == 1

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
        self._backward_op = getattr(getattr(torch.ops, NAMESPACE), f"{base}_backward").default
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
        with torch.no_grad():
            try:
                result = self._run_kernel(operands)
            except Exception as error:
                raise RuntimeError(
                    f"kernel {self._kernel}, called for layer {self._layer.layer_name}, raised "
                    f"{type(error).__name__}: {error}"
                ) from error
            tensors = self._results(result)
            self._check(tensors)
            made = owned(tensors, [operands[i] for i in self._call.tensors])
        return made[0] if self._single else tuple(made)

    def _results(self, result: Any) -> list[Any]:
        if isinstance(result, Tensor) and self._output == ("leaf", 0):
            return [result]
        tensors: list[Any] = []
        if take_leaves(result, tensors) != self._output:
            raise RuntimeError(
                f"kernel {self._kernel} returned {_describe(result)} for layer "
                f"{self._layer.layer_name}, which returns "
                f"{_describe(put_leaves(self._output, ['a tensor'] * len(self._expected)))}"
            )
        return tensors

    def _check(self, tensors: Sequence[Tensor]) -> None:
        for tensor, expected in zip(tensors, self._expected, strict=True):
            if (
                tensor.dtype is not expected.dtype
                or tensor.dim() != expected.dim
                or tensor.device.type != expected.device.type
            ):
                raise RuntimeError(
                    f"kernel {self._kernel} returned a {tensor.dim()}-d {tensor.dtype} tensor on "
                    f"{tensor.device} for layer {self._layer.layer_name}, where its fake says "
                    f"{expected.dim}-d {expected.dtype} on {expected.device}"
                )

    def fake(self, *operands: Any) -> Any:
        """What `forward` returns, with the shapes alone."""
        tensors, _ = _run_fake(self._run_shapes, operands)
        made = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
        return made[0] if self._single else tuple(made)

    # --- its gradient: the reference's, recomputed --------------------------------------

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = self._call.tensors
        ctx.save_for_backward(*(inputs[i] for i in tensors))
        ctx.numbers = [None if i in tensors else v for i, v in enumerate(inputs)]

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = list(ctx.numbers)
        for i, tensor in zip(self._call.tensors, ctx.saved_tensors, strict=True):
            operands[i] = tensor
        needs = list(ctx.needs_input_grad)
        made = iter(self._backward_op(*grads, *operands, needs))
        return tuple(next(made) if needed else None for needed in needs)

    def backward(self, *arguments: Any) -> list[Tensor]:
        """The gradients of the operands that ``needs_grad`` marks, by running the reference."""
        grads, operands, needs = self._split(arguments)
        with torch.enable_grad():
            leaves = [
                v.detach().requires_grad_(needed) if isinstance(v, Tensor) else v
                for v, needed in zip(operands, needs, strict=True)
            ]
            # Aliases, so that a reference that writes into its input does not write into a leaf.
            inputs = [v.view_as(v) if isinstance(v, Tensor) else v for v in leaves]
            results: list[Any] = []
            take_leaves(self._run_reference(inputs), results)
            pairs = [
                (r, g)
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


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return stable_repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
