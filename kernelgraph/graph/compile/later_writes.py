"""Copies of operands that a graph writes into after the calls that a gradient flows through.

An op for training saves operands that the layer itself may not need for its gradient. Autograd
raises an error where a saved tensor was written into, so the op saves a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from kernelgraph.graph.infer import versions
from kernelgraph.graph.ops import NAMESPACE


class SavedOperands:
    """The operands of the calls in one graph that a gradient flows through, as fakes."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int]] = []

    def add(self, operands: Sequence[object]) -> None:
        """Note the operands of a call at the point where it is traced."""
        seen = zip(operands, versions(operands), strict=True)
        self._seen += [(v, version) for v, version in seen if isinstance(v, Tensor)]

    def copy_written(self, graph_module: fx.GraphModule) -> None:
        """Have the ops take copies of those that were written into since, in a finished graph."""
        fakes = [v for v, _ in self._seen]
        pairs = zip(self._seen, versions(fakes), strict=True)
        written = {id(v) for (v, before), now in pairs if now != before}
        if not written:
            return
        for module in graph_module.modules():
            if isinstance(module, fx.GraphModule):
                _copy_operands(module, written)


def _copy_operands(module: fx.GraphModule, written: set[int]) -> None:
    for node in list(module.graph.nodes):
        if not _is_training_op(node.target):
            continue
        for operand in node.all_input_nodes:
            if id(operand.meta.get("example_value")) in written:
                with module.graph.inserting_before(node):
                    copy = module.graph.call_function(torch.clone, (operand,))
                copy.meta = {**operand.meta}
                node.replace_input_with(operand, copy)
    module.recompile()


def _is_training_op(target: object) -> bool:
    name = str(target)
    return name.startswith(f"{NAMESPACE}.") and name.endswith("_training.default")
