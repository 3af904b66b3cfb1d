"""The region that is cut out of a graph around a node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, fx

from kernelgraph.graph.autotune.region import cut_region
from kernelgraph.graph.infer.node_values import NoValue

X = torch.randn(4, 8)
W = torch.randn(8, 8)


def traced(function: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> fx.GraphModule:
    """The graph that Dynamo makes of a function."""
    found: list[fx.GraphModule] = []

    def backend(graph_module: fx.GraphModule, example_inputs: Any) -> Any:
        found.append(graph_module)
        return graph_module.forward

    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    return found[0]


def middle(graph_module: fx.GraphModule) -> fx.Node:
    """The node that stands for a kernel."""
    return next(n for n in graph_module.graph.nodes if n.target is torch.sin)


def functions(graph_module: fx.GraphModule) -> list[str]:
    return [
        getattr(n.target, "__name__", str(n.target))
        for n in graph_module.graph.nodes
        if n.op in ("call_function", "call_method")
    ]


def test_region_ends_at_nodes_that_are_not_fused():
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w)
        y = torch.sin(F.silu(y) * 2).float() + 1
        return F.linear(y, w)

    graph_module = traced(function, X, W)
    around = cut_region(graph_module, middle(graph_module))
    assert functions(around.graph_module) == ["silu", "mul", "sin", "float", "add"]
    assert [tuple(v.shape) for v in around.inputs] == [(4, 8)]


def test_region_computes_what_the_graph_does():
    def function(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        a, b = (F.linear(x, w) + bias).chunk(2, -1)
        return torch.sin(a * b) + a

    graph_module = traced(function, X, W, W[0])
    around = cut_region(graph_module, middle(graph_module))
    product = F.linear(X, W)
    given = [product if tuple(v.shape) == (4, 8) else W[0] for v in around.inputs]
    results = around.graph_module(*given)
    assert any(torch.allclose(r, function(X, W, W[0])) for r in results)


def test_region_ends_behind_a_value_that_is_used_elsewhere():
    """A residual stream would lead through the whole model."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        x = F.relu(x) + 1
        x = x + F.linear(x, w)
        y = x + F.linear(torch.sin(x), w)
        return y * 2

    graph_module = traced(function, X, W)
    around = cut_region(graph_module, middle(graph_module))
    assert functions(around.graph_module) == ["add", "sin"]
    assert len(around.inputs) == 2


def test_values_used_outside_of_the_region_are_its_results():
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(x)
        z = torch.sin(y)
        return F.linear(z, w), F.linear(y, w)

    graph_module = traced(function, X, W)
    around = cut_region(graph_module, middle(graph_module))
    (output,) = (n for n in around.graph_module.graph.nodes if n.op == "output")
    assert sorted(n.target.__name__ for n in output.args[0]) == ["relu", "sin"]


def test_region_has_the_node_that_computes_indices():
    def function(x: Tensor, w: Tensor) -> Tensor:
        weights, index = F.linear(x, w).softmax(-1).topk(2, dim=-1)
        return torch.sin(weights) + index

    graph_module = traced(function, X, W)
    around = cut_region(graph_module, middle(graph_module))
    assert "topk" in functions(around.graph_module)
    assert [v.dtype for v in around.inputs] == [torch.float32]


def test_dynamic_sizes_are_those_of_the_trace():
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w)
        return torch.sin(y.view(y.shape[0] // 2, 2, y.shape[1])) + 1

    graph_module = traced(function, X, W, dynamic=True)
    around = cut_region(graph_module, middle(graph_module))
    assert all(isinstance(v, Tensor) for v in around.inputs)
    (result,) = around.graph_module(torch.ones(4, 8))
    assert result.shape == (2, 2, 8)


def test_region_is_small_in_a_long_chain():
    def function(x: Tensor) -> Tensor:
        for _ in range(30):
            x = F.relu(x)
        x = torch.sin(x)
        for _ in range(30):
            x = F.relu(x)
        return x

    graph_module = traced(function, X)
    around = cut_region(graph_module, middle(graph_module))
    assert functions(around.graph_module) == ["relu"] * 8 + ["sin"] + ["relu"] * 8


def test_region_has_no_writes_in_place():
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w)
        y.add_(1)
        z = torch.sin(y)
        z[0] = 0
        return z

    graph_module = traced(function, X, W)
    around = cut_region(graph_module, middle(graph_module))
    assert functions(around.graph_module) == ["sin"]


def test_graph_is_unchanged():
    graph_module = traced(lambda x: torch.sin(x + 1) * 2, X)
    before = str(graph_module.graph)
    around = cut_region(graph_module, middle(graph_module))
    assert str(graph_module.graph) == before
    assert around.node.graph is around.graph_module.graph


def test_nodes_without_values_are_an_error():
    graph_module = fx.symbolic_trace(lambda x: torch.sin(x + 1))
    with pytest.raises(NoValue):
        cut_region(graph_module, middle(graph_module))


def test_result_of_several_is_an_input_and_not_the_tuple():
    found = traced(lambda x: torch.sin(torch.max(x, dim=-1)[0] * 2), X)
    [pair] = [n for n in found.graph.nodes if isinstance(n.meta.get("example_value"), tuple)]
    pair.target = F.linear  # a node that is not fused, with several results
    region = cut_region(found, middle(found))
    assert functions(region.graph_module) == ["mul", "sin"]
    assert [type(value) for value in region.inputs] == [type(pair.meta["example_value"][0])]
