"""Making the ops of an exported program, for the calls of its model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from kernelgraph.graph import _torch, ops
from kernelgraph.graph.calls import Call, Runner, State
from kernelgraph.graph.gradients import Gradient, wanted_of
from kernelgraph.graph.infer import (
    OutputSpec,
    Source,
    UnknownShape,
    differentiable,
    effects,
    infer_output,
    run_on_fakes,
    static_key,
)
from kernelgraph.graph.lowering import Options, Site
from kernelgraph.graph.ops import Lowered
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible
from kernelgraph.programs.portable_call import NotPortable, call_from_json, check_needs_no_code
from kernelgraph.programs.portable_sizes import Sizes, record
from kernelgraph.programs.program_ops import Entry, Form, install, installed

EXPORT_ROOT = "_export_root."
"""What ``torch.export`` has Dynamo find a model under, in front of its layers' paths."""


class Lowering:
    """Makes the ops for the calls of one model that is being exported."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[Extensible, Call, list[Any]]]] = {}
        """Of each op the calls that it was made for: the layer, the call as the model makes it,
        and operands like those of the call, with sizes that are symbols where the call's are."""
        self._known: dict[Any, str] = {}

    def op_for(
        self, site: Site, kernel: Kernel, call: Call, operands: Sequence[Any], options: Options
    ) -> tuple[Lowered, Gradient | None]:
        """As `kernelgraph.graph.lowering.lower.op_for`, the op of an exported program: its gradient is
        the reference's.

        Raises:
            UnsupportedValue: Also, if the call depends on code of the model's.
            UnknownShape, AttributeError, RuntimeError: As `ops.lower` raises.
        """
        layer, training = site.layer, site.grad
        own, _, _ = _torch.symbolic_like(operands, everything=False)
        key = (kernel.layer, kernel.origin, layer, call.describe(), _form_of(own), training)
        if key not in self._known:
            with _torch.out_of_export():
                self._known[key] = _make(kernel, layer, call, own, site.module, training)
        name = self._known[key]
        self.calls.setdefault(name, []).append((layer, call, own))
        there = installed()[name]
        there.body.places.add(site.module, site.path.removeprefix(EXPORT_ROOT))
        form = there.form
        results = form.sizes(operands) if static_key(operands) else form.told.results
        packed = ops.packed_operands(form.call)
        returns = there.body.returns
        lowered = Lowered(name, form.output, results, form.writes.layer, packed, returns)
        gradient = Gradient(form.flows[0], None, "exported") if form.flows else None
        return lowered, gradient


def _form_of(operands: Sequence[Any]) -> tuple[Any, ...]:
    """All of operands that an op for a call with them may depend on."""
    form: list[Any] = []
    for value in operands:
        if isinstance(value, Tensor):
            numbers = [(type(n), _torch.hint(n)) for n in (*value.shape, *value.stride())]
            form += [*numbers, value.dtype, value.device, value.requires_grad]
        else:
            form.append((type(value), _torch.hint(value)))
    return tuple(form)


def _make(
    kernel: Kernel,
    layer: Extensible,
    call: Call,
    operands: Sequence[Any],
    module: nn.Module,
    training: bool,
) -> str:
    check_needs_no_code(module, kernel.forward)
    source, told = infer_output(kernel, layer, call, operands)
    sizes = _sizes(source, told, operands)
    writes = effects(kernel, layer, call, operands, told)
    form = Form(
        layer.layer_name, _member(kernel), call, told.output, sizes, writes, training=training
    )
    if training:
        wanted = wanted_of(operands, every=True)
        count = len(told.results) + len(writes.layer)
        flows = differentiable(layer, call, operands, wanted, writes.layer) or (True,) * count
        form = replace(form, flows=(wanted, flows))
    needed = [path for path, _ in State.of(module, [kernel.forward]).constants]
    data = json.loads(json.dumps(form.to_json(needed)))
    portable = call_from_json(data["call"])
    if told.source == "kernel":
        try:
            run_on_fakes(Runner(kernel.forward, portable), operands)
        except AttributeError as error:
            raise NotPortable(f"the kernel needs the layer's class: {error}") from error
    entry = Entry.of(data, kernel.origin)
    return install(entry, kernel).entry.op


def _sizes(source: Source, told: OutputSpec, operands: Sequence[Any]) -> Sizes:
    # A kernel that has to run for real is not run at sizes that may be none of its.
    if told.source != "probe":
        try:
            return record(source, operands, everything=True)[0]
        except Exception:  # what it does depends on sizes, in a way that has no form as data
            pass
    sizes, again = record(source, operands, everything=False)
    if again.output != told.output:
        raise UnknownShape("the structure of what it returns depends on sizes")
    return sizes


def _member(kernel: Kernel) -> tuple[str, str]:
    for kind in ("layer_name", "func_name"):
        if isinstance(name := getattr(kernel.selection.repository, kind, None), str):
            return kind, name
    return "layer_name", kernel.layer.__name__
