"""`replace_layers`: planned calls become ops, and others keep their nodes."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kernelgraph
from kernelgraph import Mode
from kernelgraph.graph.fx.planner import plan
from kernelgraph.graph.fx.rewriter import replace_layers
from kernelgraph.graph.lowering.options import Options
from kernelgraph.graph.lowering.sites import GraphDecisions
from kernelgraph.kernel import Gradients
from kernelgraph.layers import CONDITION, FAKE, NAME
from kernelgraph.report import Reason
from kernelgraph.selection.mapping import KernelMapping
from tests.support.toy_models import on_cpu


class Scale(nn.Module):
    kernel_layer_name = "Scale"

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), factor))
        self.bias = nn.Parameter(torch.zeros(4))
        self.eps = 0.5

    def forward(self, x: Tensor, n: int = 1, *, shift: Tensor | None = None) -> Tensor:
        y = x * self.weight * n + self.bias + self.eps
        return y if shift is None else y + shift


class Scale10(nn.Module):
    def forward(self, x, n=1, *, shift=None):
        y = x * self.weight * n + self.bias + self.eps + 10
        return y if shift is None else y + shift


class Split(nn.Module):
    kernel_layer_name = "Split"

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x + 1, {"twice": x * 2, "square": x * x}


class Split10(nn.Module):
    def forward(self, x):
        return x + 11, {"twice": x * 2 + 10, "square": x * x + 10}


class Odd(nn.Module):
    """A layer whose condition refuses instances that are not ``wanted``."""

    kernel_layer_name = "Odd"
    kernel_condition = staticmethod(lambda module: module.wanted)

    def __init__(self, wanted: bool = True) -> None:
        super().__init__()
        self.wanted = wanted

    def forward(self, x: Tensor) -> Tensor:
        return x - 1


class Odd10(nn.Module):
    def forward(self, x):
        return x - 1 + 10


class Unregistered(nn.Module):
    """A layer without a kernel."""

    kernel_layer_name = "Unregistered"

    def forward(self, x: Tensor) -> Tensor:
        return x * 3


MAPPING = on_cpu(Scale=Scale10, Split=Split10, Odd=Odd10)


class Values(fx.Interpreter):
    """Runs a graph on fakes and stores the value of each node."""

    def __init__(self, module: fx.GraphModule, key: str) -> None:
        super().__init__(module)
        self.key = key

    def run_node(self, node: fx.Node) -> Any:
        node.meta[self.key] = super().run_node(node)
        return node.meta[self.key]


def traced(model: nn.Module, *args: Tensor, key: str = "val") -> fx.GraphModule:
    graph_module = fx.GraphModule(model, kernelgraph.Tracer().trace(model))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        Values(graph_module, key).run(*map(mode.from_tensor, args))
    return graph_module


def choices(mapping: Any = None, **options: Any) -> GraphDecisions:
    parsed = KernelMapping.parse(MAPPING if mapping is None else mapping)
    return GraphDecisions(Options(gradients=Gradients(verify=False), **options), parsed)


def replaced(graph_module: fx.GraphModule, chosen: GraphDecisions) -> int:
    return len(replace_layers(plan(graph_module, chosen), chosen))


def ops_of(graph_module: fx.GraphModule) -> list[str]:
    return [n.target.name() for n in graph_module.graph.nodes if "hubkernels" in str(n.target)]


def run(model: nn.Module, *args: Tensor, **options: Any) -> tuple[fx.GraphModule, GraphDecisions]:
    graph_module, chosen = traced(model, *args), choices(**options)
    with torch.no_grad():
        replaced(graph_module, chosen)
    graph_module.graph.lint()
    return graph_module, chosen


X = torch.arange(4.0)


def test_leaf_becomes_an_op():
    model = nn.Sequential(Scale(), nn.ReLU(), Scale(3.0))
    graph_module, chosen = run(model, X)
    assert torch.equal(graph_module(X), model[2](model[1](model[0](X) + 10)) + 10)
    assert len(ops_of(graph_module)) == 2
    assert len(set(ops_of(graph_module))) == 1
    assert [(d.path, d.layer, d.reason) for d in chosen.decisions] == [
        ("0", "Scale", Reason.KERNEL),
        ("2", "Scale", Reason.KERNEL),
    ]
    assert {d.op for d in chosen.decisions} == set(ops_of(graph_module))
    kinds = [n.op for n in graph_module.graph.nodes]
    assert kinds.count("call_module") == 1


def test_op_reads_the_state_from_the_model():
    model = nn.Sequential(Scale())
    graph_module, _ = run(model, X)
    before = graph_module(X)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(graph_module(X), (before - 10.5) * 2 + 10.5)


def test_second_run_replaces_nothing():
    graph_module, _ = run(nn.Sequential(Scale(), Unregistered(), Odd(False)), X)
    text = str(graph_module.graph)
    assert replaced(graph_module, choices()) == 0
    assert str(graph_module.graph) == text


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def forward(self, x, y):
        a = self.scale(x, 2)
        b = self.scale(a, shift=y)
        return self.scale(x=b, n=3, shift=a), [a]


def test_repeated_calls_with_positions_and_keywords_become_ops():
    model = Calls()
    graph_module, chosen = run(model, X, X + 1)
    kernel = Scale10.forward
    a = kernel(model.scale, X, 2)
    b = kernel(model.scale, a, shift=X + 1)
    expected = kernel(model.scale, x=b, n=3, shift=a), [a]
    made = graph_module(X, X + 1)
    assert torch.equal(made[0], expected[0])
    assert torch.equal(made[1][0], a)
    assert len(ops_of(graph_module)) == 3
    assert [d.path for d in chosen.decisions] == ["scale"] * 3


@pytest.mark.parametrize("key", ["val", "example_value"])
def test_op_has_the_metadata_of_its_layer(key):
    graph_module = traced(nn.Sequential(Scale(), nn.ReLU()), X, key=key)
    node = next(iter(graph_module.graph.find_nodes(op="call_module")))
    node.meta |= {
        "stack_trace": "line 1",
        "nn_module_stack": {"x": ("0", Scale)},
        "tensor_meta": "tm",
        "custom": {"a": 1},
    }
    value = node.meta[key]
    with torch.no_grad():
        assert replaced(graph_module, choices()) == 1
    op = next(n for n in graph_module.graph.nodes if "hubkernels" in str(n.target))
    assert op.meta["stack_trace"] == "line 1"
    assert op.meta["nn_module_stack"] == {"x": ("0", Scale)}
    assert op.meta["custom"] == {"a": 1}
    assert op.meta["tensor_meta"] == "tm"
    assert op.meta[key] is value


class Uses(nn.Module):
    def __init__(self, use: Any) -> None:
        super().__init__()
        self.split = Split()
        self.use = use

    def forward(self, x):
        return self.use(self.split(x))


def test_one_of_several_results_is_used():
    model = Uses(lambda made: made[0] * 2)
    graph_module, chosen = run(model, X)
    assert chosen.decisions[0].reason is Reason.KERNEL
    assert torch.equal(graph_module(X), (X + 11) * 2)
    # The results that nobody takes leave no node.
    assert (
        len(list(graph_module.graph.find_nodes(op="call_function", target=operator.getitem))) == 1
    )
    op = next(n for n in graph_module.graph.nodes if "hubkernels" in str(n.target))
    assert isinstance(op.meta["val"], tuple)


class Pair(nn.Module):
    kernel_layer_name = "Pair"

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"sum": x + 1, "twice": x * 2, "none": None}


class Pair10(nn.Module):
    def forward(self, x):
        return {"sum": x + 11, "twice": x * 2 + 10, "none": None}


def pair(use: Any) -> nn.Module:
    model = Uses(use)
    model.split = Pair()
    return model


PAIR = on_cpu(Pair=Pair10)


def test_each_of_several_results_is_used():
    graph_module, _ = run(pair(lambda m: m["twice"] - m["sum"] * m["sum"]), X, mapping=PAIR)
    assert torch.equal(graph_module(X), X * 2 + 10 - (X + 11) ** 2)
    op = next(n for n in graph_module.graph.nodes if "hubkernels" in str(n.target))
    assert [v.shape for v in op.meta["val"]] == [(4,), (4,)]


@pytest.mark.parametrize(
    "model",
    [
        Uses(lambda made: made),
        Uses(lambda made: made[1]["twice"]),
        Uses(lambda made: made[0:1][0]),
        pair(lambda made: made.get("sum")),
        pair(lambda made: made["none"]),
    ],
    ids=["returned", "nested", "slice", "method", "none"],
)
def test_results_used_as_a_whole_keep_the_reference(model):
    graph_module, args = fx.GraphModule(model, kernelgraph.Tracer().trace(model)), X
    placeholder = next(iter(graph_module.graph.find_nodes(op="placeholder")))
    placeholder.meta["val"] = FakeTensorMode().from_tensor(args)
    chosen = choices({**MAPPING, **PAIR})
    assert replaced(graph_module, chosen) == 0
    assert [(d.reason, d.detail) for d in chosen.decisions] == [
        (Reason.NOT_AN_OP, "what it returns is used as a whole")
    ]


# --- what keeps its reference -------------------------------------------------------------------


def kept(model: nn.Module, **options: Any) -> tuple[Reason, str]:
    graph_module, chosen = run(model, X, **options)
    assert torch.equal(graph_module(X), model(X))
    assert ops_of(graph_module) == []
    (decision,) = chosen.decisions
    return decision.reason, decision.detail


def test_policy_never_keeps_the_reference():
    assert kept(nn.Sequential(Scale()), policy="never") == (Reason.POLICY, "never")


def test_condition_that_refuses_keeps_the_reference():
    assert kept(nn.Sequential(Odd(False)))[0] is Reason.CONDITION
    graph_module, _ = run(nn.Sequential(Odd(True)), X)
    assert len(ops_of(graph_module)) == 1


def test_forward_of_an_instance_keeps_the_reference():
    model = nn.Sequential(Scale())
    model[0].forward = lambda x: x * 7
    assert kept(model)[0] is Reason.OWN_FORWARD


def test_layer_without_a_kernel_keeps_the_reference():
    assert kept(nn.Sequential(Unregistered())) == (
        Reason.NO_LAYER,
        "registered layers: Scale, Split, Odd",
    )


def test_node_without_a_fake_value_keeps_the_reference():
    model = nn.Sequential(Scale())
    graph_module, chosen = fx.GraphModule(model, kernelgraph.Tracer().trace(model)), choices()
    assert replaced(graph_module, chosen) == 0
    assert [(d.reason, d.detail) for d in chosen.decisions] == [
        (Reason.NOT_AN_OP, "node input_1 carries no fake value")
    ]


class Listed(nn.Module):
    kernel_layer_name = "Listed"

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[Any] = [1.0, 2.0]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors[1]


class Listed10(nn.Module):
    def forward(self, x):
        return x * self.factors[1] + 10


class Doubles(nn.Module):
    """Returns another dtype than `Unregistered`."""

    def forward(self, x):
        return (x * 3).double()


class WritesX(nn.Module):
    kernel_layer_name = "WritesX"

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


@pytest.mark.parametrize(
    ("factor", "why"),
    [
        (object.__str__, "self.factors is a list, which is neither a tensor"),
        (torch.ones(4), "a tensor that it reads is in a container, self.factors[0]"),
    ],
)
def test_state_that_no_op_takes_keeps_the_reference(factor, why):
    model = nn.Sequential(Listed())
    model[0].factors.insert(0, factor)
    reason, detail = kept(model, mapping=on_cpu(Listed=Listed10))
    assert reason is Reason.NOT_AN_OP
    assert detail.startswith(why)


def test_result_of_another_dtype_is_an_error_of_the_first_call():
    graph_module = traced(nn.Sequential(Unregistered()), X)
    assert replaced(graph_module, choices(on_cpu(Unregistered=Doubles))) == 1
    with pytest.raises(RuntimeError, match=r"Doubles returned a torch.float64 tensor of shape"):
        graph_module(X)


def test_reference_that_writes_into_its_argument_is_kept():
    model = nn.Sequential(WritesX())
    graph_module, chosen = traced(model, X), choices(on_cpu(WritesX=Odd10))
    assert replaced(graph_module, chosen) == 0
    assert chosen.decisions[0].detail == "WritesX.forward writes into x"


# --- training -----------------------------------------------------------------------------------


def test_gradients_flow_through_the_training_op():
    model = nn.Sequential(Scale(), Scale(3.0))
    graph_module, chosen = traced(model, X), choices()
    assert replaced(graph_module, chosen) == 2
    assert all(name.endswith("_training") for name in ops_of(graph_module))
    assert chosen.decisions[0].mode == str(Mode.TRAINING | Mode.TORCH_COMPILE)
    graph_module(X).sum().backward()
    assert torch.equal(model[0].weight.grad, X * 3)
    assert torch.equal(model[1].weight.grad, X * 2 + 10.5)


# --- any chain, against an interpreter by hand --------------------------------------------------

PARTS = {
    "scale": (Scale, lambda x, m: x * m.weight + m.bias + m.eps, 10, False),
    "odd": (Odd, lambda x, m: x - 1, 10, False),
    "refused": (lambda: Odd(False), lambda x, m: x - 1, 0, True),
    "unregistered": (Unregistered, lambda x, m: x * 3, 0, True),
    "relu": (nn.ReLU, lambda x, m: x.clamp(min=0), 0, True),
}


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(PARTS)), st.integers(0, 20)), min_size=1, max_size=12)
)
def test_random_graph_computes_what_the_chosen_forwards_do(parts):
    """Each part takes an earlier value; the result is the sum of all."""
    graph, modules, expected = fx.Graph(), nn.Module(), [X]
    nodes = [graph.placeholder("x")]
    nodes[0].meta["val"] = (mode := FakeTensorMode()).from_tensor(X)
    for i, (kind, source) in enumerate(parts):
        make, formula, extra, _ = PARTS[kind]
        modules.add_module(f"part{i}", make())
        node = graph.call_module(f"part{i}", (nodes[source % len(nodes)],))
        node.meta["val"] = mode.from_tensor(X)
        value = formula(expected[source % len(nodes)], modules.get_submodule(f"part{i}")) + extra
        nodes.append(node)
        expected.append(value)
    total = nodes[0]
    for node in nodes[1:]:
        total = graph.call_function(operator.add, (total, node))
    graph.output(total)
    graph_module = fx.GraphModule(modules, graph)
    with torch.no_grad():
        count = replaced(graph_module, choices())
        torch.testing.assert_close(graph_module(X), sum(expected))
    assert count == sum(not PARTS[kind][3] for kind, _ in parts)
    assert replaced(graph_module, choices()) == 0


# --- Dynamo -------------------------------------------------------------------------------------


def test_class_of_torch_that_dynamo_does_not_inline_becomes_an_op():
    """Dynamo inlines it once it is extensible, so that capture finds it before the pass does."""
    graphs = []

    def look(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    class Norm10(nn.Module):
        def forward(self, input):
            return nn.functional.layer_norm(input, (4,), self.weight, self.bias) + 10

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            kernelgraph.replace_kernel_forward_from_hub(nn.LayerNorm, "Norm")
            model = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
            with (
                torch._dynamo.config.patch(inline_inbuilt_nn_modules=False),
                kernelgraph.use_kernel_mapping(on_cpu(Norm=Norm10)),
            ):
                compiled = torch.compile(
                    model, backend="hubkernels", options={"inner": look}, fullgraph=True
                )
                made = compiled(X)
        torch.testing.assert_close(made, model[0](X) + 10)
        assert len(ops_of(graphs[0])) == 1
    finally:
        for name in (NAME, CONDITION, FAKE):
            if name in vars(nn.LayerNorm):
                delattr(nn.LayerNorm, name)
        reference = getattr(nn.LayerNorm.forward, "__kernelgraph_reference__", None)
        if reference is not None:
            nn.LayerNorm.forward = reference
