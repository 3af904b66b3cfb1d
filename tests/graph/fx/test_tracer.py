"""Tracing with extensible layers, and extensible functions, as leaves."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import kernelgraph
from kernelgraph import Mode, Tracer, use_kernel_forward_from_hub, use_kernelized_func
from kernelgraph.report import Reason
from tests.support.toy_models import Chain, Scale, TraceableScale, on_cpu

X = torch.arange(4.0)


class Loop(nn.Module):
    """A layer that no tracer can trace."""

    kernel_layer_name = "Loop"
    kernel_fake = staticmethod(lambda self, x: torch.empty_like(x))

    def forward(self, x: Tensor) -> Tensor:
        while x.sum() < 100:
            x = x * 2 + 1
        return x.clone()


class Loop10(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() + 10)


@use_kernel_forward_from_hub("Twice")
def twice(x: Tensor, by: float = 2.0, *, shift: Tensor | None = None) -> Tensor:
    """Two times x."""
    y = x * by
    return y if shift is None else y + shift


class Twice10(nn.Module):
    def forward(self, x, by=2.0, *, shift=None):
        y = x * by
        return (y if shift is None else y + shift) + 10


@use_kernelized_func(twice)
class Calls(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twice(twice(x), 3.0, shift=x)


class Holds(nn.Module):
    """A module with the function as a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(x)


def traced(model: nn.Module, tracer: fx.Tracer | None = None) -> fx.GraphModule:
    return fx.GraphModule(model, (tracer or Tracer()).trace(model))


def nodes(graph_module: fx.GraphModule) -> list[tuple[str, Any]]:
    return [(n.op, n.target) for n in graph_module.graph.nodes if n.op.startswith("call")]


def test_extensible_layers_are_leaves():
    graph_module = traced(nn.Sequential(Chain(), nn.ReLU()))
    assert nodes(graph_module) == [
        ("call_module", "0.layers.0"),
        ("call_module", "0.layers.1"),
        ("call_module", "0.layers.2"),
        ("call_module", "1"),
    ]
    scale = next(iter(graph_module.graph.find_nodes(op="call_module")))
    assert list(scale.meta["nn_module_stack"].values()) == [
        ("0", Chain),
        ("0.layers.0", Scale),
    ]


def test_root_itself_is_traced_into():
    assert all(op == "call_function" for op, _ in nodes(traced(Scale())))


def test_layer_that_torch_cannot_trace_is_a_leaf():
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(nn.Sequential(Loop()))
    graph_module = traced(nn.Sequential(Loop()))
    assert torch.equal(graph_module(X), Loop()(X))
    with kernelgraph.use_kernel_mapping(on_cpu(Loop=Loop10)):
        kernelgraph.rewrite(graph_module, mode=Mode.INFERENCE, example_inputs=(X,))
    assert torch.equal(graph_module(X), X + 10)


class Untagged(Scale):
    """A subclass with another computation, and no layer name of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 7


def test_subclass_with_a_forward_of_its_own_is_traced_into():
    assert [op for op, _ in nodes(traced(nn.Sequential(Untagged())))] == ["call_function"]


def autowrapped(x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 0 else x


def test_arguments_and_overrides_of_torch_s_tracer_work():
    wrapped = Tracer(autowrap_functions=(autowrapped,)).trace(lambda x: autowrapped(x) * x)
    assert len(wrapped.find_nodes(op="call_function", target=autowrapped)) == 1
    concrete = Tracer().trace(lambda x, flag: x + 1 if flag else x, concrete_args={"flag": True})
    assert len(concrete.find_nodes(op="placeholder")) == 2

    class Deeper(Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return not isinstance(m, Scale) and super().is_leaf_module(m, module_qualified_name)

    assert ("call_module", "layers.0") not in nodes(traced(Chain(), Deeper()))


# --- functions ----------------------------------------------------------------------------------


def test_function_is_a_node():
    graph_module = traced(nn.Sequential(Calls()))
    assert nodes(graph_module) == [("call_function", twice)] * 2
    assert torch.equal(graph_module(X), X * 2 * 3 + X)
    again = pickle.loads(pickle.dumps(graph_module))
    assert torch.equal(again(X), X * 2 * 3 + X)


@pytest.mark.parametrize(
    ("model", "path"), [(Calls(), "twice"), (nn.Sequential(Calls()), "0.twice")]
)
def test_function_becomes_an_op(model: nn.Module, path: str):
    graph_module = traced(model)
    with kernelgraph.use_kernel_mapping(on_cpu(Twice=Twice10)):
        kernelgraph.rewrite(graph_module, mode=Mode.INFERENCE, example_inputs=(X,))
        report = kernelgraph.last_report()
        kernelgraph.kernelize(model, mode=Mode.INFERENCE, device="cpu")
    try:
        assert torch.equal(graph_module(X), model(X))
    finally:
        with kernelgraph.use_kernel_mapping({}, inherit_mapping=False):
            kernelgraph.kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert torch.equal(graph_module(X), (X * 2 + 10) * 3 + X + 10)
    assert report is not None
    assert [(d.path, d.reason) for d in report.decisions] == [(path, Reason.KERNEL)] * 2
    assert {d.path for d in kernelgraph.last_report().decisions} == {path}


def test_function_that_is_a_submodule_becomes_an_op():
    graph_module = traced(Holds())
    assert nodes(graph_module) == [("call_module", "twice")]
    with kernelgraph.use_kernel_mapping(on_cpu(Twice=Twice10)):
        kernelgraph.rewrite(graph_module, mode=Mode.INFERENCE, example_inputs=(X,))
    assert torch.equal(graph_module(X), X * 2 + 10)


class Nameless(nn.Module):
    """A function as other packages wrap it, without a name for generated code to call."""

    kernel_layer_name = "Nameless"

    def forward(self, x: Tensor) -> Tensor:
        return x + 5


NAMELESS, LOOSE = Nameless(), Scale()


def calling(layer: Callable[..., Any]) -> nn.Module:
    class Caller(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layer(x)

    return Caller()


def test_function_without_a_name_is_traced_into():
    assert [op for op, _ in nodes(traced(calling(NAMELESS)))] == ["call_function"]


def test_layer_that_is_not_in_the_model_is_torch_s_error():
    with pytest.raises(NameError, match="module is not installed as a submodule"):
        traced(calling(LOOSE))


def test_layer_with_state_that_is_called_as_a_function_keeps_its_reference():
    LOOSE.__name__ = "loose"
    graph = fx.Graph()
    graph.output(graph.call_function(LOOSE, (graph.placeholder("x"),)))
    graph_module = fx.GraphModule(nn.Module(), graph)
    with kernelgraph.use_kernel_mapping(on_cpu(Scale=TraceableScale)):
        kernelgraph.rewrite(graph_module, mode=Mode.INFERENCE, example_inputs=(X,))
    (decision,) = kernelgraph.last_report().decisions
    assert decision.detail == "it is called as a function, and the graph has not its state"
    assert torch.equal(graph_module(X), LOOSE(X))
