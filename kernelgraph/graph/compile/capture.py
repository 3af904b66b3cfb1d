"""Capture: a call of an extensible layer becomes one custom-op node while Dynamo traces it.

The ``forward`` of an extensible class is wrapped (by `adopt`, or per instance by ``kernelize``) in
a function that outside of Dynamo only runs what it wraps. Traced by Dynamo, the wrapper

1. asks `kernelgraph_begin` whether a kernel stands in for this layer here; where none does, it
   runs on into the reference, so that the graph is what it would be without kernelgraph;
2. reads the tensors that the kernel needs of the layer, which so become inputs of the graph;
3. asks `kernelgraph_finish` for the op of a call with this signature, and calls it.

These two run as ordinary Python at trace time, and see and set the traced frame's variables
through `Frame`. The Python values that their answers depend on are guarded, and so is what the
mapping has for the layers.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kernelgraph.graph import _torch
from kernelgraph.graph._torch import Frame
from kernelgraph.graph.autotune import (
    Implementation,
    UntunedCall,
    Winner,
    known_winner,
    session_of,
    tuning_key,
)
from kernelgraph.graph.calls import Call, Path, State, UnsupportedValue, read
from kernelgraph.graph.compile.trace import BegunCall, Trace
from kernelgraph.graph.gradients import Gradient
from kernelgraph.graph.lowering import (
    KERNEL_ATTRIBUTE,
    KeepReference,
    Policy,
    Site,
    check_untransformed,
    decision_of,
    kernelized_with,
    op_caller,
    state_reader,
)
from kernelgraph.graph.ops import Lowered, overload
from kernelgraph.graph.timing import InferenceCall
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible, extensible
from kernelgraph.report import Reason

Forward = Callable[..., Any]
Arguments = tuple[object, object]
"""The positional and the keyword arguments of a call, as far as Dynamo knows them."""


# --- wrapping --------------------------------------------------------------------------------


def adopt(cls: type[nn.Module]) -> bool:
    """Wrap the forward of an extensible class so that Dynamo captures its calls as ops.

    The forward is wrapped in the class that defines it. Otherwise a class would get a forward of
    its own, which could come before that of another class in the method resolution order.

    Returns:
        Whether the forward was wrapped now: it was not yet, and the class is extensible.
    """
    definer = next(base for base in cls.__mro__ if "forward" in vars(base))
    forward = vars(definer)["forward"]
    if extensible(cls) is None or not inspect.isfunction(forward):
        return False
    if hasattr(forward, _REFERENCE_ATTRIBUTE):
        return False
    setattr(definer, "forward", _captured(forward))  # noqa: B010 (a class without a type for it)
    return True


def kernelized_forward(kernel: Kernel, layer: Extensible, eager: Forward) -> Forward:
    """Return the forward that ``kernelize`` puts on an instance for compiling.

    Args:
        kernel: The kernel, whose calls any backend of torch.compile captures.
        layer: The layer that it stands in for.
        eager: Runs where nothing is compiling.
    """
    return _captured(layer.reference, kernel, eager)


_REFERENCE_ATTRIBUTE = "__kernelgraph_reference__"
"""The attribute in which a wrapper keeps the forward that it wraps."""
_references: weakref.WeakValueDictionary[str, Forward] = weakref.WeakValueDictionary()
"""The forwards that are wrapped, by the keys that their wrappers pass to `kernelgraph_begin`."""
_count = itertools.count()


def _captured(
    reference: Forward, kernel: Kernel | None = None, eager: Forward | None = None
) -> Forward:
    """Return a wrapper, whose calls are captured, of ``reference`` or of a kernel in its place."""
    eager = eager or reference
    # A text, which Dynamo takes for a constant; a number it may take for one that changes.
    key = f"{reference.__module__}.{reference.__qualname__} {next(_count)}"
    _references[key] = reference

    def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return eager(module, *args, **kwargs)
        # `kernelgraph_begin` and `kernelgraph_finish`, which Dynamo calls at trace time, find the
        # variables by name. They set `read`, `op` and `call` to functions that are written for the
        # layer, since loops take Dynamo long; and `traced` to the forward of a kernel that is to be
        # traced.
        read: Any = None
        op: Any = None
        call: Any = None
        traced: Any = reference
        if not kernelgraph_begin(key):
            return traced(module, *args, **kwargs)
        state = read(module)
        constants = kernelgraph_finish()
        if constants is None:
            return reference(module, *args, **kwargs)
        return call(op, args, kwargs, state, constants)

    # Dynamo counts recompiles by code object, and keeps by a code's name which sizes are dynamic:
    # so each layer's wrapper has code and a name of its own, as the forward that it wraps has.
    code = forward.__code__.replace(co_name=reference.__qualname__)
    own = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    functools.update_wrapper(own, reference)
    setattr(own, _REFERENCE_ATTRIBUTE, reference)
    setattr(own, KERNEL_ATTRIBUTE, kernel)
    return own


# --- at trace time ---------------------------------------------------------------------------


# Dynamo puts what these two return among the globals of the user's module, under their names.
@_torch.at_trace_time
def kernelgraph_begin(key: str) -> bool:
    """Decide for the call being traced, and set its `read`, which reads the tensors of the layer.

    Returns:
        Whether an op is used; False where `traced` is to be traced.
    """
    frame = Frame()
    module = frame.value("module")
    layer = extensible(type(module))
    if layer is None or layer.reference is not _references[key]:  # reached through super()
        return False
    try:
        trace = Trace.of(frame)
        if not trace.uses_mapping and kernelized_with(module) is None:
            return False
        checkpointed = _CHECKPOINT in frame.around
        site = Site(module, layer, _path(module, frame), checkpointed=checkpointed)
        return _begin(frame, trace, site)
    except Exception as error:
        raise frame.backend_error(error) from error


def _begin(frame: Frame, trace: Trace, site: Site) -> bool:
    try:
        if site.layer.condition is not None:
            frame.guard_identity("module")
        arguments = frame.peek("args"), frame.peek("kwargs")
        site, kernel, state = trace.decisions.kernel_for(site, _torch.tensors_in(arguments))
        _check_surroundings(frame, site)
        _check_settled(frame, site, state)
        key, winner = _known_winner(trace, site, state, arguments)
        if winner is not None:
            if winner.implementation is Implementation.REFERENCE:
                reason = Reason.SLOWER if winner.measured else Reason.POLICY
                raise KeepReference(site, reason, winner.why)
            if winner.kernel:  # it is not the first kernel, which `kernel_for` returned
                kernel, state = trace.decisions.kernel_at(site, winner.kernel)
            if winner.implementation is Implementation.NATIVE:
                frame.set_callable("traced", kernel.forward)
                why = f"traced; {winner.why}"
                trace.record(site.decision(Reason.KERNEL, str(kernel), why))
                return False
        _guard(frame, state)
    except KeepReference as kept:
        trace.keep_reference(frame, kept.decision)
        return False
    except NotImplementedError as error:
        trace.keep_reference(frame, site.decision(Reason.NOT_AN_OP, "", str(error)))
        return False
    trace.begun = BegunCall(site, kernel, state, key, winner)
    frame.set_callable("read", state_reader(state.tensors))
    return True


def _known_winner(
    trace: Trace, site: Site, state: State, arguments: Arguments
) -> tuple[str, Winner | None]:
    """Return the tuning key of a call and the winner for it; no key where nothing is tuned."""
    options = trace.decisions.options
    if options.policy != Policy.FASTEST or kernelized_with(site.module) is not None:
        return "", None
    session = session_of(_torch.current_graph()[1], options.measure_seconds)
    kernels = trace.decisions.kernels(site)
    key = tuning_key(site, kernels, state, arguments, options)
    return key, known_winner(key, len(kernels), session)


_CHECKPOINT = "tag_activation_checkpoint"
"""The higher-order op of activation checkpointing."""
_AS_THEY_ARE = (_CHECKPOINT, "invoke_subgraph")
"""The higher-order ops that run their subgraphs as they are; the second is that of
``torch.compiler.nested_compile_region``."""
_FLEX = "flex_attention"
"""The higher-order op whose subgraphs run for single numbers."""


def _check_surroundings(frame: Frame, site: Site) -> None:
    """Check that what is around a call leaves an op in its place as it is.

    Raises:
        KeepReference: If it is differentiated or batched otherwise than by autograd. A loop may
            even come to need a gradient in its second round only.
    """
    check_untransformed(site)
    for name in frame.around:
        if name == _FLEX or (name not in _AS_THEY_ARE and torch.is_grad_enabled()):
            why = f"it is inside of {name}" + (", where gradients are wanted" * (name != _FLEX))
            raise KeepReference(site, Reason.NOT_AN_OP, why)


def _check_settled(frame: Frame, site: Site, state: State) -> None:
    """Check that the real layer has the state that the traced code would find.

    Raises:
        KeepReference: If that code has set an attribute that the call depends on, or changed a
            container.
    """
    for item, attribute in _holders(site.module, state):
        if frame.is_pending(item, attribute):
            what = f"self.{attribute}" if attribute else f"a {type(item).__name__} of the layer"
            why = f"{what} is set in the graph, before the call"
            raise KeepReference(site, Reason.NOT_AN_OP, why)
    if site.layer.condition is not None and frame.is_pending(site.module):
        raise KeepReference(site, Reason.CONDITION, "the layer is changed in the graph")


def _holders(module: nn.Module, state: State) -> Iterator[tuple[object, str | None]]:
    """Yield the objects that a call's state is read from, each with the name of an attribute, or
    None where the call depends on the object as a whole."""
    paths = [*state.operands, *(path for path, _ in (*state.constants, *state.nodes))]
    for path in (*paths, *state.absent, *(path for path, _ in state.untaken)):
        if path:
            owner, step = read(module, path[:-1]), path[-1]
            yield (owner, step) if isinstance(step, str) else (owner, None)
    yield from ((read(module, path), None) for path, _ in state.whole)
    for path, _ in state.constants:
        yield from _containers(read(module, path))


def _containers(value: object) -> Iterator[tuple[object, None]]:
    if isinstance(value, (list, tuple, set, dict)):
        yield value, None
        for part in value.values() if isinstance(value, dict) else value:
            yield from _containers(part)


def _guard(frame: Frame, state: State) -> None:
    """Guard what a call depends on besides tensors."""
    frame.guard_no_forward_mode()
    for path, value in state.values:
        frame.guard("module", path, value)
    for path in state.types:
        frame.guard_type("module", path)
    for path, check in state.checks:
        frame.guard_check("module", path, check)


@_torch.at_trace_time
def kernelgraph_finish() -> tuple[object, ...] | None:
    """Make an op for the call that was begun, its state now read, and set its `op` and `call`.

    Returns:
        The constants of `call` (see `op_caller`); None where the reference is kept after all.
    """
    frame = Frame()
    trace = Trace.of(frame)
    assert trace.begun is not None, "finish without begin"
    site, kernel, state, _, _ = begun = trace.begun
    try:
        args, kwargs, values = (frame.fakes(name) for name in ("args", "kwargs", "state"))
        with frame.fake_mode():
            call, operands = Call.of(state, values, site.layer, args, kwargs)
            lowered, gradient = trace.op_for(site, kernel, call, operands, trace.decisions.options)
        if lowered.written and site.grad and frame.around:
            raise UnsupportedValue("the layer writes, and a checkpoint around it repeats the call")
    except KeepReference as kept:
        trace.keep_reference(frame, kept.decision)
        return None
    except (UnsupportedValue, NotImplementedError) as error:
        trace.keep_reference(frame, site.decision(Reason.NOT_AN_OP, "", str(error)))
        return None
    except Exception as error:
        raise frame.backend_error(error) from error
    _record(trace, begun, call, operands, lowered, gradient)
    return _set_op(frame, state, call, operands, lowered)


def _record(
    trace: Trace,
    begun: BegunCall,
    call: Call,
    operands: Sequence[object],
    lowered: Lowered,
    gradient: Gradient | None,
) -> None:
    """Record the decision for a call that becomes an op, and what the backend needs of the call.

    The backend tunes calls without a winner, and runs ops for inference before CUDA graphs.
    """
    site, kernel, _, key, winner = begun
    decision = decision_of(site, kernel, lowered, gradient)
    if winner is not None:
        decision = decision._replace(detail=winner.why)
    elif key:
        kernels, options = trace.decisions.kernels(site), trace.decisions.options
        untuned = UntunedCall(site, kernels, call, operands, lowered, gradient, options)
        trace.untuned.setdefault(key, untuned)
        trace.keys[len(trace.decisions.decisions)] = key
    trace.record(decision)
    if not site.grad:
        inference_call = InferenceCall(site.module, call, operands, lowered.packed)
        trace.inference_calls[lowered.name] = inference_call


def _set_op(
    frame: Frame, state: State, call: Call, operands: Sequence[object], lowered: Lowered
) -> tuple[object, ...]:
    """Set the `op` and the `call` of a frame; return the constants of `call`."""
    arguments: list[Path | float] = [*call.argument_paths]
    for i, operand in enumerate(operands[: len(arguments)]):
        if isinstance(operand, float):  # it may be a symbol there, which no op takes
            arguments[i] = operand
    numbers = [number for _, number in state.numbers]
    function, constants = op_caller(lowered, arguments, len(state.tensors), numbers)
    frame.set_callable("op", overload(lowered.name))
    frame.set_callable("call", function)
    return constants


# --- the layer's path ------------------------------------------------------------------------


_paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""The paths of modules in earlier traces."""


def _path(module: nn.Module, frame: Frame) -> str:
    """Return the path of a module.

    Behind a graph break Dynamo traces a module's forward for itself, and knows no path. There it is
    the path of the trace that the graph break has ended.
    """
    if path := module_path(frame.module_stack):
        _paths[module] = path
    return path or _paths.get(module, "")


def module_path(stack: Mapping[str, tuple[str, type]]) -> str:
    """Return the path, as in ``named_modules()``, of the innermost module in an FX module stack."""
    if not stack:
        return ""
    # With a __getattr__ of the module's own, Dynamo traces the access to its submodules.
    path = re.sub(r"\.__dict__\['_modules'\]\['(.*?)'\]", r".\1", list(stack.values())[-1][0])
    # Dynamo names the root by the local variable or the global that it was found in. A function
    # that was made a layer is a global too, and has no path but its name.
    root = re.match(r"[LG]\['(\w+)'\]\.?", path)
    below = path[root.end() :] if root else path
    return below or (root[1] if root and len(stack) > 1 else "")
