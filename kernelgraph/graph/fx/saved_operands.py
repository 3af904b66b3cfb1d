"""Copies, in graphs for training, of what ops save for their backwards and later nodes write into.

An op saves operands that the layer itself may not need: its gradient is a kernel's, or comes from
running the layer again. Where a later node writes into such an operand, autograd would raise an
error that there is none of without the kernel. So the op takes a copy of it, and where the op saves
its own result, what comes after takes a copy of that.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from kernelgraph.graph import _torch
from kernelgraph.graph.infer import NoValue, value_of
from kernelgraph.graph.ops import NAMESPACE, saved_by, unpack

_IN_PLACE = frozenset({operator.setitem, operator.iadd, operator.isub, operator.imul})
"""Functions that write into their first argument, and whose names do not end with an underscore."""


def copy_saved_operands(graph_module: fx.GraphModule) -> int:
    """Copy, in a graph and those that it calls, what ops save and later nodes write into.

    Nodes carry fake values, which tell what shares memory.

    Returns:
        The number of copies.
    """
    modules = [m for m in graph_module.modules() if isinstance(m, fx.GraphModule)]
    return sum(map(_copy_in, modules))


def _copy_in(graph_module: fx.GraphModule) -> int:
    graph = graph_module.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    ops = [node for node in order if _is_training_op(node) or _has_training_ops(node)]
    if not ops:
        return 0
    writes = [(order[node], memory) for node in order for memory in _written(node)]
    if not writes:
        return 0

    def is_written_after(node: fx.Node, op: fx.Node) -> bool:
        memory = _memory(node)
        return memory is not None and any(at > order[op] and memory == m for at, m in writes)

    copied = 0
    for op in ops:
        saved = saved_by(_name(op).removeprefix(f"{NAMESPACE}::"))
        operands = unpack(list(op.args), saved.packed)
        taken = {operands[i] for i in saved.operands if isinstance(operands[i], fx.Node)}
        if not _is_training_op(op):  # a checkpoint may save all that it is given
            taken = set(op.all_input_nodes)
        for node in sorted(taken, key=order.__getitem__):
            if is_written_after(node, op):
                with graph.inserting_before(op):
                    op.replace_input_with(node, _clone(graph, node))
                copied += 1
        for node in _results(op, saved.results):
            if is_written_after(node, op):
                users = list(node.users)
                with graph.inserting_after(node):
                    copy = _clone(graph, node)
                for user in users:
                    user.replace_input_with(node, copy)
                copied += 1
    if copied:
        graph.lint()
        graph_module.recompile()
    return copied


def _clone(graph: fx.Graph, node: fx.Node) -> fx.Node:
    made = graph.call_function(torch.clone, (node,))
    made.meta = dict(node.meta)
    return made


def _name(node: fx.Node) -> str:
    name = getattr(node.target, "_name", "")
    return name if isinstance(name, str) else ""


def _is_training_op(node: fx.Node) -> bool:
    return _name(node).startswith(f"{NAMESPACE}::") and _name(node).endswith("_training")


def _has_training_ops(node: fx.Node) -> bool:
    """Whether a node runs a subgraph, that of a checkpoint for example, with ops for training."""
    if not _torch.is_higher_order(node.target):
        return False
    owner = node.graph.owning_module
    inner = [n for n in node.all_input_nodes if n.op == "get_attr" and owner is not None]
    graphs = [getattr(owner, str(n.target), None) for n in inner]
    return any(
        _is_training_op(n) or _has_training_ops(n)
        for graph in graphs
        if isinstance(graph, fx.GraphModule)
        for n in graph.graph.nodes
    )


def _results(op: fx.Node, numbers: frozenset[int]) -> list[fx.Node]:
    """Return the nodes that stand for some of an op's results."""
    return [
        user for user in op.users if user.target is operator.getitem and user.args[1] in numbers
    ]


def _memory(node: fx.Node) -> object:
    """Return the identity of the memory of a node's value; None where it has none."""
    try:
        value = value_of(node)
    except NoValue:
        return None
    if isinstance(value, Tensor) and value.layout is torch.strided:
        with contextlib.suppress(NotImplementedError):  # of a tensor under a transform
            return _torch.storage_of(value)
    return None


def _written(node: fx.Node) -> Iterator[object]:
    """Yield the memory that a node writes into, as far as its name or its schema tell."""
    given: list[Any] = []
    if node.op == "call_method":
        given = [*node.args[:1]] if _ends_in_place(str(node.target)) else []
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if node.target in _IN_PLACE or _ends_in_place(name) or node.kwargs.get("inplace") is True:
            given = [*node.args[:1]]
        given += [
            value
            for value, writes in _torch.arguments_of(node.target, node.args, node.kwargs).values()
            if writes
        ]
        given.append(node.kwargs.get("out"))
    for value in given:
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, fx.Node) and (memory := _memory(part)) is not None:
                yield memory


def _ends_in_place(name: str) -> bool:
    name = name.partition(".")[0]
    return name.endswith("_") and not name.endswith("__")
