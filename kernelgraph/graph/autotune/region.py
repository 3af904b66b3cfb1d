"""The neighbourhood of a node: the part of a graph that a compiler may fuse with it.

A layer that is timed alone tells little of what it costs in a graph, where Inductor would compute
it together with the additions and casts around it, and a kernel keeps it from that. So a node is
cut out with what is next to it: the nodes before and behind, up to those that are computed by
themselves whatever is around them (matrix products, attention, other kernels). Behind a value that
somebody else needs too, and that is in memory anyway, nothing more is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from kernelgraph.graph import _torch
from kernelgraph.graph.infer import NoValue, value_of
from kernelgraph.graph.ops import NAMESPACE

_APART = frozenset(
    [
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "addbmm",
        "baddbmm",
        "addmv",
        "mv",
        "dot",
        "einsum",
        "tensordot",
        "bilinear",
        "embedding",
        "embedding_bag",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "lstm",
        "gru",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "_grouped_mm",
        "_scaled_mm",
        "_scaled_grouped_mm",
    ]
)
"""Functions that a compiler does not fuse with what is around them, by name."""
_IN_PLACE = frozenset(["setitem", "iadd", "imul", "isub"])
"""Functions that write into what they are given, and whose names do not tell."""
_FURTHEST = 8
"""How many nodes away from the one in the middle one may be."""
_MOST = 48
"""Nodes in a neighbourhood."""


class Neighbourhood(NamedTuple):
    """A node with what is around it, as a graph of its own."""

    graph_module: fx.GraphModule
    inputs: list[Any]
    """For each placeholder the value that it has where the graph is traced; of tensors, fakes."""
    node: fx.Node


def cut(graph_module: fx.GraphModule, node: fx.Node) -> Neighbourhood:
    """The neighbourhood of a node.

    Raises:
        NoValue: A node at its edge carries none.
    """
    # A result that nobody uses, a handle of a run, say, other programs do not have.
    inside = {other for other in _around(node) if other.users or other is node}
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    inputs: list[Any] = []

    def copied(other: fx.Node) -> Any:
        if other not in made:
            value = value_of(other)
            if isinstance(value, torch.SymInt):  # sizes are those of this call
                return int(_torch.hint(value))
            made[other] = graph.placeholder(f"input_{len(inputs)}")
            inputs.append(value)
        return made[other]

    ordered = [other for other in graph_module.graph.nodes if other in inside]
    edges = {o for n in ordered for o in n.all_input_nodes if o not in inside}
    for other in graph_module.graph.nodes:  # placeholders come first
        if other in edges:
            copied(other)
    for other in ordered:
        made[other] = graph.node_copy(other, copied)
    used = [n for n in ordered if any(user not in inside for user in n.users)]
    outputs = [n for n in used if isinstance(_value(n), Tensor)]
    graph.output(tuple(made[n] for n in outputs))
    return Neighbourhood(fx.GraphModule(graph_module, graph), inputs, made[node])


def _around(node: fx.Node) -> set[fx.Node]:
    inside = {node}
    inside.update(_pieces(node))
    edge: list[fx.Node] = [node]
    for _ in range(_FURTHEST):  # towards the inputs
        taken = _take([other for n in edge for other in n.all_input_nodes], inside)
        for other in taken:
            inside.update(_pieces(other))
        # A value that others need too is in memory anyway: what is behind it does not matter.
        edge = [other for other in taken if set(other.users) <= inside]
    edge = [node, *_pieces(node)]
    for _ in range(_FURTHEST):  # towards the outputs
        edge = _take([user for n in edge for user in n.users], inside)
    return inside


def _take(found: Iterable[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
    """Put into a neighbourhood what belongs there, while there is room; the nodes that were."""
    taken = []
    for other in dict.fromkeys(found):
        if other not in inside and len(inside) < _MOST and _is_fused(other):
            inside.add(other)
            taken.append(other)
    return taken


def _value(node: fx.Node) -> Any:
    try:
        return value_of(node)
    except NoValue:
        return None


def _pieces(node: fx.Node) -> list[fx.Node]:
    """The nodes that take the results of one with several apart."""
    if isinstance(_value(node), Tensor):
        return []
    return [user for user in node.users if user.all_input_nodes == [node]]


def _is_fused(node: fx.Node) -> bool:
    value = _value(node)
    parts = value if isinstance(value, (tuple, list)) else [value]
    if not any(isinstance(part, Tensor) for part in parts):
        return False  # a size, or what switches autocast on
    name = str(node.target)
    if node.op == "call_function":
        qualified = getattr(node.target, "_name", "")
        ours = isinstance(qualified, str) and qualified.startswith(f"{NAMESPACE}::")
        if ours or _torch.is_higher_order(node.target):
            return False
        name = getattr(node.target, "__name__", "").partition(".")[0]
    elif node.op != "call_method":
        return False
    in_place = name.endswith("_") and not name.endswith("__")
    return name not in _APART and not in_place and name not in _IN_PLACE
