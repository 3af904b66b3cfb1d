"""``export``: a model as an ``ExportedProgram`` with its kernels in it.

Strict export traces the model with Dynamo, where capture writes the ops as it does for
torch.compile (`kernelgraph.graph.compile.capture`). Non-strict export runs the model's own Python on
fakes: there each extensible layer has, while it lasts, a forward that calls the op.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from kernelgraph.eager import KernelForward, named_layers
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, UnsupportedValue, read
from kernelgraph.graph.compile import Trace, adopt, exporting, kernelized_forward
from kernelgraph.graph.lowering import (
    GraphDecisions,
    KeepReference,
    Options,
    Policy,
    Site,
    decision_of,
    kernelized_with,
)
from kernelgraph.graph.ops import results_of
from kernelgraph.kernel import BoundForward, Gradients, Kernel, decide_again
from kernelgraph.layers import Extensible, extensible, tagged_subclasses
from kernelgraph.programs.baked_kernels import kernels_of
from kernelgraph.programs.export_ops import EXPORT_ROOT, Lowering
from kernelgraph.programs.program_ops import Installed, installed, note_traced
from kernelgraph.programs.references import (
    advise,
    know_references,
    ops_in,
    trace_all,
)
from kernelgraph.report import Reason, Report, publish
from kernelgraph.selection import Device, Mode, Target, current_mapping, serving_modes, target_of

LOWERINGS = ("op", "native")
EXPORT_POLICIES = ("always", "never")


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    mode: Mode | enum.Flag,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None,
    device: str | torch.device | Device | Target | None = None,
    strict: bool = False,
    policy: str = "always",
    lowering: str = "op",
) -> ExportedProgram:
    """``torch.export.export``, with the kernels of the current mapping baked in.

    Each call of an extensible layer that has a kernel is one op of ``torch.ops.hubkernels`` in the
    program. What such a layer does itself is not traced, and need not be traceable; other layers
    are exported as ever. The model is left as it was, also where an error is raised.
    `kernelgraph.last_report` says what was decided for each call. `kernelgraph.save` writes the
    program for machines that have neither the model's code nor its kernels.

    A layer that was kernelized keeps its kernel. Functions that were made extensible are found in
    strict export wherever they are called, else where `use_kernelized_func` has attached them.

    Args:
        model: The model. Its weights are the program's parameters and buffers.
        args: Example arguments.
        kwargs: Example keyword arguments.
        mode: ``Mode.INFERENCE`` or ``Mode.TRAINING``, with or without ``| Mode.TORCH_COMPILE``:
            what to choose kernels for. Only an op for training has a gradient, which is that of
            the layer's own forward; that has to be traceable.
        dynamic_shapes: Which sizes may be others, as for ``torch.export.export``. They may be so
            through the ops too.
        device: The device to choose kernels for; by default that of each call's tensors.
        strict: Whether to trace with Dynamo, as ``torch.export.export`` does.
        policy: ``always``: a kernel is used wherever one is found; ``never``: references alone.
        lowering: ``op``: each call is one op; ``native``: the forward of a hub layer that says
            ``can_torch_compile`` is traced, so that the program has the kernel's own ops in it,
            Triton's among them, for compilers to see. Not in strict export. Such a program has no
            references to fall back to.

    Raises:
        TypeError: If an argument is of the wrong type, or a hub layer is impure or does not fit.
        ValueError: If ``mode`` is not one to choose kernels for, there is no such policy or
            device, or a layer has a kernel for training and cannot itself be traced.
        Exception: What ``torch.export.export`` raises, and whatever a repository raises where it
            cannot be loaded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"export takes an nn.Module, not {model!r}")
    mode = Mode.parse(mode)
    serving_modes(mode)
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering is one of {', '.join(LOWERINGS)}, not {lowering!r}")
    if strict and lowering == "native":
        raise ValueError("lowering='native' is for non-strict export: pass strict=False")
    if policy not in EXPORT_POLICIES:
        raise ValueError(f"policy is one of {', '.join(EXPORT_POLICIES)}, not {policy!r}")
    options = Options(Policy(policy), kernel_mode=mode)
    choices = _Choices(options, current_mapping(), training=Mode.TRAINING in mode)
    choices.target = None if device is None else target_of(device)
    made = Lowering()
    token = exporting.set(Trace(choices, uses_mapping=True, op_for=made.op_for))
    try:
        with _prepared(model, _Exporter(choices, made, mode, strict, lowering == "native")):
            program = torch.export.export(
                model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict
            )
    finally:
        exporting.reset(token)
    called = {name for name, _ in ops_in(program)}
    for name, calls in made.calls.items():
        if name in called:
            _find_references(installed()[name], calls)
    advise(program)
    decisions = (d._replace(path=d.path.removeprefix(EXPORT_ROOT)) for d in choices.decisions)
    publish(Report("export", tuple(dict.fromkeys(decisions))))
    return program


@dataclass
class _Choices(GraphDecisions):
    """As ever, but for a device that was asked for."""

    target: Target | None = None

    def with_target(self, site: Site, tensors: Any) -> Site:
        site = super().with_target(site, tensors)
        return site if self.target is None else replace(site, target=self.target)


def _find_references(there: Installed, calls: Sequence[tuple[Extensible, Call, Any]]) -> None:
    found, why = trace_all(calls, there.form.writes.layer, there.references)
    if why and there.form.training:
        raise ValueError(
            f"layer {there.form.layer_name}: the gradient of op {there.entry.op} is that of the "
            f"layer's own forward, which cannot be traced ({why}): export it for Mode.INFERENCE"
        )
    there.references, there.untraced = found, why
    know_references(there)


# --- the model, while it is exported ------------------------------------------------------------


@dataclass
class _Exporter:
    """How the layers of a model are called while it is exported."""

    choices: GraphDecisions
    lowering: Lowering
    mode: Mode
    strict: bool
    native: bool
    """Whether kernels are traced where they say that they can be."""
    before: dict[nn.Module, Any] = field(default_factory=dict)
    """The own forward that each layer has without us: None if it has none."""

    def forward(self, site: Site, *args: Any, **kwargs: Any) -> Any:
        """What a layer does in non-strict export."""
        module = site.module
        with self.as_it_was(module):
            try:
                made = self._lowered(site, args, kwargs)
            except KeepReference as kept:
                self.choices.decisions.append(kept.decision)
                return site.layer.reference(module, *args, **kwargs)
        if isinstance(made, Kernel):
            return made.forward(module, *args, **kwargs)
        op, operands = made
        results = results_of(op.name, op.packed, operands)
        first_state = len(operands) - op.states
        for number, i in enumerate(op.written, op.count):
            # No gradient goes from one call to the next through what a layer counts.
            value = results[number]
            operands[i].copy_(value.detach() if i >= first_state else value)
        return op.output.unflatten(results)

    @contextlib.contextmanager
    def as_it_was(self, module: nn.Module) -> Iterator[None]:
        """Have a layer without the forward that it has for the export."""
        ours = module.__dict__["forward"]
        _set_forward(module, self.before[module])
        try:
            yield
        finally:
            _set_forward(module, ours)

    def _lowered(self, site: Site, args: Any, kwargs: Any) -> tuple[_Op, list[Any]] | Kernel:
        """The op for a call, and its operands; or a kernel that is to be traced."""
        tensors = _torch.tensor_leaves((args, kwargs))
        site, kernel, state = self.choices.kernel_for(site, tensors)
        if self.native and (namespace := _own_ops(kernel, site)):
            detail = f"traced into its own ops, {namespace}::*"
            self.choices.decisions.append(site.decision(Reason.KERNEL, str(kernel), detail))
            return kernel
        values = [read(site.module, path) for path in state.tensors]
        try:
            call, operands = Call.of(state, values, site.layer, args, kwargs)
            lowered, gradient = self.lowering.op_for(
                site, kernel, call, operands, self.choices.options
            )
        except UnsupportedValue as error:
            raise KeepReference(site, Reason.NOT_AN_OP, str(error)) from None
        self.choices.decisions.append(decision_of(site, kernel, lowered, gradient))
        states = len(state.operands)
        op = _Op(
            lowered.name,
            lowered.output,
            len(lowered.results),
            lowered.written,
            lowered.packed,
            states,
        )
        return op, operands


def _own_ops(kernel: Kernel, site: Site) -> str | None:
    """The namespace of a kernel's own ops, if its forward may be traced into them; noted for
    those who load a program that has such ops."""
    if not getattr(kernel.layer, "can_torch_compile", False):
        return None
    assert site.target is not None
    try:
        with _torch.out_of_export():
            noted = kernels_of(kernel.origin, kernel.layer.__module__, site.target)
            return note_traced(noted, site.target.type)
    except ValueError:  # from no repository, which only an op of ours can do with
        return None


@dataclass(frozen=True)
class _Op:
    """What a call needs of its op."""

    name: str
    output: Any
    count: int
    written: tuple[int, ...]
    packed: tuple[int, ...]
    states: int
    """How many of the operands, the last, are state."""


@contextlib.contextmanager
def _prepared(model: nn.Module, exporter: _Exporter) -> Iterator[None]:
    """Have the layers of ``model`` call ops, and be as they were afterwards."""
    for cls in tuple(tagged_subclasses()):
        adopt(cls)
    found = {module: module.__dict__.get("forward") for _, module in named_layers(model)}
    try:
        for path, module in named_layers(model):
            layer = extensible(type(module))
            if layer is not None:
                _prepare(Site(module, layer, path), exporter)
        yield
    finally:
        for module, forward in found.items():
            _set_forward(module, forward)


def _prepare(site: Site, exporter: _Exporter) -> None:
    module, layer = site.module, site.layer
    own = module.__dict__.get("forward")
    if isinstance(own, KernelForward) and kernelized_with(module) is None:
        own = _for_compiling(own, layer, exporter.mode)
        _set_forward(module, own)
    exporter.before[module] = own
    if own is not None and not isinstance(own, BoundForward):
        exporter.choices.decisions.append(KeepReference(site, Reason.OWN_FORWARD).decision)
    elif not exporter.strict:
        forward = _Forward(exporter.forward, site)
        forward.mode, forward.gradients = exporter.mode, Gradients(verify=False)
        forward.__signature__ = inspect.signature(functools.partial(layer.reference, module))
        _set_forward(module, forward)


class _Forward(BoundForward):
    """What is put on an instance while its model is exported."""

    __signature__: inspect.Signature


def _for_compiling(own: KernelForward, layer: Extensible, mode: Mode) -> BoundForward | None:
    """The kernel that a layer was kernelized with for eager use, as it is for compiling."""
    recipe = own.recipe
    kernel = decide_again(layer, recipe.selection, recipe.target, mode)
    if not isinstance(kernel, Kernel):  # it is none for training, say
        return None
    forward = KernelForward(kernelized_forward(kernel, layer, kernel.forward), own.args[0])
    forward.recipe, forward.mode, forward.gradients = recipe, mode, own.gradients
    return forward


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    # Around nn.Module.__setattr__, which looks for parameters first.
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward
