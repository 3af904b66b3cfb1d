"""What is to become of each call of an extensible layer in a graph; nothing is changed yet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, UnsupportedValue, path_text, read
from kernelgraph.graph.gradients import Gradient
from kernelgraph.graph.infer import NoValue, make_fakes, plain, propagate, value_of
from kernelgraph.graph.lowering import GraphDecisions, KeepReference, Site, op_for
from kernelgraph.graph.ops import Lowered
from kernelgraph.kernel import BoundForward, Kernel
from kernelgraph.layers import extensible
from kernelgraph.report import Reason


class Chosen(NamedTuple):
    """The op for a call."""

    kernel: Kernel
    call: Call
    operands: list[Any]
    lowered: Lowered
    gradient: Gradient | None


@dataclass
class Plan:
    """A node that calls an extensible layer, and what is to become of it."""

    graph_module: fx.GraphModule
    node: fx.Node
    site: Site
    outcome: Chosen | KeepReference | None = None
    """The op that takes its place, or why there is none; None: not decided."""


def plan(
    graph_module: fx.GraphModule, choices: GraphDecisions, *, need_values: bool = False
) -> list[Plan]:
    """Decide for each call of an extensible layer, by the values that the nodes carry.

    Args:
        graph_module: The graph.
        choices: Decides.
        need_values: Whether it is an error that a node carries none.

    Raises:
        ValueError: For want of a value.
        Exception: What `kernelgraph.kernel.decide` and `kernelgraph.graph.ops.registry.lower` raise.
    """
    plans = list(_layer_calls(graph_module, "", set()))
    for item in plans:
        try:
            item.outcome = _decide(item, value_of, choices)
        except NoValue as error:
            layer, path = item.site.layer.layer_name, item.site.path
            if need_values:
                raise ValueError(
                    f"{error}, and layer {layer} at {path} takes it: pass example_inputs"
                ) from None
            item.outcome = KeepReference(item.site, Reason.NOT_AN_OP, str(error))
    return plans


def plan_with(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], choices: GraphDecisions
) -> list[Plan]:
    """As `plan`, by the values of a run on fakes, which the nodes then carry.

    A call that becomes an op has the value that the op tells, so that no reference needs to run.
    """
    plans = list(_layer_calls(graph_module, "", set()))
    by_node = {item.node: item for item in plans}
    values: dict[fx.Node, Any] = {}

    def forward_of(node: fx.Node, module: nn.Module) -> Callable[..., Any]:
        if (item := by_node.get(node)) is None:
            return module
        before, item.outcome = item.outcome, _decide(item, values.__getitem__, choices)
        if isinstance(item.outcome, KeepReference):
            return _reference(item.site, module)
        lowered = item.outcome.lowered
        alike = isinstance(before, Chosen) and before.lowered.name == lowered.name
        if before is not None and not alike:
            detail = "the graph module around it is called with tensors of several kinds"
            item.outcome = KeepReference(item.site, Reason.NOT_AN_OP, detail)
        return lambda *args, **kwargs: lowered.output.unflatten(make_fakes(lowered.results))

    propagate(graph_module, example_inputs, values, forward_of)
    for node, value in values.items():
        node.meta.pop("example_value", None)
        node.meta["val"] = value
    return plans


def _reference(site: Site, module: nn.Module) -> Callable[..., Any]:
    """What tells the shape of a call that stays."""
    if site.layer.fake is not None:
        return functools.partial(site.layer.fake, module)
    if isinstance(vars(module).get("forward"), BoundForward):  # a kernel, which may need memory
        return functools.partial(site.layer.reference, module)
    return module


def _layer_calls(graph_module: fx.GraphModule, within: str, seen: set[nn.Module]) -> Iterator[Plan]:
    """The calls of extensible layers in a graph module, and in those that it calls."""
    seen.add(graph_module)
    for node in graph_module.graph.nodes:
        target = node.target
        if node.op == "call_module":
            module, path = graph_module.get_submodule(target), f"{within}{target}"
        elif node.op == "call_function" and isinstance(target, nn.Module):
            module, path = target, _path_of_function(node)
        else:
            continue
        if (layer := extensible(type(module))) is not None:
            yield Plan(graph_module, node, Site(module, layer, path))
        elif isinstance(module, fx.GraphModule) and module not in seen:
            yield from _layer_calls(module, f"{path}.", seen)


def _path_of_function(node: fx.Node) -> str:
    """As `kernelgraph.kernelize` has it: a member of the module that calls the function."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path = list(stack.values())[-1][0]
    name = getattr(node.target, "__name__", node.name)
    return f"{path}.{name}" if path else name


def _decide(
    item: Plan, value_of: Callable[[fx.Node], Any], choices: GraphDecisions
) -> Chosen | KeepReference:
    """What is to become of a call, given its inputs' values; its site is completed."""

    def operand(node: fx.Node) -> Any:
        value = value_of(node)
        for leaf in (value,) if isinstance(value, Tensor) else _torch.tree_leaves(value):
            if not (isinstance(leaf, (Tensor, torch.SymInt)) or type(leaf) in (int, float)):
                # As a constant of the op it would stay what it is now.
                raise UnsupportedValue(
                    f"{node} is {leaf!r} where the graph was looked at, and may be another value "
                    "when it runs"
                )
        return value

    site, node = item.site, item.node
    try:
        args, kwargs = plain(node.args, operand), plain(node.kwargs, operand)
        tensors = _torch.tensor_leaves((args, kwargs))
        site, kernel, state = choices.kernel_for(site, tensors)
        item.site = site
        for path in state.tensors:  # a get_attr node goes by names alone
            if not all(isinstance(step, str) for step in path):
                text = path_text(path)
                raise UnsupportedValue(f"a tensor that it reads is in a container, self.{text}")
        if state.tensors and node.op == "call_function":
            raise UnsupportedValue("it is called as a function, and the graph has not its state")
        # The state as it is: making fakes of it would take most of the pass's time.
        values = [read(site.module, path) for path in state.tensors]
        call, operands = Call.of(state, values, site.layer, args, kwargs)
        # The graph may be run with tensors that require gradients where those of now do not.
        every = choices.training is not None
        lowered, gradient = op_for(site, kernel, call, operands, choices.options, every=every)
        if lowered.written:
            names = ", ".join(call.names[i] for i in lowered.written)
            raise UnsupportedValue(f"{site.layer.reference.__qualname__} writes into {names}")
        return Chosen(kernel, call, operands, lowered, gradient)
    except KeepReference as kept:
        return kept
    except NoValue:
        raise
    except UnsupportedValue as error:
        return KeepReference(site, Reason.NOT_AN_OP, str(error))
