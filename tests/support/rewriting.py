"""Graphs for tests of `kernelgraph.rewrite`, and what it made of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import kernelgraph
from kernelgraph import Mode, Tracer, rewrite
from kernelgraph.report import Reason
from tests.support.toy_models import OpaqueScale
from tests.support.toys import only

X = torch.arange(4.0)
INFERENCE, TRAINING = Mode.INFERENCE, Mode.TRAINING


def traced(model: nn.Module) -> fx.GraphModule:
    """Trace a model with extensible layers as leaves."""
    return fx.GraphModule(model, Tracer().trace(model))


def ops_of(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes of kernel ops."""
    return [n for n in graph_module.graph.nodes if "hubkernels" in str(n.target)]


def rewritten(model: nn.Module, *inputs: Any, mode: Mode = INFERENCE, **layers: Any) -> Any:
    """Trace and rewrite a model with kernels for ``layers``, by default only for ``Scale``."""
    graph_module = traced(model)
    with only(**(layers or {"Scale": OpaqueScale})):
        # The toys add 10, which a kernel that is verified before it trains anything may not.
        return rewrite(graph_module, mode=mode, example_inputs=inputs, verify_gradients=False)


def kernelized(model: nn.Module, kernel: type[nn.Module] = OpaqueScale) -> nn.Module:
    """Return a copy of a model that is kernelized for eager use."""
    with only(Scale=kernel):
        return kernelgraph.kernelize(copy.deepcopy(model), mode=INFERENCE)


def decisions() -> list[tuple[str, Reason, str]]:
    """Return path, reason and detail of each decision in the report of the last rewrite."""
    report = kernelgraph.last_report()
    assert report is not None
    assert report.source == "rewrite"
    return [(d.path, d.reason, d.detail) for d in report.decisions]


def description(value: Any) -> Any:
    """Return the sizes, strides, dtype and device of each tensor in a value."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return [description(part) for part in value]
    if isinstance(value, dict):
        return {key: description(part) for key, part in value.items()}
    return None  # a number, say, of which torch 2.11's FakeTensorProp keeps nothing


def assert_values_are_right(graph_module: fx.GraphModule, *inputs: Tensor, key: str = "val"):
    """Check that each node has the value that a run of the graph on fakes gives."""
    other = copy.deepcopy(graph_module)
    FakeTensorProp(other, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    pairs = zip(graph_module.graph.nodes, other.graph.nodes, strict=True)
    for node, again in pairs:
        if node.op != "output":
            assert description(node.meta[key]) == description(again.meta["val"]), node


class Wide(nn.Module):
    """A layer without state, for tensors of any size."""

    kernel_layer_name = "Wide"

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Wide10(nn.Module):
    def forward(self, x):
        return x * 2 + 10
