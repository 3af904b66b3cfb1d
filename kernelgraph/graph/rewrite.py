"""The FX pass: extensible layers that are leaves of a graph become kernel ops.

Dynamo's graphs come with their kernels in them (`kernelgraph.graph.layer_call`). In others, those
of ``torch.fx`` tracers with layers as leaves, an extensible layer is one ``call_module`` node. The
pass

1. walks the nodes once, and asks for each such node the same question as capture does;
2. writes the op's call in front of it, with ``get_attr`` nodes for the state that the op reads;
3. hands the node's uses to the op's results, and removes what is now unused.

It is legal because an op returns what the layer's reference does: tensors of the same ranks,
dtypes and devices, in the same structure; a layer for which that is not so keeps its node.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kernelgraph.graph.call import Call, UnsupportedValue, put_leaves
from kernelgraph.graph.choice import Choices, KeepReference, Site
from kernelgraph.graph.ops import Lowered, lower, overload
from kernelgraph.graph.paths import path_text, read
from kernelgraph.graph.shapes import Result
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
        Exception: What `kernelgraph.kernel.decide` and `kernelgraph.graph.ops.lower` raise.
    """
    replaced = 0
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(node.target)
        layer = extensible(type(module))
        if layer is None:
            continue
        try:
            _replace(graph_module, node, Site(module, layer, node.target), choices)
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
    try:
        fakes = _plain(node.args, _fake_of), _plain(node.kwargs, _fake_of)
    except UnsupportedValue as error:
        raise KeepReference(site, Reason.NOT_AN_OP, str(error)) from None
    tensors = [t for t in pytree.tree_leaves(fakes) if isinstance(t, Tensor)]
    site, kernel, state = choices.settle(site, tensors)
    for path in state.tensors:  # a get_attr node goes by names alone
        if not all(isinstance(step, str) for step in path):
            detail = f"a tensor that it reads is in a container, self.{path_text(path)}"
            raise KeepReference(site, Reason.NOT_AN_OP, detail)
    try:
        # The state as it is: making fakes of it would take most of the pass's time.
        values = [read(site.module, path) for path in state.tensors]
        call, operands = Call.of(state, values, site.layer, *fakes)
        lowered = lower(kernel, site.layer, call, operands, training=site.grad)
    except UnsupportedValue as error:
        raise KeepReference(site, Reason.NOT_AN_OP, str(error)) from None
    _check_fits(node, lowered, site)

    graph = graph_module.graph
    value_key = next((key for key in _VALUES if key in node.meta), "val")
    with graph.inserting_before(node):
        arguments: Any = (args, kwargs)
        given = [read(arguments, path) for path in call.argument_paths]
        for path in state.tensors:
            # Not by graph.get_attr, which warns of tensors that are neither parameter nor buffer.
            target = f"{site.path}.{path_text(path)}"
            given.append(graph.create_node("get_attr", target))
        given += [number for _, number in state.numbers]
        op = graph.call_function(overload(lowered.name), tuple(given))
        op.meta = {key: node.meta[key] for key in _ORIGIN if key in node.meta}
        results = [op]
        if (count := len(lowered.results)) > 1:
            results = [graph.call_function(operator.getitem, (op, i)) for i in range(count)]
    _hand_over(graph, node, put_leaves(lowered.output, results))
    if count > 1:
        op.meta[value_key] = tuple(piece.meta.get(value_key) for piece in results)
        for piece in results:
            if not piece.users:
                graph.erase_node(piece)
    choices.decisions.append(site.decision(Reason.KERNEL, str(kernel), "", lowered.qualname))


def _check_fits(node: fx.Node, lowered: Lowered, site: Site) -> None:
    """Keep a node that the op's results would not fit in the place of."""

    def keep(detail: str) -> KeepReference:
        return KeepReference(site, Reason.NOT_AN_OP, detail)

    pieces = put_leaves(lowered.output, lowered.results)
    if isinstance(pieces, Result):
        uses = [(node, pieces)]
    else:
        # Results that are not one tensor can only be handed over piece by piece.
        uses = []
        for user in node.users:
            try:
                piece = pieces[user.args[1]] if user.target is operator.getitem else None
            except (LookupError, TypeError):
                piece = None
            if not isinstance(piece, Result):
                raise keep("what it returns is used as a whole")
            uses.append((user, piece))
    for traced, result in uses:
        value = next((traced.meta[key] for key in _VALUES if key in traced.meta), None)
        if isinstance(value, Tensor) and _form(value) != _form(result):
            raise keep(f"the kernel returns a {_form(result)}, and the layer a {_form(value)}")


def _form(value: Any) -> str:
    return f"{len(value.shape)}-d {value.dtype} tensor on {value.device.type}"


def _hand_over(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Put ``value``, a node or nodes in a container, in the place of ``node``."""
    if isinstance(value, fx.Node):
        value.meta |= {key: node.meta[key] for key in _VALUE_META if key in node.meta}
        node.replace_all_uses_with(value)
    else:
        for user in list(node.users):
            piece = value[user.args[1]]
            piece.meta = dict(user.meta)
            user.replace_all_uses_with(piece)
            graph.erase_node(user)
    graph.erase_node(node)


_VALUES = ("val", "example_value")
_VALUE_META = (*_VALUES, "tensor_meta")
_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


def _plain(value: Any, each: Callable[[fx.Node], Any] = lambda node: node) -> Any:
    """A node's arguments in Python's own containers, and ``each`` node in them replaced."""
    if isinstance(value, fx.Node):
        return each(value)
    if isinstance(value, list):
        return [_plain(part, each) for part in value]
    if type(value) is tuple:
        return tuple([_plain(part, each) for part in value])
    if isinstance(value, dict):
        return {key: _plain(part, each) for key, part in value.items()}
    return value


def _fake_of(node: fx.Node) -> Any:
    for key in _VALUES:
        if key in node.meta:
            return node.meta[key]
    raise UnsupportedValue(f"node {node} carries no fake value")
