"""The region of a node: the part of a graph that a compiler may fuse with it.

The time of a layer alone says little of its cost in a graph: Inductor would compute it together
with the additions and casts around it, and a kernel prevents that. So a node is cut out with its
neighbours: the nodes before and behind it, up to those that are computed by themselves whatever
is around them (matrix products, attention, other kernels). Behind a value that is needed elsewhere
too, and that is in memory anyway, nothing more is taken.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from kernelgraph.graph import _torch
from kernelgraph.graph.infer import NoValue, value_of
from kernelgraph.graph.ops import NAMESPACE

_NOT_FUSED = frozenset(
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
"""The names of functions that a compiler does not fuse with the nodes around them."""
_IN_PLACE = frozenset(["setitem", "iadd", "imul", "isub"])
"""The names of functions that write into their arguments and do not end with an underscore."""
_MAX_DISTANCE = 8
"""The most nodes between a node of the region and the one in the middle, itself included."""
_MAX_NODES = 48
"""The most nodes in a region."""


class Region(NamedTuple):
    """A node with its neighbours, as a graph of its own."""

    graph_module: fx.GraphModule
    inputs: list[object]
    """The value of each placeholder in the trace; tensors are fakes."""
    node: fx.Node
    """The node in the middle."""


def cut_region(graph_module: fx.GraphModule, node: fx.Node) -> Region:
    """Copy the region of a node out of a graph.

    Raises:
        NoValue: If a node at its edge carries no fake value.
    """
    # A result without users, such as the handle of a kernel's run, is not in the other programs.
    inside = {other for other in _region_around(node) if other.users or other is node}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[object] = []

    def copied(other: fx.Node) -> fx.node.Argument:
        if other not in copies:
            value = value_of(other)
            if isinstance(value, torch.SymInt):  # sizes are those of this call
                return int(_torch.hint(value))
            if not isinstance(value, (Tensor, float, int)):
                raise NoValue(f"node {other} at the edge of a region is no tensor")
            copies[other] = graph.placeholder(f"input_{len(inputs)}")
            inputs.append(value)
        return copies[other]

    ordered = [other for other in graph_module.graph.nodes if other in inside]
    edges = {o for n in ordered for o in n.all_input_nodes if o not in inside}
    for other in graph_module.graph.nodes:  # placeholders come first
        if other in edges:
            copied(other)
    for other in ordered:
        copies[other] = graph.node_copy(other, copied)
    used = [n for n in ordered if any(user not in inside for user in n.users)]
    outputs = [n for n in used if isinstance(_value(n), Tensor)]
    graph.output(tuple(copies[n] for n in outputs))
    return Region(fx.GraphModule(graph_module, graph), inputs, copies[node])


def _region_around(node: fx.Node) -> set[fx.Node]:
    inside = {node}
    inside.update(_unpacking_nodes(node))
    edge: list[fx.Node] = [node]
    for _ in range(_MAX_DISTANCE):  # towards the inputs
        taken = _take([other for n in edge for other in n.all_input_nodes], inside)
        for other in taken:
            inside.update(_unpacking_nodes(other))
        # A value that is needed elsewhere is in memory anyway: what is behind it does not matter.
        edge = [other for other in taken if set(other.users) <= inside]
    edge = [node, *_unpacking_nodes(node)]
    for _ in range(_MAX_DISTANCE):  # towards the outputs
        edge = _take([user for n in edge for user in n.users], inside)
    # A result of a node outside is an input of the region, and not the tuple that it is taken from.
    while outside := [n for n in inside if _unpacks(n) and not inside.issuperset(n.args[:1])]:
        inside.difference_update(outside)
    return inside


def _unpacks(node: fx.Node) -> bool:
    """Whether a node takes one result of a node with several."""
    return node.target is operator.getitem and not isinstance(_value(node.args[0]), Tensor)


def _take(found: Iterable[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
    """Add nodes that may be fused to a region while there is room, and return those added."""
    taken = []
    for other in dict.fromkeys(found):
        if other not in inside and len(inside) < _MAX_NODES and _may_be_fused(other):
            inside.add(other)
            taken.append(other)
    return taken


def _value(node: Any) -> object:
    try:
        value: object = value_of(node)
    except NoValue:
        return None
    return value


def _unpacking_nodes(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that take the results of a node with several apart."""
    if isinstance(_value(node), Tensor):
        return []
    return [user for user in node.users if user.all_input_nodes == [node]]


def _may_be_fused(node: fx.Node) -> bool:
    """Whether a compiler may compute a node together with those around it."""
    value = _value(node)
    parts = value if isinstance(value, (tuple, list)) else [value]
    if not any(isinstance(part, Tensor) for part in parts):
        return False  # a size, or a switch of autocast
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
    return name not in _NOT_FUSED and not in_place and name not in _IN_PLACE
