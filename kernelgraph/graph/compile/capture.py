"""Capture: a call of an extensible layer becomes one custom-op node while Dynamo traces it.

An extensible class's ``forward`` is wrapped (`adopt`, or per instance by ``kernelize``) in a
function that outside of Dynamo only runs what it wraps. Traced by Dynamo, it

1. asks `kernelgraph_begin` whether a kernel stands in for this layer here; where none does it
   runs on into the reference, so the graph is what it would have been;
2. reads the tensors that the kernel needs of the layer, which so become inputs of the graph;
3. asks `kernelgraph_finish` for the op of a call of this form, and calls it.

These two run as ordinary Python at trace time, and see and set the traced frame's variables
through `Frame`. The Python values that their answers depend on are guarded; the mapping is not: it
counts as it is when the graph is traced.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kernelgraph.graph import _torch
from kernelgraph.graph._torch import Frame
from kernelgraph.graph.autotune import (
    NATIVE,
    REFERENCE,
    Choice,
    OpCall,
    Pending,
    kind_of,
    known,
    session_of,
)
from kernelgraph.graph.calls import Call, Path, State, UnsupportedValue
from kernelgraph.graph.compile.trace import Begun, Trace
from kernelgraph.graph.lowering import (
    KERNEL,
    KeepReference,
    Site,
    decision_of,
    kernelized_with,
    op_call,
    reader,
)
from kernelgraph.graph.ops import overload
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible, extensible
from kernelgraph.report import Reason

Forward = Callable[..., Any]


# --- wrapping --------------------------------------------------------------------------------


def adopt(cls: type[nn.Module]) -> bool:
    """Have calls of ``cls``, an extensible class, captured where the backend compiles them.

    The forward is wrapped in the class that defines it, so that no class gets one that it had not,
    which could come before another's.

    Returns:
        Whether they were not captured yet.
    """
    definer = next(base for base in cls.__mro__ if "forward" in vars(base))
    forward = vars(definer)["forward"]
    if extensible(cls) is None or not inspect.isfunction(forward) or hasattr(forward, _REFERENCE):
        return False
    setattr(definer, "forward", _captured(forward))  # noqa: B010 (a class without a type for it)
    return True


def kernelized_forward(kernel: Kernel, layer: Extensible, eager: Forward) -> Forward:
    """What ``kernelize`` puts on an instance for compiling: the kernel, captured by any backend,
    and ``eager`` where none is compiling."""
    return _captured(layer.reference, kernel, eager)


_REFERENCE = "__kernelgraph_reference__"
_references: weakref.WeakValueDictionary[str, Forward] = weakref.WeakValueDictionary()
_count = itertools.count()


def _captured(
    reference: Forward, kernel: Kernel | None = None, eager: Forward | None = None
) -> Forward:
    """``reference``, or ``kernel`` in its place, whose calls Dynamo captures."""
    eager = eager or reference
    # A text, which Dynamo takes for a constant; a number it may take for one that changes.
    key = f"{reference.__module__}.{reference.__qualname__} {next(_count)}"
    _references[key] = reference

    def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return eager(module, *args, **kwargs)
        # What Dynamo calls here at trace time looks the variables up by name, and sets `read`, `op`
        # and `call`: functions written for the layer, for loops take Dynamo long. It also sets
        # `traced` to a kernel's forward, where that is to be traced.
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
    # each layer's forward has code and a name of its own, as ever.
    code = forward.__code__.replace(co_name=reference.__qualname__)
    own = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    functools.update_wrapper(own, reference)
    setattr(own, _REFERENCE, reference)
    setattr(own, KERNEL, kernel)
    return own


# Dynamo puts what these two return among the globals of the user's module, under their names.
@_torch.at_trace_time
def kernelgraph_begin(key: str) -> bool:
    """Decide for the call being traced, and set its `read`, which reads the tensors of the layer.

    Returns:
        Whether an op is used; False where `forward` is to be traced.
    """
    frame = Frame()
    module = frame.value("module")
    layer = extensible(type(module))
    if layer is None or layer.reference is not _references[key]:  # reached through super()
        return False
    try:
        trace = Trace.of(frame)
        if not trace.ours and kernelized_with(module) is None:
            return False
        return _begin(frame, trace, Site(module, layer, _path(module, frame)))
    except Exception as error:
        raise frame.backend_error(error) from error


def _begin(frame: Frame, trace: Trace, site: Site) -> bool:
    try:
        if site.layer.condition is not None:
            frame.guard_identity("module")
        arguments = frame.peek("args"), frame.peek("kwargs")
        site, kernel, state = trace.choices.settle(site, _torch.tensors_in(arguments))
        kind, choice = _chosen(trace, site, state, arguments)
        if choice is not None:
            if choice.how == REFERENCE:
                reason = Reason.SLOWER if choice.measured else Reason.POLICY
                raise KeepReference(site, reason, choice.why)
            if choice.kernel:  # not the one that is settled
                kernel, state = trace.choices.choose(site, choice.kernel)
            if choice.how == NATIVE:
                frame.set_callable("traced", kernel.forward)
                why = f"traced; {choice.why}"
                trace.choices.decisions.append(site.decision(Reason.KERNEL, str(kernel), why))
                return False
        for path, value in state.values:
            frame.guard("module", path, value)
        for path in state.types:
            frame.guard_type("module", path)
        for path, check in state.checks:
            frame.guard_check("module", path, check)
    except KeepReference as kept:
        trace.keep_reference(frame, kept.decision)
        return False
    except NotImplementedError as error:
        trace.keep_reference(frame, site.decision(Reason.NOT_AN_OP, "", str(error)))
        return False
    trace.pending = Begun(site, kernel, state, kind, choice)
    frame.set_callable("read", reader(state.tensors))
    return True


def _chosen(
    trace: Trace, site: Site, state: State, arguments: tuple[Any, Any]
) -> tuple[str, Choice | None]:
    """The kind of a call, and what was chosen for it; no kind where the kernel is given."""
    options = trace.choices.options
    if options.policy != "fastest" or kernelized_with(site.module) is not None:
        return "", None
    session = session_of(_torch.current_graph()[1], options.measure_seconds)
    kernels = trace.choices.kernels(site)
    kind = kind_of(site, kernels, state, arguments, options)
    return kind, known(kind, len(kernels), session)


@_torch.at_trace_time
def kernelgraph_finish() -> tuple[Any, ...] | None:
    """Make an op for the call that was begun, its state now read, and set its `op` and `call`.

    Returns:
        The constants of `call` (see `op_call`); None where the reference is kept after all.
    """
    frame = Frame()
    trace = Trace.of(frame)
    assert trace.pending is not None, "finish without begin"
    site, kernel, state, kind, choice = trace.pending
    try:
        args, kwargs, values = (frame.fakes(name) for name in ("args", "kwargs", "state"))
        with frame.fake_mode():
            call, operands = Call.of(state, values, site.layer, args, kwargs)
            lowered, gradient = trace.op_for(site, kernel, call, operands, trace.choices.options)
    except KeepReference as kept:
        trace.keep_reference(frame, kept.decision)
        return None
    except (UnsupportedValue, NotImplementedError) as error:
        trace.keep_reference(frame, site.decision(Reason.NOT_AN_OP, "", str(error)))
        return None
    except Exception as error:
        raise frame.backend_error(error) from error
    decision = decision_of(site, kernel, lowered, gradient)
    if choice is not None:
        decision = decision._replace(detail=choice.why)
    elif kind:
        kernels, options_ = trace.choices.kernels(site), trace.choices.options
        pending = Pending(site, kernels, call, operands, lowered, gradient, options_)
        trace.undecided.setdefault(kind, pending)
        trace.kinds[len(trace.choices.decisions)] = kind
    trace.choices.decisions.append(decision)
    if not site.grad:
        trace.called[lowered.name] = OpCall(site.module, call, operands, lowered.packed)
    arguments: list[Path | float] = [*call.argument_paths]
    for i, operand in enumerate(operands[: len(arguments)]):
        if isinstance(operand, float):  # it may be a symbol there, which no op takes
            arguments[i] = operand
    numbers = [number for _, number in state.numbers]
    function, constants = op_call(lowered, arguments, len(state.tensors), numbers)
    frame.set_callable("op", overload(lowered.name))
    frame.set_callable("call", function)
    return constants


_paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _path(module: nn.Module, frame: Frame) -> str:
    """The path of a module; where Dynamo traces its forward for itself, that of an earlier trace,
    which the graph break has ended."""
    if path := module_path(frame.module_stack):
        _paths[module] = path
    return path or _paths.get(module, "")


def module_path(stack: Mapping[str, tuple[str, type]]) -> str:
    """The path of the innermost module in an ``nn_module_stack``, as in ``named_modules()``."""
    if not stack:
        return ""
    # A module with an __getattr__ of its own is seen to reach for its submodules itself.
    path = re.sub(r"\.__dict__\['_modules'\]\['(.*?)'\]", r".\1", list(stack.values())[-1][0])
    # Dynamo names the root by where it found it: a local variable, or a global. A function that
    # was made a layer is a global too, and has no path but its name.
    root = re.match(r"[LG]\['(\w+)'\]\.?", path)
    below = path[root.end() :] if root else path
    return below or (root[1] if root and len(stack) > 1 else "")
