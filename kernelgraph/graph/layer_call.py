"""Capture: a call of an extensible layer becomes one custom-op node while Dynamo traces it.

An extensible class's ``forward`` is wrapped (`adopt`, or per instance by ``kernelize``) in a
function that outside of Dynamo only runs what it wraps. Traced by Dynamo, it

1. asks `begin` whether a kernel stands in for this layer here, and which attributes to read;
   where none does it runs on into the reference, so the graph is what it would have been;
2. reads those attributes in traced code, so that they become inputs of the graph;
3. asks `finish` for the op of a call of this form, and calls it.

`begin` and `finish` run as ordinary Python at trace time, and see the traced frame's variables
through `Frame`. What they return is constant in the trace. The Python values that it depends on
are guarded; the mapping is not: it counts as it is when the graph is traced.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kernelgraph.devices import Target, target_of
from kernelgraph.eager import KernelForward
from kernelgraph.graph import _torch, options
from kernelgraph.graph._torch import Frame
from kernelgraph.graph.call import Call, Template, UnsupportedValue, paths_of, put_leaves
from kernelgraph.graph.ops import NAMESPACE, Lowered, lower
from kernelgraph.graph.state import Path, State, UnsupportedState
from kernelgraph.kernel import Kernel, decide
from kernelgraph.layers import Extensible, extensible, first_device
from kernelgraph.mapping import Rejection, current_mapping
from kernelgraph.modes import Mode
from kernelgraph.report import Decision, Reason

Forward = Callable[..., Any]


# --- wrapping --------------------------------------------------------------------------------


def adopt(cls: type[nn.Module]) -> None:
    """Have calls of ``cls``, an extensible class, captured where the backend compiles them."""
    layer = extensible(cls)
    if layer is not None and layer.owner is cls and not hasattr(cls.forward, _REFERENCE):
        cls.forward = _captured(layer.reference, cls)


def kernelized_forward(kernel: Kernel, layer: Extensible) -> Forward:
    """What ``kernelize`` puts on an instance for compiling: the kernel, captured by any backend."""
    return _captured(layer.reference, layer.owner, kernel)


_REFERENCE = "__kernelgraph_reference__"
_KERNEL = "__kernelgraph_kernel__"
_owners: list[type] = []


def _captured(reference: Forward, owner: type, kernel: Kernel | None = None) -> Forward:
    """``reference``, or ``kernel``, whose calls Dynamo captures."""
    eager = reference if kernel is None else kernel.forward
    if owner not in _owners:
        _owners.append(owner)
    key = _owners.index(owner)  # Dynamo takes a number as a constant, and not any class

    @functools.wraps(reference)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return _traced(key, reference, self, args, kwargs)
        return eager(self, *args, **kwargs)

    setattr(forward, _REFERENCE, reference)
    setattr(forward, _KERNEL, kernel)
    return forward


def _traced(
    owner: int, reference: Forward, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # Dynamo traces this function; `begin` and `finish` look its variables up by name.
    plan = begin(owner)
    if plan is None:
        return reference(module, *args, **kwargs)
    state = []
    for path in plan:
        value = module
        for name in path:
            value = getattr(value, name)
        state.append(value)
    lowered = finish()
    if lowered is None:
        return reference(module, *args, **kwargs)
    op_name, paths, numbers, output = lowered
    operands: list[Any] = []
    for path in paths:
        value = (args, kwargs, state)
        for key in path:
            value = value[key]
        operands.append(value)
    operands.extend(numbers)
    results = getattr(getattr(torch.ops, NAMESPACE), op_name).default(*operands)
    return put_leaves(output, (results,) if isinstance(results, Tensor) else results)


# --- deciding, at trace time -----------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    """A call of an extensible layer that is being traced."""

    module: nn.Module
    layer: Extensible
    path: str
    device: str
    mode: str

    def decision(
        self, reason: Reason, kernel: str = "", detail: str = "", op: str = ""
    ) -> Decision:
        return Decision(
            self.path, self.layer.layer_name, self.device, self.mode, reason, kernel, detail, op
        )


@dataclass
class Trace:
    """What is known of one graph while it is traced."""

    options: options.Options | None
    """The backend's, or None if the graph is traced for another backend."""
    decisions: list[Decision] = field(default_factory=list)
    outcomes: dict[Any, Kernel | Rejection] = field(default_factory=dict)
    pending: tuple[_Site, Kernel, State, bool] | None = None
    """The call between its `begin` and its `finish`, and whether a gradient flows through it."""


class _KeepReference(Exception):
    """The call that is being traced keeps its reference."""

    def __init__(self, rejection: Rejection) -> None:
        self.rejection = rejection


@_torch.at_trace_time
def begin(key: int) -> tuple[Path, ...] | None:
    """Decide for the call being traced.

    Returns:
        The paths of the tensors to read of the layer, or None where the reference is kept.
    """
    frame = Frame()
    module, owner = frame.value("module"), _owners[key]
    layer = extensible(type(module))
    if layer is None or layer.owner is not owner:  # reached through super() from another forward
        return None
    try:
        return _begin(frame, module, layer)
    except Exception as error:
        raise frame.backend_error(error) from error


def _begin(frame: Frame, module: nn.Module, layer: Extensible) -> tuple[Path, ...] | None:
    if (trace := frame.notes.get("trace")) is None:
        trace = frame.notes["trace"] = Trace(options.of_backend(*frame.backend))
    kernelized = _kernelized(module)
    if trace.options is None and kernelized is None:
        return None
    site = _Site(module, layer, module_path(frame.module_stack), "", "")
    try:
        device, grad = _device_and_grad(frame, module)
        target, mode = _target_and_mode(device, grad, trace.options, kernelized)
        site = replace(site, device=target.type, mode=str(mode))
        kernel = _kernel(site, target, mode, trace, kernelized)
        state = State.of(module, [layer.reference, kernel.forward])
        for path, value in state.guarded:
            frame.guard("module", path, value)
    except _KeepReference as keep:
        trace.decisions.append(site.decision(keep.rejection.reason, "", keep.rejection.detail))
        return None
    except (UnsupportedState, NotImplementedError) as error:
        trace.decisions.append(site.decision(Reason.NOT_AN_OP, "", str(error)))
        return None
    trace.pending = (site, kernel, state, grad)
    return state.tensors


def _kernelized(module: nn.Module) -> tuple[Kernel, Mode] | None:
    """The kernel that ``kernelize`` chose for the instance, if it did so for compiling."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, KernelForward) and hasattr(forward.func, _KERNEL):
        return getattr(forward.func, _KERNEL), forward.recipe.mode
    return None


def _device_and_grad(frame: Frame, module: nn.Module) -> tuple[torch.device, bool]:
    """Where the call runs, and whether a gradient can flow through it."""
    try:
        arguments = (frame.fakes("args"), frame.fakes("kwargs"))
    except NotImplementedError as error:
        detail = f"an argument is neither a tensor nor a constant: {error}"
        raise _KeepReference(Rejection(Reason.NOT_AN_OP, detail)) from None
    tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
    device = tensors[0].device if tensors else first_device(module)
    if device is None:
        raise _KeepReference(Rejection(Reason.NO_DEVICE, "no tensor tells the device"))
    grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (*tensors, *module.parameters())
    )
    return device, grad


def _target_and_mode(
    device: torch.device,
    grad: bool,
    chosen: options.Options | None,
    kernelized: tuple[Kernel, Mode] | None,
) -> tuple[Target, Mode]:
    if kernelized is not None:
        mode = kernelized[1]
    elif chosen is not None and chosen.kernel_mode is not None:
        mode = chosen.kernel_mode
    else:
        mode = (Mode.TRAINING if grad else Mode.INFERENCE) | Mode.TORCH_COMPILE
    try:
        return target_of(device), mode
    except ValueError as error:  # a device type that no kernel is for, such as meta
        raise _KeepReference(Rejection(Reason.NO_DEVICE, str(error))) from None


def _kernel(
    site: _Site, target: Target, mode: Mode, trace: Trace, kernelized: tuple[Kernel, Mode] | None
) -> Kernel:
    """The kernel for a call; `_KeepReference` is raised where there is none."""
    if trace.options is not None and trace.options.policy == "never":
        raise _KeepReference(Rejection(Reason.POLICY, "never"))
    if kernelized is not None:
        return kernelized[0]
    if "forward" in site.module.__dict__:
        raise _KeepReference(Rejection(Reason.OWN_FORWARD, ""))
    if site.layer.condition is not None and not site.layer.condition(site.module):
        raise _KeepReference(Rejection(Reason.CONDITION, ""))
    key = (site.layer.owner, target, mode)
    if key not in trace.outcomes:
        trace.outcomes[key] = decide(site.layer, target, mode, current_mapping())
    outcome = trace.outcomes[key]
    if isinstance(outcome, Rejection):
        raise _KeepReference(outcome)
    return outcome


@_torch.at_trace_time
def finish() -> tuple[str, Any, Any, Template] | None:
    """The op for the call that `begin` decided on, its state now read.

    Returns:
        The op's name, the keys from ``(args, kwargs, state)`` to its first operands, the numbers
        that are its last, and the form of what the layer returns; None where the reference is
        kept after all.
    """
    frame = Frame()
    trace: Trace = frame.notes["trace"]
    assert trace.pending is not None, "finish without begin"
    site, kernel, state, grad = trace.pending
    try:
        with frame.fake_mode():
            call, lowered = _lower(frame, site, kernel, state, grad)
    except (UnsupportedValue, NotImplementedError) as error:
        detail = f"it takes or returns what is neither a tensor nor a constant: {error}"
        trace.decisions.append(site.decision(Reason.NOT_AN_OP, "", detail))
        return None
    except Exception as error:
        raise frame.backend_error(error) from error
    trace.decisions.append(
        site.decision(Reason.KERNEL, str(kernel), "", f"{NAMESPACE}::{lowered.name}")
    )
    _, (args, kwargs) = call.arguments
    paths = [
        *((0, *path) for path in paths_of(args)),
        *((1, *path) for path in paths_of(kwargs)),
        *((2, i) for i in range(len(state.tensors))),
    ]
    numbers = tuple(number for _, number in state.numbers)
    return lowered.name, tuple(paths), numbers, lowered.output


def _lower(
    frame: Frame, site: _Site, kernel: Kernel, state: State, grad: bool
) -> tuple[Call, Lowered]:
    parameters = list(inspect.signature(site.layer.reference).parameters)[1:]
    values = frame.fakes("state")
    args, kwargs = frame.fakes("args"), frame.fakes("kwargs")
    call, operands = Call.of(state, values, parameters, args, kwargs)
    return call, lower(kernel, site.layer, call, operands, training=grad)


def module_path(stack: Mapping[str, tuple[str, type]]) -> str:
    """The path of the innermost module in an ``nn_module_stack``, as in ``named_modules()``."""
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    # Dynamo names the root by where it found it: a local variable, or a global.
    return re.sub(r"^(L\['\w+'\]|G\['\w+'\])\.?", "", path)
