"""Calls of a kernel's ``torch.autograd.Function`` past autograd.

Most kernels for training are one function that is called with the operands. Autograd around it
takes longer than many such kernels do. The first call with operands of some sizes and strides runs
on a `Tape`, with autograd, and tells which function it is and what it saves. In the calls that
follow, its ``apply`` is intercepted: its own ``forward`` is called, and later its ``backward``,
with a `Context` in place of autograd's. Each call is checked, by identity: the arguments must be
the operands, the layer must return what the function returned, and the function must save what it
saved in the first call. A call that differs is made again on a tape.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Runner, tuple_of
from kernelgraph.graph.gradients.function_calls import (
    PRIVATE,
    FunctionCallSpec,
    describe_function_call,
    is_view_at,
)
from kernelgraph.graph.gradients.gradient import Source, SourceKind
from kernelgraph.graph.gradients.tape import Tape, with_strides
from kernelgraph.graph.infer import ALIGNMENT


def bypass_spec(
    tape: Tape, operands: Sequence[object], made: Sequence[Tensor], sources: Sequence[Source]
) -> FunctionCallSpec | None:
    """Describe the call on a closed tape, and have its function's ``apply`` intercepted.

    Args:
        tape, operands, made, sources: As `describe_function_call` takes them.

    Returns:
        None if such calls cannot be made past autograd.
    """
    spec = describe_function_call(tape, operands, made, sources)
    return spec if spec is not None and intercept_apply(spec.function) else None


# --- intercepting a function's apply ------------------------------------------------------------


class _Interception(threading.local):
    call: BypassedCall | None = None
    """The call in this thread whose function is to run past autograd."""


_interception = _Interception()


def intercept_apply(function: type[Function]) -> bool:
    """Route calls of ``function`` within a `BypassedCall` to that call; others stay as they are.

    Returns:
        False for a function with an ``apply`` of its own, which is left alone.
    """
    if "apply" in vars(function):
        return hasattr(vars(function)["apply"], "__kernelgraph__")

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return cls.apply(*args, **kwargs)  # Dynamo replaces this call, and never enters it
        call = _interception.call
        made = None
        if call is not None and cls is call.spec.function and not kwargs:
            made = call.run(args)
        return super(function, cls).apply(*args, **kwargs) if made is None else made

    own: Any = classmethod(apply)
    own.__kernelgraph__ = True
    function.apply = own  # type: ignore[method-assign]
    return True


class Context:
    """The ``ctx`` that a ``torch.autograd.Function`` receives in a `BypassedCall`."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.to_save: Sequence[object] = ()
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.materialize_grads = True

    def save_for_backward(self, *tensors: object) -> None:
        self.to_save = tensors

    def save_for_forward(self, *tensors: object) -> None:
        """Do nothing: there is no forward mode here."""

    def mark_non_differentiable(self, *tensors: object) -> None:
        """Do nothing: the first call has shown which results these are."""

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize_grads = value

    # mark_dirty is missing: a call that writes into its operands is made again on a tape.


# --- one call, and its backward -----------------------------------------------------------------


class BypassedCall:
    """One call of a function past autograd, and its backward."""

    __slots__ = ("context", "inputs", "kept", "outputs", "spec")

    def __init__(self, spec: FunctionCallSpec, inputs: tuple[Any, ...]) -> None:
        self.spec = spec
        self.inputs = inputs
        """The operands, as the forward receives them."""
        self.context: Context | None = None
        self.outputs: Any = None
        self.kept: list[Tensor | None] = []
        """For each tensor that the kernel saved: the tensor if it is private, else None."""

    def run(self, args: tuple[object, ...]) -> Any:
        """Call the function's forward; return None if ``args`` are not those of the first call."""
        spec, inputs = self.spec, self.inputs
        needs_input_grad = spec.needs_input_grad
        if self.context is not None or len(args) != len(needs_input_grad):
            return None
        for wanted in spec.arguments:
            if args[wanted.argument] is not inputs[wanted.operand]:
                return None
        for value, needed in zip(args, needs_input_grad, strict=True):
            if not needed and isinstance(value, Tensor) and value.requires_grad:
                return None
        function: Any = spec.function
        self.context = context = Context(needs_input_grad)
        was = torch.is_grad_enabled()
        _torch.set_grad_enabled(False)
        try:
            if spec.has_setup_context:
                self.outputs = function.forward(*args)
                function.setup_context(context, args, self.outputs)
            else:
                self.outputs = function.forward(context, *args)
        finally:
            _torch.set_grad_enabled(was)
        return self.outputs

    def close(self, results: Sequence[Tensor] | None, starts: Sequence[int]) -> list[Tensor] | None:
        """Return the results for the caller; None if the call differs from the first one.

        Args:
            results: The tensors that the layer returned.
            starts: The addresses of the operands; 0 for a number.
        """
        spec, context = self.spec, self.context
        if results is None or context is None:
            return None
        outputs = self.outputs if isinstance(self.outputs, tuple) else (self.outputs,)
        if len(results) != len(spec.results) or len(outputs) != len(results):
            return None
        ranges = []
        for result, output, expected, strides in zip(
            results, outputs, spec.results, spec.result_strides, strict=True
        ):
            fits = result is output and type(result) is Tensor and result.shape == expected.shape
            if not (fits and result.dtype is expected.dtype and result.stride() == strides):
                return None
            first = result.data_ptr()
            if result.storage_offset() or first % ALIGNMENT:
                return None
            last = first + result.nbytes
            for start, span in zip(starts, spec.spans, strict=True):
                if first < start + span and start < last:
                    return None
            ranges.append((first, last))
        if len(ranges) > 1 and any(b > c for (_, b), (c, _) in pairwise(sorted(ranges))):
            return None
        saved, context.to_save = context.to_save, ()
        if len(saved) != len(spec.saved) or not self._keep(saved, results, starts, ranges):
            return None
        self.inputs, self.outputs = (), None
        return [result.detach() if result._is_view() else result for result in results]

    def _keep(
        self,
        saved: Sequence[object],
        results: Sequence[Tensor],
        starts: Sequence[int],
        ranges: Sequence[tuple[int, int]],
    ) -> bool:
        """Keep the private tensors; return whether the kernel saved the same as in the first
        call."""
        spec, kept = self.spec, self.kept
        for tensor, expected in zip(saved, spec.saved, strict=True):
            if expected.source == PRIVATE:
                if not isinstance(tensor, Tensor):
                    return False
                address = tensor.data_ptr()
                for start, span in zip(starts, spec.spans, strict=True):
                    if start <= address < start + span:
                        return False
                for first, last in ranges:
                    if first <= address < last:
                        return False
                kept.append(tensor)
                continue
            kind, number = spec.sources[expected.source]
            whole = self.inputs[number] if kind is SourceKind.OPERAND else results[number]
            view = expected.view
            if view is None:
                same = tensor is whole or is_view_at(tensor, whole, whole.shape, whole.stride(), 0)
            else:
                same = is_view_at(tensor, whole, view.shape, view.stride, view.offset)
            if not same:
                return False
            kept.append(None)
        return True

    def gradients(
        self, grads: Sequence[Tensor | None], given: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Run the backward as `Tape.gradients` does.

        Args:
            grads: The gradients of the results.
            given: The tensors of `FunctionCallSpec.sources`.
            needs: For each operand, whether its gradient is wanted now.
        """
        spec, context = self.spec, self.context
        assert context is not None
        if context.materialize_grads and [g for g in grads if g is None]:
            grads = [
                torch.zeros(r.shape, dtype=r.dtype, device=r.device)
                if gradient is None
                else gradient
                for gradient, r in zip(grads, spec.results, strict=True)
            ]
        context.saved_tensors = self._saved_tensors(given)
        was = torch.is_grad_enabled()
        _torch.set_grad_enabled(False)
        try:
            made = spec.function.backward(context, *grads)
        finally:
            _torch.set_grad_enabled(was)
            context.saved_tensors = ()
        made = made if isinstance(made, tuple) else (made,)
        found = []
        for wanted in spec.arguments:
            if needs[wanted.operand]:
                gradient = made[wanted.argument]
                if gradient is not None and (
                    gradient.dtype is not wanted.dtype or gradient.shape != wanted.shape
                ):  # as autograd's engine does
                    gradient = gradient.to(wanted.dtype).sum_to_size(wanted.shape)
                found.append(gradient)
        return found

    def _saved_tensors(self, given: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        spec = self.spec
        if tuple([tensor.stride() for tensor in given]) != spec.source_strides:
            given = [with_strides(t, s) for t, s in zip(given, spec.source_strides, strict=True)]
        saved: list[Tensor | None] = []
        for private, expected in zip(self.kept, spec.saved, strict=True):
            if expected.source == PRIVATE:
                saved.append(private)
                continue
            whole, view = given[expected.source], expected.view
            if view is not None:
                offset = whole.storage_offset() + view.offset
                whole = whole.as_strided(view.shape, view.stride, offset)
            saved.append(whole)
        return tuple(saved)


# --- the forward op -----------------------------------------------------------------------------


def bypassing_forward(
    runner: Runner,
    wanted: Sequence[bool],
    *,
    specs: dict[object, FunctionCallSpec | None],
    first_call: Callable[..., object],
    tensors_of: Callable[[object], Sequence[Tensor] | None],
    keep: Callable[[BypassedCall], Tensor],
) -> Callable[..., object]:
    """Write the forward of an op whose gradient is the kernel's own.

    For a norm with a weight it reads::

        def written(a0, a1):
            key = (inference(), a0.shape, a0.stride(), a0.is_inference(), a1.shape, ..., )
            spec = specs.get(key)
            if spec is None or is_grad_enabled():
                return first_call(key, (a0, a1, ))
            o0 = a0
            a0 = o0.detach()
            a0.requires_grad = True
            ...
            call = BypassedCall(spec, (a0, a1, ))
            outer = interception.call
            interception.call = call
            ...  # the call, see `Runner`
            results = call.close(tensors_of(result), (o0.data_ptr(), o1.data_ptr(), ))
            if results is None:
                specs[key] = None
                return first_call(key, (o0, o1, ))
            return (*results, keep(call))

    Args:
        runner: Calls the kernel.
        wanted: For each operand, whether its gradient is wanted.
        specs: The specs of calls, by the sizes and strides of their operands; None for calls that
            always go to ``first_call``.
        first_call: ``(key, operands)``: makes a call on a tape.
        tensors_of: Returns the tensors of a result of the kernel; None if it has an unexpected
            structure.
        keep: Keeps a call for its backward, and returns its handle.
    """
    operands, tensors = runner.operands, runner.call.tensors
    every = tuple_of(operands)
    originals = tuple_of(f"o{i}" if i in tensors else a for i, a in enumerate(operands))
    key = [f"a{i}.{what}" for i in tensors for what in ("shape", "stride()", "is_inference()")]
    key += [a for i, a in enumerate(operands) if i not in tensors]
    before = [
        f"key = {tuple_of(['inference()', *key])}",
        "spec = specs.get(key)",
        "if spec is None or is_grad_enabled():",
        f"    return first_call(key, {every})",
    ]
    for i in tensors:
        before += [f"o{i} = a{i}", f"a{i} = o{i}.detach()"]
        before += [f"a{i}.requires_grad = True"] if wanted[i] else []
    before += [f"call = BypassedCall(spec, {every})"]
    before += ["outer = interception.call", "interception.call = call"]
    before += ["recorded = begin_recording() if spec.is_registered_op else None"]
    starts = tuple_of(f"o{i}.data_ptr()" if i in tensors else "0" for i in range(len(operands)))
    after = [
        f"results = call.close(tensors_of(result), {starts})",
        "if results is None:",
        "    specs[key] = None",
        f"    return first_call(key, {originals})",
        "return (*results, keep(call))",
    ]
    names: dict[str, object] = {"specs": specs, "first_call": first_call}
    names |= {"tensors_of": tensors_of, "keep": keep}
    names |= {"BypassedCall": BypassedCall, "interception": _interception}
    names |= {"inference": torch.is_inference_mode_enabled}
    names |= {"is_grad_enabled": torch.is_grad_enabled}
    names |= {"begin_recording": _torch.begin_recording, "end_recording": _torch.end_recording}
    always = ["interception.call = outer", "recorded is None or end_recording(recorded)"]
    # An error counts as a call that differs: on the tape it is raised again, unless the
    # `Context` has caused it.
    return runner.around(before, "result = None", after, names, always=always)
