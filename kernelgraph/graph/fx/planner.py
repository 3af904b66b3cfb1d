"""Decides what replaces each call of an extensible layer in a graph, before anything is changed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, State, UnsupportedValue, path_text, read
from kernelgraph.graph.gradients import Gradient
from kernelgraph.graph.infer import NoValue, make_fakes, plain, propagate, value_of
from kernelgraph.graph.lowering import GraphDecisions, KeepReference, Site, op_for
from kernelgraph.graph.ops import Lowered
from kernelgraph.kernel import BoundForward, Kernel
from kernelgraph.layers import extensible
from kernelgraph.report import Reason

ValueOf = Callable[[fx.Node], object]
"""Returns the fake value of a node, or raises an error if there is none."""


class Replacement(NamedTuple):
    """The op for a call of a layer."""

    kernel: Kernel
    call: Call
    operands: list[object]
    lowered: Lowered
    gradient: Gradient | None


@dataclass
class PlannedCall:
    """A node that calls an extensible layer, and the decision about it."""

    graph_module: fx.GraphModule
    node: fx.Node
    site: Site
    outcome: Replacement | KeepReference | None = None
    """The op that takes the node's place, or why none does; None before the decision."""


def plan(
    graph_module: fx.GraphModule, choices: GraphDecisions, *, need_values: bool = False
) -> list[PlannedCall]:
    """Decide about each call of an extensible layer, by the values in the nodes' metadata.

    Args:
        graph_module: The graph. The graph modules that it calls are included.
        choices: Chooses the kernels.
        need_values: Whether to raise an error if a node that a layer takes carries no value;
            otherwise the layer keeps its reference.

    Raises:
        ValueError: If a value is missing.
        Exception: What `GraphDecisions.settle` and `op_for` raise.
    """
    calls = list(_layer_calls(graph_module, "", set()))
    for planned in calls:
        try:
            planned.outcome = _decide(planned, value_of, choices)
        except NoValue as error:
            layer, path = planned.site.layer.layer_name, planned.site.path
            if need_values:
                raise ValueError(
                    f"{error}, and layer {layer} at {path} takes it: pass example_inputs"
                ) from None
            planned.outcome = KeepReference(planned.site, Reason.NOT_AN_OP, str(error))
    return calls


def plan_from_inputs(
    graph_module: fx.GraphModule, example_inputs: Sequence[object], choices: GraphDecisions
) -> list[PlannedCall]:
    """Decide as `plan` does, by the values of a run on fakes, and store these in the metadata.

    In this run a call that becomes an op returns the results that are inferred for the op, so that
    its reference does not have to run.
    """
    calls = list(_layer_calls(graph_module, "", set()))
    by_node = {planned.node: planned for planned in calls}
    values: dict[fx.Node, object] = {}

    def forward_of(node: fx.Node, module: nn.Module) -> Callable[..., object]:
        if (planned := by_node.get(node)) is None:
            return module
        earlier, outcome = planned.outcome, _decide(planned, values.__getitem__, choices)
        planned.outcome = outcome
        if isinstance(outcome, KeepReference):
            return _reference(planned.site, module)
        lowered = outcome.lowered
        if earlier is not None and not _is_op(earlier, lowered):
            # A graph module that is called twice has one node for both calls.
            detail = "the graph module around it is called with tensors of several kinds"
            planned.outcome = KeepReference(planned.site, Reason.NOT_AN_OP, detail)
        return lambda *args, **kwargs: lowered.output.unflatten(make_fakes(lowered.results))

    propagate(graph_module, example_inputs, values, forward_of)
    for node, value in values.items():
        node.meta.pop("example_value", None)
        node.meta["val"] = value
    return calls


def _is_op(outcome: Replacement | KeepReference, lowered: Lowered) -> bool:
    return isinstance(outcome, Replacement) and outcome.lowered.name == lowered.name


def _reference(site: Site, module: nn.Module) -> Callable[..., object]:
    """Return the function that computes the value of a call that keeps its reference."""
    if site.layer.fake is not None:
        return functools.partial(site.layer.fake, module)
    if isinstance(vars(module).get("forward"), BoundForward):  # a kernel, which may need memory
        return functools.partial(site.layer.reference, module)
    return module


# --- the calls of layers ------------------------------------------------------------------------


def _layer_calls(
    graph_module: fx.GraphModule, prefix: str, seen: set[nn.Module]
) -> Iterator[PlannedCall]:
    """Yield the calls of extensible layers in a graph module, and in those that it calls."""
    seen.add(graph_module)
    for node in graph_module.graph.nodes:
        target = node.target
        if node.op == "call_module":
            module, path = graph_module.get_submodule(target), f"{prefix}{target}"
        elif node.op == "call_function" and isinstance(target, nn.Module):
            module, path = target, _path_of_function(node)
        else:
            continue
        if (layer := extensible(type(module))) is not None:
            yield PlannedCall(graph_module, node, Site(module, layer, path))
        elif isinstance(module, fx.GraphModule) and module not in seen:
            yield from _layer_calls(module, f"{path}.", seen)


def _path_of_function(node: fx.Node) -> str:
    """Return the path that `kernelgraph.kernelize` gives to a function: that of a member of the
    module that calls it."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path = list(stack.values())[-1][0]
    name = getattr(node.target, "__name__", node.name)
    return f"{path}.{name}" if path else name


# --- one decision -------------------------------------------------------------------------------


def _decide(
    planned: PlannedCall, value_of: ValueOf, choices: GraphDecisions
) -> Replacement | KeepReference:
    """Decide about a call by the values of its inputs, and complete its site.

    Raises:
        NoValue: If a value is missing.
    """
    try:
        return _replacement(planned, value_of, choices)
    except KeepReference as kept:
        return kept
    except NoValue:
        raise
    except UnsupportedValue as error:
        return KeepReference(planned.site, Reason.NOT_AN_OP, str(error))


def _check_hooks(module: nn.Module) -> None:
    """Refuse a layer with hooks, which run in a call of the module and in no call of an op."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        raise UnsupportedValue("it has hooks, which an op would not run")


def _replacement(planned: PlannedCall, value_of: ValueOf, choices: GraphDecisions) -> Replacement:
    """Return the op for a call, or raise why there is none.

    Raises:
        KeepReference, UnsupportedValue: If the call keeps its reference.
    """
    node, layer = planned.node, planned.site.layer
    # 1. The arguments, with values in the place of nodes.
    operand = functools.partial(_operand, value_of=value_of)
    args, kwargs = plain(node.args, operand), plain(node.kwargs, operand)
    # 2. The kernel, and the layer's state that it reads.
    tensors = _torch.tensor_leaves((args, kwargs))
    planned.site, kernel, state = choices.kernel_for(planned.site, tensors)
    _check_state(node, state)
    _check_hooks(planned.site.module)
    # The tensors themselves: making fakes of them would take most of the pass's time.
    values = [read(planned.site.module, path) for path in state.tensors]
    # 3. The call's signature, and the op for it.
    call, operands = Call.of(state, values, layer, args, kwargs)
    # The graph may later run with tensors that require gradients where those of now do not.
    every = choices.training is not None
    lowered, gradient = op_for(planned.site, kernel, call, operands, choices.options, every=every)
    if lowered.written:
        names = ", ".join(call.names[i] for i in lowered.written)
        raise UnsupportedValue(f"{layer.reference.__qualname__} writes into {names}")
    if lowered.aliases:
        names = ", ".join(call.names[i] for _, i in lowered.aliases)
        raise UnsupportedValue(f"{layer.reference.__qualname__} returns {names}")
    return Replacement(kernel, call, operands, lowered, gradient)


def _operand(node: fx.Node, value_of: ValueOf) -> object:
    """Return the value of a node that a layer takes.

    Raises:
        UnsupportedValue: If it is neither made of tensors nor of numbers. It would become a
            constant of the op, while the graph may compute another value when it runs.
    """
    value = value_of(node)
    for leaf in (value,) if isinstance(value, Tensor) else _torch.tree_leaves(value):
        if not (isinstance(leaf, (Tensor, torch.SymInt)) or type(leaf) in (int, float)):
            raise UnsupportedValue(
                f"{node} is {leaf!r} where the graph was looked at, and may be another value "
                "when it runs"
            )
    return value


def _check_state(node: fx.Node, state: State) -> None:
    """Refuse state that ``get_attr`` nodes cannot read: these go by names alone."""
    for path in state.tensors:
        if not all(isinstance(step, str) for step in path):
            text = path_text(path)
            raise UnsupportedValue(f"a tensor that it reads is in a container, self.{text}")
    if state.tensors and node.op == "call_function":
        raise UnsupportedValue("it is called as a function, and the graph has not its state")
