"""A kernel's ``torch.autograd.Function``, run past autograd: all calls of a form but the first.

Most kernels for training are one function that is called with the operands. Autograd around it
takes longer than many such kernels do. The first call of a form runs on a `Tape`, with autograd,
and tells what the function is and what it saves. In those that follow its ``apply`` is caught: the
function's own ``forward`` is called, and later its ``backward``, with a context of ours. Each time
it is seen, by identity, that the arguments are the operands, that the layer returns what the
function did, and that it saves what it did. A call that is not so goes the long way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Runner, tuple_of
from kernelgraph.graph.gradients.gradient import Source, SourceKind
from kernelgraph.graph.gradients.tape import Tape, laid_out
from kernelgraph.graph.infer import ALIGNMENT, reach

OWN = -1


class Save(NamedTuple):
    """A tensor that a function saves."""

    source: int
    """Which of `Form.sources` it is in, or `OWN`: a tensor that is the kernel's."""
    place: tuple[Any, ...] | None
    """Its shape, strides and offset in the source; None: it is all of it."""


class Form(NamedTuple):
    """What the first call with operands of some sizes and strides tells of those that follow."""

    function: type[Function]
    asked: tuple[bool, ...]
    """Its context's ``needs_input_grad``."""
    arguments: tuple[tuple[int, int], ...]
    """Which of its arguments gradients are wanted of, and which operands these are, in their
    order."""
    shapes: tuple[tuple[Any, ...], ...]
    """The shapes and dtypes of these."""
    results: tuple[tuple[Any, ...], ...]
    """The shapes, dtypes and devices of the results."""
    spans: tuple[int, ...]
    """How many bytes each operand reaches over; 0 for a number."""
    sources: tuple[Source, ...]
    """What the backward is given."""
    strides: tuple[tuple[int, ...], ...]
    """Of each of these."""
    saves: tuple[Save, ...]
    split: bool
    """Whether its forward gets no context, and its ``setup_context`` does."""
    dispatched: bool
    """Whether it is a registered op's, which torch calls only where gradients are recorded."""


def form_of(
    tape: Tape, operands: Sequence[Any], made: Sequence[Tensor], sources: Sequence[Source]
) -> Form | None:
    """What a closed tape tells; None if the call is not that of one function.

    Args:
        tape: The tape of a call.
        operands: What it was called with.
        made: What was given out for its results.
        sources: What the backward is given.
    """
    node: Any = tape.node()
    if node is None or tape.tied or len(tape.roots) != len(made):
        return None
    given = {
        Source(SourceKind.OPERAND, i): v for i, v in enumerate(operands) if isinstance(v, Tensor)
    }
    given |= {Source(SourceKind.RESULT, k): v for k, v in enumerate(made)}
    ends = tape.ends(node)
    function = _torch.function_of(node)
    # An operand that is wanted and not passed has no gradient, which the engine tells.
    if (
        ends is None
        or len(ends) != len(tape.leaves)
        or any(v.numel() == 0 for v in given.values())
        or any(v.is_complex() for v in made)  # whose conjugates are to be resolved
        or "vjp" in vars(function)
        or not catch(function)
    ):
        return None
    saves = []
    for saved in tape.saves:
        if saved.tensor is not None:
            saves.append(Save(OWN, None))
        else:
            whole = given[saved.source]
            place = (saved.shape, saved.stride, saved.offset)
            is_whole = place == (whole.shape, whole.stride(), 0)
            saves.append(Save(sources.index(saved.source), None if is_whole else place))
    asked: tuple[bool, ...] = node.needs_input_grad
    at = [j for j, needed in enumerate(asked) if needed]
    arguments = sorted(zip(at, ends, strict=True), key=lambda pair: pair[1])
    return Form(
        function,
        asked,
        tuple(arguments),
        tuple((operands[i].shape, operands[i].dtype) for _, i in arguments),
        tuple((v.shape, v.dtype, v.device) for v in made),
        tuple(reach(v) if isinstance(v, Tensor) else 0 for v in operands),
        tuple(sources),
        tuple(given[source].stride() for source in sources),
        tuple(saves),
        _torch.splits_forward(function),
        _torch.is_of_op(function),
    )


# --- catching a function's apply ----------------------------------------------------------------


class _Caught(threading.local):
    call: Direct | None = None
    """The call in this thread whose function is to be run past autograd."""


_caught = _Caught()


def catch(function: type[Function]) -> bool:
    """Have `Direct` calls run ``function`` in this thread; anybody else's go on as ever.

    Returns:
        Whether they do: one with an ``apply`` of its own is left alone.
    """
    if "apply" in vars(function):
        return hasattr(vars(function)["apply"], "__kernelgraph__")

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return cls.apply(*args, **kwargs)  # Dynamo knows what this is, and does not come here
        call = _caught.call
        made = None
        if call is not None and cls is call.form.function and not kwargs:
            made = call.run(args)
        return super(function, cls).apply(*args, **kwargs) if made is None else made

    own: Any = classmethod(apply)
    own.__kernelgraph__ = True
    function.apply = own  # type: ignore[method-assign]
    return True


class Context:
    """What a ``torch.autograd.Function`` gets as ``ctx``."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.to_save: Sequence[Any] = ()
        self.saved_tensors: tuple[Any, ...] = ()
        self.materialize_grads = True

    def save_for_backward(self, *tensors: Any) -> None:
        self.to_save = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """For forward mode, which there is none of."""

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """It is known which results these are."""

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize_grads = value

    # mark_dirty is not here: a call that writes into its operands goes the long way.


class Direct:
    """One call of a function past autograd, and its backward."""

    __slots__ = ("context", "form", "inputs", "kept", "outputs")

    def __init__(self, form: Form, inputs: tuple[Any, ...]) -> None:
        self.form = form
        self.inputs = inputs
        """The operands, as the forward gets them."""
        self.context: Context | None = None
        self.outputs: Any = None
        self.kept: list[Any] = []
        """What the kernel saved that is its own; None for what is another's."""

    def run(self, args: tuple[Any, ...]) -> Any:
        """What the function returns; None if it is not called as in the first call."""
        form, inputs = self.form, self.inputs
        if self.context is not None or len(args) != len(form.asked):
            return None
        for argument, operand in form.arguments:
            if args[argument] is not inputs[operand]:
                return None
        for value, asked in zip(args, form.asked, strict=True):
            if not asked and isinstance(value, Tensor) and value.requires_grad:
                return None
        function: Any = form.function
        self.context = context = Context(form.asked)
        was = torch.is_grad_enabled()
        _torch.set_grad_enabled(False)
        try:
            if form.split:
                self.outputs = function.forward(*args)
                function.setup_context(context, args, self.outputs)
            else:
                self.outputs = function.forward(context, *args)
        finally:
            _torch.set_grad_enabled(was)
        return self.outputs

    def close(self, results: Sequence[Tensor] | None, starts: Sequence[int]) -> Any:
        """The results to give out; None if the call was not as the first.

        Args:
            results: What the layer returned.
            starts: The addresses of the operands; 0 for a number.
        """
        form, context = self.form, self.context
        if results is None or context is None:
            return None
        outputs = self.outputs if isinstance(self.outputs, tuple) else (self.outputs,)
        if len(results) != len(form.results) or len(outputs) != len(results):
            return None
        ranges = []
        for result, output, (shape, dtype, _) in zip(results, outputs, form.results, strict=True):
            fits = result is output and type(result) is Tensor and result.shape == shape
            if not (fits and result.dtype is dtype and result.is_contiguous()):
                return None
            first = result.data_ptr()
            if result.storage_offset() or first % ALIGNMENT:
                return None
            last = first + result.nbytes
            for start, span in zip(starts, form.spans, strict=True):
                if first < start + span and start < last:
                    return None
            ranges.append((first, last))
        if len(ranges) > 1 and any(b > c for (_, b), (c, _) in pairwise(sorted(ranges))):
            return None
        saved, context.to_save = context.to_save, ()
        if len(saved) != len(form.saves) or not self._keep(saved, results, starts, ranges):
            return None
        self.inputs, self.outputs = (), None
        return [result.detach() if result._is_view() else result for result in results]

    def _keep(
        self,
        saved: Sequence[Any],
        results: Sequence[Tensor],
        starts: Sequence[int],
        ranges: Sequence[tuple[int, int]],
    ) -> bool:
        """Keep what is the kernel's own; whether all that it saved is as in the first call."""
        form, kept = self.form, self.kept
        for tensor, (source, place) in zip(saved, form.saves, strict=True):
            if source == OWN:
                if not isinstance(tensor, Tensor):
                    return False
                at = tensor.data_ptr()
                for start, span in zip(starts, form.spans, strict=True):
                    if start <= at < start + span:
                        return False
                for first, last in ranges:
                    if first <= at < last:
                        return False
                kept.append(tensor)
                continue
            what, i = form.sources[source]
            whole = self.inputs[i] if what is SourceKind.OPERAND else results[i]
            if place is None:
                same = tensor is whole or _is_at(tensor, whole, (whole.shape, whole.stride(), 0))
            else:
                same = _is_at(tensor, whole, place)
            if not same:
                return False
            kept.append(None)
        return True

    def gradients(
        self, grads: Sequence[Tensor | None], given: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """As `Tape.gradients`; ``given`` is as `Form.sources`."""
        form, context = self.form, self.context
        assert context is not None
        if tuple([tensor.stride() for tensor in given]) != form.strides:
            given = [laid_out(t, s) for t, s in zip(given, form.strides, strict=True)]
        saved = []
        for own, (source, place) in zip(self.kept, form.saves, strict=True):
            if source == OWN:
                saved.append(own)
            elif place is None:
                saved.append(given[source])
            else:
                shape, stride, offset = place
                whole = given[source]
                saved.append(whole.as_strided(shape, stride, whole.storage_offset() + offset))
        if context.materialize_grads and [g for g in grads if g is None]:
            grads = [
                torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient
                for gradient, (shape, dtype, device) in zip(grads, form.results, strict=True)
            ]
        context.saved_tensors = tuple(saved)
        was = torch.is_grad_enabled()
        _torch.set_grad_enabled(False)
        try:
            made = form.function.backward(context, *grads)
        finally:
            _torch.set_grad_enabled(was)
            context.saved_tensors = ()
        made = made if isinstance(made, tuple) else (made,)
        found = []
        for (j, i), (shape, dtype) in zip(form.arguments, form.shapes, strict=True):
            if needs[i]:
                gradient = made[j]
                if gradient is not None and (
                    gradient.dtype is not dtype or gradient.shape != shape
                ):  # as the engine makes it fit
                    gradient = gradient.to(dtype).sum_to_size(shape)
                found.append(gradient)
        return found


def _is_at(tensor: Any, whole: Tensor, place: tuple[Any, ...]) -> bool:
    shape, stride, offset = place
    return (
        isinstance(tensor, Tensor)
        and tensor.data_ptr() - whole.data_ptr() == offset * whole.itemsize
        and tensor.dtype is whole.dtype
        and tensor.shape == shape
        and tensor.stride() == stride
    )


# --- the forward op -----------------------------------------------------------------------------


def recording(
    runner: Runner,
    wanted: Sequence[bool],
    *,
    table: dict[Any, Form | None],
    first: Callable[..., Any],
    taken: Callable[[Any], Sequence[Tensor] | None],
    kept: Callable[[Direct], Tensor],
) -> Callable[..., Any]:
    """The forward of an op whose gradient is the kernel's own. For a norm with a weight it reads::

        def written(a0, a1):
            form = (inference(), a0.shape, a0.stride(), a0.is_inference(), a1.shape, ..., )
            known = table.get(form)
            if known is None or is_grad_enabled():
                return first(form, (a0, a1, ))
            o0 = a0
            a0 = o0.detach()
            a0.requires_grad = True
            ...
            call = Direct(known, (a0, a1, ))
            caught.call = call
            ...  # the call, see `Runner`
            results = call.close(taken(result), (o0.data_ptr(), o1.data_ptr(), ))
            if results is None:
                table[form] = None
                return first(form, (o0, o1, ))
            return (*results, kept(call))

    Args:
        runner: Calls the kernel.
        wanted: Of which operands gradients are wanted.
        table: What is known of a form of call; None of one that goes the long way.
        first: ``(form, operands)``: goes the long way.
        taken: The tensors of what the kernel returned; None if they are not as they should be.
        kept: Gives the handle that a call is kept under.
    """
    operands, tensors = runner.operands, runner.call.tensors
    every = tuple_of(operands)
    originals = tuple_of(f"o{i}" if i in tensors else a for i, a in enumerate(operands))
    key = [f"a{i}.{what}" for i in tensors for what in ("shape", "stride()", "is_inference()")]
    key += [a for i, a in enumerate(operands) if i not in tensors]
    before = [
        f"form = {tuple_of(['inference()', *key])}",
        "known = table.get(form)",
        "if known is None or is_grad_enabled():",
        f"    return first(form, {every})",
    ]
    for i in tensors:
        before += [f"o{i} = a{i}", f"a{i} = o{i}.detach()"]
        before += [f"a{i}.requires_grad = True"] if wanted[i] else []
    before += [f"call = Direct(known, {every})", "outer = caught.call", "caught.call = call"]
    before += ["recorded = begin_recording() if known.dispatched else None"]
    starts = tuple_of(f"o{i}.data_ptr()" if i in tensors else "0" for i in range(len(operands)))
    after = [
        f"results = call.close(taken(result), {starts})",
        "if results is None:",
        "    table[form] = None",
        f"    return first(form, {originals})",
        "return (*results, kept(call))",
    ]
    names: dict[str, Any] = {"table": table, "first": first, "taken": taken, "kept": kept}
    names |= {"Direct": Direct, "caught": _caught, "inference": torch.is_inference_mode_enabled}
    names["is_grad_enabled"] = torch.is_grad_enabled
    names |= {"begin_recording": _torch.begin_recording, "end_recording": _torch.end_recording}
    always = ["caught.call = outer", "recorded is None or end_recording(recorded)"]
    # What it raises, it raises again the long way, or it does not like the context.
    made: Callable[..., Any] = runner.around(before, "result = None", after, names, always=always)
    return made
