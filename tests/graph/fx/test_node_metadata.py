"""The metadata of the nodes that `kernelgraph.rewrite` writes, and of those that stay."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp

from kernelgraph import Tracer, rewrite
from tests.support.rewriting import INFERENCE, assert_values_are_right, ops_of, rewritten, traced
from tests.support.toy_models import Chain, OpaqueScale, Scale
from tests.support.toys import only


class Turned(nn.Module):
    """A layer that returns a transposed tensor; its op returns a contiguous one."""

    kernel_layer_name = "Turned"

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).t()


class Turned10(nn.Module):
    def forward(self, x):
        return (x + 11).t()


class Parts(nn.Module):
    kernel_layer_name = "Parts"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"sum": x + 1, "turned": x.t() + 0, "unused": x.sum()}


class Parts10(nn.Module):
    def forward(self, x):
        return {"sum": x + 11, "turned": x.t() + 10, "unused": x.sum() + 10}


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts, self.turned, self.scale = Parts(), Turned(), Scale()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts(x)
        return self.scale(self.turned(parts["turned"])) + parts["sum"]


BOTH = {"Turned": Turned10, "Parts": Parts10, "Scale": OpaqueScale}


SQUARE = torch.randn(4, 4)


def test_run_on_example_inputs_gives_each_node_its_value():
    graph_module = rewritten(Both(), SQUARE, **BOTH)
    assert len(ops_of(graph_module)) == 3
    assert_values_are_right(graph_module, SQUARE)
    leaves = [n.meta["val"] for n in graph_module.graph.nodes if isinstance(n.meta["val"], Tensor)]
    assert all(isinstance(v, FakeTensor) for v in leaves)
    assert len({v.fake_mode for v in leaves}) == 1


@pytest.mark.parametrize("key", ["val", "example_value"])
def test_values_that_nodes_carry_stay_and_new_nodes_get_theirs(key: str):
    graph_module = traced(Both())
    FakeTensorProp(graph_module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(SQUARE)
    ShapeProp(graph_module).propagate(SQUARE)
    kept = {}
    for node in graph_module.graph.nodes:
        node.meta[key] = node.meta.pop("val")
        node.meta["mine"] = node.name
        if node.op in ("placeholder", "output") or node.target is operator.add:
            kept[node] = dict(node.meta)
    with only(**BOTH):
        rewrite(graph_module, mode=INFERENCE)
    assert len(ops_of(graph_module)) == 3
    assert_values_are_right(graph_module, SQUARE, key=key)
    for node, meta in kept.items():
        assert node.meta == meta
    for node in graph_module.graph.nodes:
        if "tensor_meta" in node.meta and isinstance(node.meta[key], Tensor):
            assert node.meta["tensor_meta"].stride == node.meta[key].stride()


def test_op_has_the_module_stack_and_stack_trace_of_its_layer():
    model = nn.Sequential(Both())
    tracer = Tracer()
    tracer.record_stack_traces = True
    graph_module = fx.GraphModule(model, tracer.trace(model))
    expected = {
        n.target: (n.meta["nn_module_stack"], n.meta["stack_trace"])
        for n in graph_module.graph.find_nodes(op="call_module")
    }
    with only(**BOTH):
        rewrite(graph_module, mode=INFERENCE, example_inputs=(SQUARE,))
    assert list(expected) == ["0.parts", "0.turned", "0.scale"]
    for op, (stack, trace) in zip(ops_of(graph_module), expected.values(), strict=True):
        new = [op, *(n for n in op.all_input_nodes if n.op == "get_attr")]
        assert all(n.meta["nn_module_stack"] == stack for n in new)
        assert all(n.meta["stack_trace"] == trace for n in new)


def test_symbolic_sizes_stay_symbolic_and_unguarded():
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.randn(3, 4), symbolic_context=context, source=LocalSource("x"))
    graph_module = rewritten(Chain(), x)
    (first, last) = ops_of(graph_module)
    assert first.meta["val"].shape == x.shape
    assert isinstance(last.meta["val"].shape[0], torch.SymInt)
    assert mode.shape_env is not None
    assert mode.shape_env.guards == []
