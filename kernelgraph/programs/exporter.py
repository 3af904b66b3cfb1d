"""``export``: a model as an ``ExportedProgram`` with its kernels in it.

Strict export traces the model with Dynamo, and capture writes the ops as it does for
``torch.compile`` (`kernelgraph.graph.compile`). Non-strict export runs the model's own Python on
fakes: during the export each extensible layer has a forward that calls the op.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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
    check_untransformed,
    decision_of,
    kernelized_with,
)
from kernelgraph.graph.ops import Lowered, results_of
from kernelgraph.kernel import BoundForward, Gradients, Kernel, decide_again
from kernelgraph.layers import Extensible, extensible, tagged_subclasses
from kernelgraph.programs.baked_kernels import record_kernel, record_traced
from kernelgraph.programs.export_ops import EXPORT_ROOT, ExportedOps
from kernelgraph.programs.program_ops import (
    InstalledOp,
    add_advice,
    installed_ops,
    ops_in,
    use_references,
)
from kernelgraph.programs.references import ExportedCall, trace_references
from kernelgraph.report import Reason, Report, publish
from kernelgraph.selection import Device, Mode, Target, current_mapping, serving_modes, target_of

LOWERINGS = ("op", "native")
EXPORT_POLICIES = ("always", "never")

Forward = Callable[..., object]


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
    """Export a model like ``torch.export.export``, with the kernels of the current mapping in it.

    Each call of an extensible layer that has a kernel becomes one op of ``torch.ops.hubkernels`` in
    the program. The own forward of such a layer is not traced and need not be traceable; other
    layers are exported as without kernels. The model stays unchanged, also when an error is raised.
    `kernelgraph.last_report` says what was decided for each call. `kernelgraph.save` writes the
    program for machines that have neither the model's code nor its kernels.

    A layer that was kernelized keeps its kernel. Strict export finds extensible functions wherever
    they are called; non-strict export finds those that `use_kernelized_func` attached to a class.

    Args:
        model: The model. Its weights become the program's parameters and buffers.
        args: Example arguments.
        kwargs: Example keyword arguments.
        mode: The mode to choose kernels for: ``Mode.INFERENCE`` or ``Mode.TRAINING``, with or
            without ``| Mode.TORCH_COMPILE``. Only the ops of an export for training have a
            gradient. It is the gradient of the layer's own forward, which has to be traceable.
        dynamic_shapes: The sizes that may vary, as for ``torch.export.export``. They may vary
            through the ops too.
        device: The device to choose kernels for; by default the device of each call's tensors.
        strict: Whether to trace with Dynamo, as for ``torch.export.export``.
        policy: ``always`` uses a kernel wherever the mapping has one; ``never`` keeps all
            references.
        lowering: ``op`` makes each call one op. ``native`` traces the forward of a hub layer whose
            ``can_torch_compile`` is true, so that compilers see the kernel's own ops in the
            program, also those of Triton; it is for non-strict export, and such a program has no
            references to fall back to.

    Returns:
        The program.

    Raises:
        TypeError: If an argument is of the wrong type, or a hub layer is impure or does not fit.
        ValueError: If ``mode`` is not one to choose kernels for, ``policy``, ``lowering`` or
            ``device`` is unknown, or a layer that has a kernel for training cannot be traced
            itself.
        Exception: Whatever ``torch.export.export`` raises, or a repository that cannot be loaded.

    Example:
        >>> @kg.use_kernel_forward_from_hub("SiluAndMul")
        ... class SiluAndMul(torch.nn.Module):
        ...     def forward(self, x):
        ...         gate, up = x.chunk(2, dim=-1)
        ...         return torch.nn.functional.silu(gate) * up
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), SiluAndMul())
        >>> kernel = kg.LocalLayerRepository("examples/kernels", layer_name="SiluAndMul")
        >>> with kg.use_kernel_mapping({"SiluAndMul": {"cpu": kernel}}):
        ...     program = kg.export(model, (torch.randn(3, 8),), mode=kg.Mode.INFERENCE)
        >>> calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        >>> [name.rsplit("_", 2)[0] for name in calls]  # without the revision and the digest
        ['aten.linear.default', 'hubkernels.decoder_layers_SiluAndMul']
        >>> program.module()(torch.randn(3, 8)).shape
        torch.Size([3, 8])
    """
    mode = _checked(model, mode, strict, policy, lowering)
    options = Options(Policy(policy), kernel_mode=mode)
    decisions = _ExportDecisions(options, current_mapping(), training=Mode.TRAINING in mode)
    decisions.target = None if device is None else target_of(device)
    ops = ExportedOps()
    exporter = _Exporter(decisions, ops, mode, strict, lowering == "native")
    token = exporting.set(Trace(decisions, uses_mapping=True, op_for=ops.op_for))
    try:
        with _layers_calling_ops(model, exporter):
            program = torch.export.export(
                model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict
            )
    finally:
        exporting.reset(token)
    _add_references(program, ops.calls)
    add_advice(program)
    _publish(decisions)
    return program


def _checked(
    model: object, mode: Mode | enum.Flag, strict: bool, policy: str, lowering: str
) -> Mode:
    """Check the arguments of `export`; return the mode."""
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
    return mode


@dataclass
class _ExportDecisions(GraphDecisions):
    """The decisions of an export, which may be for another device than that of the tensors."""

    target: Target | None = None

    def with_target(self, site: Site, tensors: Iterable[Tensor]) -> Site:
        site = super().with_target(site, tensors)
        return site if self.target is None else replace(site, target=self.target)


def _add_references(program: ExportedProgram, calls: Mapping[str, Sequence[ExportedCall]]) -> None:
    """Trace the references of the ops that are in a program, and have them used."""
    called = {name for name, _ in ops_in(program)}
    for name, calls_of_op in calls.items():
        if name in called:
            installed = installed_ops()[name]
            _trace_references(installed, calls_of_op)
            use_references(installed)


def _trace_references(installed: InstalledOp, calls: Sequence[ExportedCall]) -> None:
    spec = installed.spec
    found, untraced = trace_references(calls, spec.writes.layer, installed.references)
    if untraced and spec.flow is not None:
        raise ValueError(
            f"layer {spec.layer_name}: the gradient of op {installed.op.name} is that of the "
            f"layer's own forward, which cannot be traced ({untraced}): export it for "
            "Mode.INFERENCE"
        )
    installed.references, installed.untraced = found, untraced


def _publish(decisions: GraphDecisions) -> None:
    """Publish the report of an export, with equal rows only once."""
    rows = (d._replace(path=d.path.removeprefix(EXPORT_ROOT)) for d in decisions.decisions)
    publish(Report("export", tuple(dict.fromkeys(rows))))


# --- the model, while it is exported ------------------------------------------------------------


@contextlib.contextmanager
def _layers_calling_ops(model: nn.Module, exporter: _Exporter) -> Iterator[None]:
    """Make the layers of ``model`` call ops, and restore them at the end."""
    for cls in tuple(tagged_subclasses()):
        adopt(cls)
    before = {module: module.__dict__.get("forward") for _, module in named_layers(model)}
    try:
        for path, module in named_layers(model):
            layer = extensible(type(module))
            if layer is not None:
                _prepare(Site(module, layer, path), exporter)
        yield
    finally:
        for module, forward in before.items():
            _set_forward(module, forward)


def _prepare(site: Site, exporter: _Exporter) -> None:
    """Give a layer the forward that it has during the export."""
    module, layer = site.module, site.layer
    own = module.__dict__.get("forward")
    if isinstance(own, KernelForward) and kernelized_with(module) is None:
        own = _for_compiling(own, layer, exporter.mode)
        _set_forward(module, own)
    exporter.own_forwards[module] = own
    if own is not None and not isinstance(own, BoundForward):
        exporter.decisions.decisions.append(KeepReference(site, Reason.OWN_FORWARD).decision)
    elif not exporter.strict:
        forward = _ExportForward(exporter.call, site)
        forward.mode, forward.gradients = exporter.mode, Gradients(verify=False)
        forward.__signature__ = inspect.signature(functools.partial(layer.reference, module))
        _set_forward(module, forward)


class _ExportForward(BoundForward):
    """The forward of a layer during a non-strict export."""

    __signature__: inspect.Signature


def _for_compiling(own: KernelForward, layer: Extensible, mode: Mode) -> BoundForward | None:
    """Return the forward that runs a layer's kernel, kernelized for eager use, in a graph; None if
    the kernel is not for ``mode``."""
    recipe = own.recipe
    kernel = decide_again(layer, recipe.selection, recipe.target, mode)
    if not isinstance(kernel, Kernel):
        return None
    forward = KernelForward(kernelized_forward(kernel, layer, kernel.forward), own.args[0])
    forward.recipe, forward.mode, forward.gradients = recipe, mode, own.gradients
    return forward


def _set_forward(module: nn.Module, forward: Forward | None) -> None:
    # nn.Module.__setattr__ would look for parameters first.
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


# --- calls in non-strict export -----------------------------------------------------------------


class _OpCall(NamedTuple):
    """A call of a layer as a call of an op."""

    op: Lowered
    operands: list[Any]
    first_state: int
    """The number of the first operand that is state of the layer."""

    def run(self) -> object:
        """Call the op, write what the layer writes, and return what the layer returns."""
        op, operands = self.op, self.operands
        results = results_of(op.name, op.packed, operands)
        for number, i in enumerate(op.written, len(op.results)):
            # Detached, so that no gradient flows between calls through the state of a layer.
            value = results[number]
            operands[i].copy_(value.detach() if i >= self.first_state else value)
        for number, i in op.aliases:
            results[number] = operands[i]
        return op.output.unflatten(results)


@dataclass
class _Exporter:
    """Decides and makes the calls of a model's layers while it is exported."""

    decisions: GraphDecisions
    ops: ExportedOps
    mode: Mode
    strict: bool
    native: bool
    """Whether a kernel is traced if its layer says that it can be."""
    own_forwards: dict[nn.Module, Forward | None] = field(default_factory=dict)
    """The forward of each layer instance before the export; None if it has none of its own."""

    def call(self, site: Site, *args: object, **kwargs: object) -> object:
        """Call a layer in non-strict export: its op, its kernel to be traced, or its reference."""
        module = site.module
        with self._without_export_forward(module):
            try:
                chosen = self._op_call(site, args, kwargs)
            except KeepReference as kept:
                self.decisions.decisions.append(kept.decision)
                return site.layer.reference(module, *args, **kwargs)
        if isinstance(chosen, Kernel):
            return chosen.forward(module, *args, **kwargs)
        return chosen.run()

    @contextlib.contextmanager
    def _without_export_forward(self, module: nn.Module) -> Iterator[None]:
        """Give a layer its own forward back for a while."""
        during_export = module.__dict__["forward"]
        _set_forward(module, self.own_forwards[module])
        try:
            yield
        finally:
            _set_forward(module, during_export)

    def _op_call(
        self, site: Site, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> _OpCall | Kernel:
        """Return a call as an op, or the kernel if it is to be traced.

        Raises:
            KeepReference: If the layer keeps its reference.
        """
        tensors = _torch.tensor_leaves((args, kwargs))
        site, kernel, state = self.decisions.kernel_for(site, tensors)
        check_untransformed(site)
        if self.native and (namespace := _own_namespace(kernel, site)):
            detail = f"traced into its own ops, {namespace}::*"
            self.decisions.decisions.append(site.decision(Reason.KERNEL, str(kernel), detail))
            return kernel
        values = [read(site.module, path) for path in state.tensors]
        try:
            call, operands = Call.of(state, values, site.layer, args, kwargs)
            op, gradient = self.ops.op_for(site, kernel, call, operands, self.decisions.options)
        except UnsupportedValue as error:
            raise KeepReference(site, Reason.NOT_AN_OP, str(error)) from None
        self.decisions.decisions.append(decision_of(site, kernel, op, gradient))
        return _OpCall(op, operands, call.first_state)


def _own_namespace(kernel: Kernel, site: Site) -> str | None:
    """Return the namespace of a kernel's own ops if its forward can be traced into them, and record
    the kernel for loading such programs; else None."""
    if not getattr(kernel.layer, "can_torch_compile", False):
        return None
    assert site.target is not None
    try:
        with _torch.out_of_export():
            records = record_kernel(kernel.origin, kernel.layer.__module__, site.target)
            return record_traced(records, site.target.type)
    except ValueError:  # it comes from no repository, and can only be an op of ours
        return None
