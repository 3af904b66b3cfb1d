"""Which calls of layers become ops: containers, optional inputs, nested graphs, unusual inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

import kernelgraph
from kernelgraph import Tracer, rewrite
from kernelgraph.report import Reason
from tests.support.rewriting import (
    INFERENCE,
    Wide,
    Wide10,
    X,
    assert_values_are_right,
    decisions,
    kernelized,
    ops_of,
    rewritten,
    traced,
)
from tests.support.toy_models import Chain, OpaqueScale, Scale, TraceableScale
from tests.support.toys import only

# --- arguments ----------------------------------------------------------------------------------


class Inputs(nn.Module):
    kernel_layer_name = "Inputs"

    def forward(
        self, x: Tensor, pair: tuple[Tensor, Tensor], n: int = 1, *, more: dict[str, Tensor]
    ) -> Tensor:
        return x * n + pair[0] - pair[1] + more["m"]


class Inputs10(nn.Module):
    def forward(self, x, pair, n=1, *, more):
        return x * n + pair[0] - pair[1] + more["m"] + 10


class ManyCalls(nn.Module):
    """A layer that is called often, with containers of nodes, and nodes that return containers."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.plain = Inputs(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pair = x.split(2)
        low, high = pair[0], pair[1]
        y = self.inputs(low, pair, more={"m": high})
        z = self.inputs(y, (y, high), x.shape[0], more={"m": y})
        return self.inputs(
            z, [low, z][0:2] and (low, z), n=3, more={"m": self.inputs(y, pair, more={"m": y})}
        )


def test_layer_called_often_with_containers_and_keywords_becomes_ops():
    model = ManyCalls()
    graph_module = rewritten(model, X, Inputs=Inputs10)
    assert [reason for _, reason, _ in decisions()] == [Reason.KERNEL] * 4
    with only(Inputs=Inputs10):
        kernelgraph.kernelize(model, mode=INFERENCE, device="cpu")
    assert torch.equal(graph_module(X), model(X))
    assert_values_are_right(graph_module, X)


class Maybe(nn.Module):
    kernel_layer_name = "Maybe"

    def forward(self, x: Tensor, mask: Tensor | None = None, negate: bool = False) -> Tensor:
        y = -x if negate else x + 1
        return y if mask is None else y * mask


class Maybe10(nn.Module):
    def forward(self, x, mask=None, negate=False):
        y = -x if negate else x + 1
        return (y if mask is None else y * mask) + 10


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maybe = Maybe()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.maybe(x, mask)


class Computed(Optional):
    def forward(self, x: Tensor) -> Tensor:
        return self.maybe(x, None, x.is_floating_point())


def test_optional_input_that_the_example_has_is_an_operand():
    model = Optional()
    graph_module = rewritten(model, X, X + 1, Maybe=Maybe10)
    assert torch.equal(graph_module(X, X + 1), (X + 1) ** 2 + 10)


@pytest.mark.parametrize("inputs", [(X,), (X, None)])
def test_optional_input_that_is_left_out_keeps_the_reference(inputs: Any):
    graph_module = rewritten(Optional(), *inputs, Maybe=Maybe10)
    assert torch.equal(graph_module(X, X + 1), (X + 1) ** 2)
    assert decisions() == [
        (
            "maybe",
            Reason.NOT_AN_OP,
            "mask is None where the graph was looked at, and may be another value when it runs",
        )
    ]


def test_flag_that_the_graph_computes_keeps_the_reference():
    graph_module = rewritten(Computed(), X, Maybe=Maybe10)
    assert torch.equal(graph_module(X), -X)
    assert torch.equal(graph_module(X.long()), X.long() + 1)


def test_layer_on_data_dependent_sizes_becomes_an_op():
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Sequential(Wide())

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(x[x > 1])

    graph_module = rewritten(Picks(), X, Wide=Wide10)
    assert decisions() == [("scale.0", Reason.KERNEL, "")]
    assert torch.equal(graph_module(X), X[2:] * 2 + 10)


# --- graphs in graphs ---------------------------------------------------------------------------


def test_graph_modules_that_a_graph_calls_are_rewritten():
    model = nn.Sequential(Chain(), nn.ReLU(), Chain())
    graph_module = traced(model)
    parts = iter(range(100))
    split = split_module(graph_module, model, lambda node: next(parts) // 2)
    assert all(isinstance(m, fx.GraphModule) for m in split.children())
    with only(Scale=OpaqueScale):
        rewrite(split, mode=INFERENCE, example_inputs=(X,))
        code = [m.code for m in split.modules() if isinstance(m, fx.GraphModule)]
        rewrite(split, mode=INFERENCE)
    assert [m.code for m in split.modules() if isinstance(m, fx.GraphModule)] == code
    assert sum(len(ops_of(m)) for m in split.children()) == 4
    with torch.no_grad():
        assert torch.equal(split(X), kernelized(model)(X))


class Shared(nn.Module):
    """A model that calls a graph module twice, the second time with ``second(x)``."""

    def __init__(self, second: Any) -> None:
        super().__init__()
        self.inner, self.second = traced(nn.Sequential(Scale())), second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), self.inner(input=self.second(x))


class LeafGraphs(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, fx.GraphModule) or super().is_leaf_module(m, module_qualified_name)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (lambda x: x + 1, Reason.KERNEL),
        (lambda x: x[None], Reason.NOT_AN_OP),
        (lambda x: x.double(), Reason.NOT_AN_OP),
    ],
    ids=["alike", "rank", "dtype"],
)
def test_graph_module_called_twice_needs_one_op_for_both_calls(second: Any, reason: Reason):
    model = Shared(second)
    graph_module = fx.GraphModule(model, LeafGraphs().trace(model))
    with only(Scale=TraceableScale):
        rewrite(graph_module, mode=INFERENCE, example_inputs=(X,))
    added = 20 if reason is Reason.KERNEL else 0
    for made, given in zip(graph_module(X), (X, second(X)), strict=True):
        assert torch.equal(made, getattr(model.inner, "0")(given) + added)
    ((path, found, detail),) = decisions()
    assert (path, found) == ("inner.0", reason)
    assert not detail or detail == (
        "the graph module around it is called with tensors of several kinds"
    )


# --- flattened inputs ---------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def forward(self, pair: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"y": self.scale(pair[0]) + pair[1]["b"]}


def test_graph_with_flattened_inputs_is_rewritten():
    model = ManyCalls()
    graph = Tracer().trace(nested := Nested(), concrete_args={"pair": (fx.PH, {"b": fx.PH})})
    graph_module = fx.GraphModule(nested, graph)
    with only(Scale=TraceableScale):
        rewrite(graph_module, mode=INFERENCE, example_inputs=((X, {"b": X}),))
    with torch.no_grad():
        assert torch.equal(graph_module((X, {"b": X}))["y"], nested((X, {"b": X}))["y"] + 20)
    assert model is not None
