"""The programs that compete for a call: its region, with each candidate for the call in turn.

Each is compiled by the compiler that will compile the whole graph, and run on inputs that are made
up for the call that is traced: with its sizes, dtypes and layout, and the layer's own weights.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from kernelgraph.graph import _torch
from kernelgraph.graph.autotune.records import FIRST_OP, Candidate, Implementation
from kernelgraph.graph.autotune.region import Region
from kernelgraph.graph.calls import Call, Runner, State, constants_in, read
from kernelgraph.graph.gradients import Gradient
from kernelgraph.graph.infer import NoValue, Operands, indices, sample_inputs, value_of
from kernelgraph.graph.lowering import Options, Site, op_for
from kernelgraph.graph.ops import Lowered, results_of, unpack
from kernelgraph.kernel import Kernel
from kernelgraph.selection import device_name


class Unmeasurable(Exception):
    """The time of a call cannot be measured."""


@dataclass(frozen=True)
class UntunedCall:
    """A call that became an op for now: no winner is known for its tuning key."""

    site: Site
    kernels: tuple[Kernel, ...]
    """The kernels that may be used; the op is that of the first."""
    call: Call
    operands: Sequence[object]
    """The operands as they are in the trace."""
    lowered: Lowered
    gradient: Gradient | None
    options: Options

    @property
    def about(self) -> dict[str, str]:
        """A description of the call, for people."""
        site = self.site
        tensors = [v for v in self.operands if isinstance(v, Tensor)]
        sizes = ["x".join(str(_torch.hint(n)) for n in v.shape) for v in tensors]
        dtypes = [str(v.dtype).removeprefix("torch.") for v in tensors]
        takes = [f"{d}[{s}]" for d, s in zip(dtypes, sizes, strict=True)]
        return {
            "layer": site.layer.layer_name,
            "device": ", ".join(sorted({device_name(v.device) for v in tensors})),
            "mode": str(site.mode),
            "takes": ", ".join([*takes, *(f"{n}={v!r}" for n, v in self._numbers.items())]),
            "kernels": ", ".join(map(str, self.kernels)),
        }

    @property
    def _numbers(self) -> Mapping[str, object]:
        """The whole numbers and constants among the arguments, by name."""
        arguments = self.operands[: self.call.first_state]
        given = zip(self.call.names, arguments, strict=False)
        numbers = {n: _torch.hint(v) for n, v in given if not isinstance(v, (Tensor, float))}
        return {**numbers, **constants_in(self.call.arguments, self.site.layer)}

    def is_like(self, node: fx.Node) -> bool:
        """Whether an op's node has operands with the sizes, strides and numbers of this call."""
        given = unpack(list(node.args), self.lowered.packed)
        try:
            values = [value_of(v) if isinstance(v, fx.Node) else v for v in given]
        except NoValue:
            return False
        now = sample_inputs.measures_now
        return [*map(now, values)] == [*map(now, self.operands)]


class InlinedCall(nn.Module):
    """Computes a call in the place of its op, in Python that a compiler traces."""

    def __init__(self, forward: Callable[..., object], untuned: UntunedCall) -> None:
        super().__init__()
        self._run = Runner(forward, untuned.call)
        self._packed = untuned.lowered.packed
        self._written = untuned.lowered.written
        self._one_result = untuned.lowered.returns == 1

    def forward(self, *arguments: object) -> Tensor | tuple[Tensor, ...]:
        results = self._run.results(unpack(arguments, self._packed), self._written)
        return results[0] if self._one_result else tuple(results)


def program(region: Region, untuned: UntunedCall, candidate: Candidate) -> fx.GraphModule:
    """Return a region with the call in the middle computed by a candidate.

    Args:
        region: The region, with the op of the first kernel.
        untuned: The call.
        candidate: Computes the call.
    """
    graph = copy.deepcopy(region.graph_module.graph)
    made = fx.GraphModule(region.graph_module, graph)
    if candidate == FIRST_OP:
        return made
    forward = _forward_of(untuned, candidate)
    node = next(n for n in graph.nodes if n.name == region.node.name)
    made.add_submodule("kernelgraph_stand_in", InlinedCall(forward, untuned))
    with graph.inserting_before(node):
        stand_in = graph.call_module("kernelgraph_stand_in", node.args, node.kwargs)
    stand_in.meta = dict(node.meta)
    node.replace_all_uses_with(stand_in)
    graph.erase_node(node)
    made.recompile()
    return made


def _forward_of(untuned: UntunedCall, candidate: Candidate) -> Callable[..., object]:
    kernel = untuned.kernels[candidate.kernel]
    match candidate.implementation:
        case Implementation.REFERENCE:
            return untuned.site.layer.reference
        case Implementation.NATIVE:
            return kernel.forward
        case Implementation.OP:
            return _forward_by_op(untuned, kernel)


def _forward_by_op(untuned: UntunedCall, kernel: Kernel) -> Callable[..., object]:
    """Return the op of another kernel than the first, with the signature of a forward.

    It may read other state than the op of the first, which is taken from the layer.
    """
    site, layer = untuned.site, untuned.site.layer
    state = State.of(site.module, [layer.reference, kernel.forward])
    held = [read(site.module, path).detach() for path in state.tensors]
    for path, tensor in zip(state.tensors, held, strict=True):
        tensor.requires_grad_(site.grad and read(site.module, path).requires_grad)
    args, kwargs = untuned.call.arguments.unflatten(untuned.operands)
    call, operands = Call.of(state, held, layer, args, kwargs)
    call = replace(call, autocast=untuned.call.autocast)
    lowered, _ = op_for(site, kernel, call, operands, untuned.options)

    def forward(module: nn.Module, *args: object, **kwargs: object) -> object:
        _, operands = Call.of(state, held, layer, args, kwargs)
        results = results_of(lowered.name, lowered.packed, operands)
        output: object = lowered.output.unflatten(results)
        return output

    return forward


# --- inputs -------------------------------------------------------------------------------------


def inputs_for(region: Region, untuned: UntunedCall) -> list[object]:
    """Make up values for the placeholders of a region.

    Raises:
        Unmeasurable: If sizes, or the range of indices, cannot be found out, or a tensor cannot
            be made up.
    """
    if None in _torch.hints(n for v in region.inputs for n in sample_inputs.measures(v)).values():
        raise Unmeasurable("its sizes depend on values")
    known = sample_inputs.sizes_now(region.inputs)
    placeholders = [n for n in region.graph_module.graph.nodes if n.op == "placeholder"]
    given = unpack(list(region.node.args), untuned.lowered.packed)
    bounds = _index_bounds(untuned, given)
    try:
        forms = sample_inputs.forms(region.inputs, lambda size: _torch.evaluate(size, known))
        for i, node in enumerate(given):
            if isinstance(node, fx.Node) and node in placeholders:
                number = placeholders.index(node)
                if (weight := _weight(untuned, i)) is not None:
                    forms[number] = weight
                elif i in bounds:
                    forms[number] = indices(forms[number], bounds[i], 0)
        made = sample_inputs.make(forms, 0)
    except TypeError as error:
        raise Unmeasurable(str(error)) from error
    if untuned.site.grad:
        for value, like in zip(made, region.inputs, strict=True):
            if isinstance(like, Tensor) and like.requires_grad:
                value.requires_grad_()
    return made


def check_real(program: fx.GraphModule, inputs: Sequence[object]) -> None:
    """Check that a program is about to be run on real tensors alone.

    Native code that asks a fake for its memory may end the process.

    Raises:
        Unmeasurable: If an input, or a tensor that the program holds, is a fake or on the meta
            device, or if an input is neither a tensor nor a number.
    """
    for number, value in enumerate(inputs):
        if not isinstance(value, (Tensor, int, float)) or _has_no_memory(value):
            raise Unmeasurable(f"input {number} of the region is a {type(value).__name__}")
    held = (getattr(program, n.target) for n in program.graph.nodes if _is_attribute(program, n))
    for tensor in itertools.chain(program.parameters(), program.buffers(), held):
        if _has_no_memory(tensor):
            raise Unmeasurable("a tensor of the region has no memory")


def _is_attribute(program: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and hasattr(program, str(node.target))


def _has_no_memory(value: object) -> bool:
    return isinstance(value, Tensor) and (
        _torch.is_fake(value) or value.is_meta or _torch.is_functional(value)
    )


def _weight(untuned: UntunedCall, operand: int) -> Tensor | None:
    """Return the layer's own tensor for an operand of its state, not a copy; else None.

    Raises:
        Unmeasurable: If the tensor has no memory, so that nobody knows whether there is enough.
    """
    number = operand - untuned.call.first_state
    if not 0 <= number < len(untuned.call.state.tensors):
        return None
    weight: Tensor = read(untuned.site.module, untuned.call.state.tensors[number])
    if _torch.is_fake(weight) or weight.is_meta:
        raise Unmeasurable("the layer's weights have no memory")
    return weight.detach()


def _index_bounds(untuned: UntunedCall, given: Sequence[object]) -> dict[int, int]:
    """Return the bound of each operand that holds indices from outside of the region.

    Raises:
        Unmeasurable: If a bound cannot be found out. With zeros for indices a layer of experts
            would use a single one, whose time says nothing.
    """
    count = untuned.call.first_state
    outside = [i for i in range(count) if _holds_indices(untuned.operands[i], given[i])]
    if not outside:
        return {}
    maker = Operands(untuned.call, untuned.operands, untuned.site.module, trial=True)
    bounds = maker.index_bounds(Runner(untuned.site.layer.reference, untuned.call))
    if missing := [untuned.call.names[i] for i in outside if i not in bounds]:
        raise Unmeasurable(f"nothing tells what indices {missing[0]} may hold")
    return bounds


def _holds_indices(operand: object, node: object) -> bool:
    """Whether an operand may be a tensor of indices, which comes from outside of the region."""
    integers = isinstance(operand, Tensor) and operand.dtype in (torch.int32, torch.int64)
    return integers and isinstance(node, fx.Node) and node.op == "placeholder"
