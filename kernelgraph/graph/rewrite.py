"""The FX pass: extensible layers that are leaves of a graph become kernel ops.

Dynamo's graphs mostly come with their kernels in them (`kernelgraph.graph.layer_call`). In other
graphs, those of ``torch.fx`` tracers with layers as leaves, and Dynamo's where it is told not to
inline modules, an extensible layer is one ``call_module`` node. The pass

1. walks the nodes once, and asks for each such node the same question as capture does;
2. writes the op's call in front of it, with ``get_attr`` nodes for the state that the op reads;
3. hands the node's uses to the op's results, and removes what is now unused.

It is legal because an op returns what the layer's reference does: tensors of the same shapes and
dtypes, in the same structure; a layer for which that cannot be told keeps its node.
"""

from __future__ import annotations

import logging
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kernelgraph.graph import _torch
from kernelgraph.graph.call import Call, UnsupportedValue, put_leaves
from kernelgraph.graph.choice import Choices, KeepReference, Site
from kernelgraph.graph.ops import NAMESPACE, Lowered, lower
from kernelgraph.layers import extensible
from kernelgraph.report import Reason

logger = logging.getLogger("kernelgraph")


def rewrite(graph_module: fx.GraphModule, choices: Choices) -> int:
    """Replace ``call_module`` nodes of extensible layers by calls of kernel ops, in place.

    Args:
        graph_module: Its nodes carry their fake values, as ``val`` or ``example_value``.
        choices: Decides, and notes each decision.

    Returns:
        How many nodes were replaced.

    Raises:
        Exception: What `kernelgraph.kernel.decide` raises.
    """
    replaced = 0
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(node.target)
        layer = extensible(type(module))
        if layer is None:
            continue
        site = Site(module, layer, node.target)
        try:
            _replace(graph_module, node, site, choices)
            replaced += 1
        except KeepReference as kept:
            choices.decisions.append(kept.decision)
    if replaced:
        graph_module.graph.lint()
        graph_module.recompile()
        logger.debug("rewrite: %d call_module nodes became kernel ops", replaced)
    return replaced


def _replace(graph_module: fx.GraphModule, node: fx.Node, site: Site, choices: Choices) -> None:
    args, kwargs = _plain(node.args), _plain(node.kwargs)
    fake_args, fake_kwargs = _fakes(args, site), _fakes(kwargs, site)
    tensors = [t for t in pytree.tree_leaves((fake_args, fake_kwargs)) if isinstance(t, Tensor)]
    site = choices.place(site, tensors)
    kernel, state = choices.choose(site)
    try:
        with _torch.fake_mode_of(tensors) as as_fake:
            values = [as_fake(_attribute(site.module, path)) for path in state.tensors]
            call, operands = Call.of(state, values, site.layer, fake_args, fake_kwargs)
            lowered = lower(kernel, site.layer, call, operands, training=site.grad)
    except UnsupportedValue as error:
        raise KeepReference(site, Reason.NOT_AN_OP, str(error)) from None
    _check_uses(node, lowered, site)

    graph = graph_module.graph
    with graph.inserting_before(node):
        given = [_at((args, kwargs), keys) for keys in call.argument_keys]
        given += [graph.get_attr(".".join((site.path, *path))) for path in state.tensors]
        given += [number for _, number in state.numbers]
        overload = getattr(getattr(torch.ops, NAMESPACE), lowered.name).default
        op = graph.call_function(overload, tuple(given))
        results = [op]
        if (count := len(overload._schema.returns)) > 1:
            results = [graph.call_function(operator.getitem, (op, i)) for i in range(count)]
    _hand_over(graph, node, op, put_leaves(lowered.output, results))
    decision = site.decision(Reason.KERNEL, str(kernel), "", f"{NAMESPACE}::{lowered.name}")
    choices.decisions.append(decision)


def _check_uses(node: fx.Node, lowered: Lowered, site: Site) -> None:
    """Results that are not one tensor can only be handed over piece by piece."""
    pieces = put_leaves(lowered.output, [True] * 64)
    if pieces is True:
        return
    for user in node.users:
        if user.target is not operator.getitem or pieces[user.args[1]] is not True:
            raise KeepReference(site, Reason.NOT_AN_OP, "what it returns is used as a whole")


def _hand_over(graph: fx.Graph, node: fx.Node, op: fx.Node, value: Any) -> None:
    """Put ``value``, made by ``op``, in the place of ``node``."""
    op.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    if isinstance(value, fx.Node):
        op.meta |= {key: node.meta[key] for key in _VALUE_META if key in node.meta}
        node.replace_all_uses_with(value)
    else:
        for user in list(node.users):
            piece = value[user.args[1]]
            piece.meta = dict(user.meta)
            user.replace_all_uses_with(piece)
            graph.erase_node(user)
    graph.erase_node(node)


_VALUE_META = ("val", "example_value", "tensor_meta")
_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


def _plain(value: Any) -> Any:
    """A node's arguments in Python's own containers."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value)) if type(value) is tuple else list(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value


def _fakes(value: Any, site: Site) -> Any:
    def fake(node: fx.Node) -> Any:
        for key in _VALUE_META[:2]:
            if key in node.meta:
                return node.meta[key]
        raise KeepReference(site, Reason.NOT_AN_OP, f"node {node} carries no fake value")

    return pytree.tree_map_only(fx.Node, fake, value)


def _at(value: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        value = value[key]
    return value


def _attribute(module: nn.Module, path: tuple[str, ...]) -> Any:
    value: Any = module
    for name in path:
        value = getattr(value, name)
    return value
