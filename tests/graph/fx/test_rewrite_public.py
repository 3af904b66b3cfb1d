"""`kernelgraph.rewrite`, for those who write and run passes over FX graphs."""

from __future__ import annotations

import copy
import logging
import operator
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module

import kernelgraph
from kernelgraph import Mode, Tracer, rewrite
from kernelgraph.report import Reason
from tests.support.toy_models import Chain, OpaqueScale, Scale, TraceableScale
from tests.support.toys import BrokenRepository, only

X = torch.arange(4.0)
INFERENCE, TRAINING = Mode.INFERENCE, Mode.TRAINING


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, Tracer().trace(model))


def ops_of(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if "hubkernels" in str(n.target)]


def rewritten(model: nn.Module, *inputs: Any, mode: Mode = INFERENCE, **layers: Any) -> Any:
    graph_module = traced(model)
    with only(**(layers or {"Scale": OpaqueScale})):
        # The toys add 10, which a kernel that is verified before it trains anything may not.
        return rewrite(graph_module, mode=mode, example_inputs=inputs, verify_gradients=False)


def kernelized(model: nn.Module, kernel: type[nn.Module] = OpaqueScale) -> nn.Module:
    with only(Scale=kernel):
        return kernelgraph.kernelize(copy.deepcopy(model), mode=INFERENCE)


def decisions() -> list[tuple[str, Reason, str]]:
    report = kernelgraph.last_report()
    assert report is not None
    assert report.source == "rewrite"
    return [(d.path, d.reason, d.detail) for d in report.decisions]


# --- what it makes ------------------------------------------------------------------------------


def test_it_changes_the_graph_in_place_and_runs_the_kernels():
    model = Chain()
    graph_module = traced(model)
    with only(Scale=OpaqueScale):
        assert rewrite(graph_module, mode=INFERENCE, example_inputs=(X,)) is graph_module
    assert decisions() == [("layers.0", Reason.KERNEL, ""), ("layers.2", Reason.KERNEL, "")]
    assert str(kernelgraph.last_report()).startswith("rewrite for cpu, INFERENCE: 2 of 2")
    with torch.no_grad():
        assert torch.equal(graph_module(X), kernelized(model)(X))
        with pytest.raises(RuntimeError, match=r"returned a torch\.float64 tensor of shape \(4,\)"):
            graph_module(X.double())


def test_sizes_may_change():
    graph_module = rewritten(Chain(), torch.ones(2, 4))
    for rows in (1, 2, 5):
        assert graph_module(torch.ones(rows, 4)).shape == (rows, 4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "hubkernels"])
def test_it_runs_under_any_backend(backend: str):
    model = Chain()
    options = {"inner": "aot_eager"} if backend == "hubkernels" else None
    graph_module = rewritten(model, torch.ones(2, 4))
    with torch.no_grad():
        compiled = torch.compile(graph_module, backend=backend, fullgraph=True, options=options)
        torch.testing.assert_close(compiled(X[None]), kernelized(model)(X[None]))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_it_trains_with_the_reference_s_gradient(backend: str | None):
    reference, model = Chain(), Chain()
    model.load_state_dict(reference.state_dict())
    run: Any = rewritten(model, X, mode=TRAINING, Scale=OpaqueScale)
    assert all(n.target.name().endswith("_training") for n in ops_of(run))
    if backend:
        run = torch.compile(run, backend=backend, fullgraph=True)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    run(x).sum().backward()
    # The kernel adds a constant, which changes no gradient but the second scale's weight.
    out = reference.layers[0](y) + 10
    (reference.layers[2](reference.layers[1](out)) + 10).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_mode_decides_and_not_whether_gradients_are_on():
    with torch.no_grad():
        training = rewritten(Chain(), X, mode=TRAINING)
    assert all(n.target.name().endswith("_training") for n in ops_of(training))
    assert not any(n.target.name().endswith("_training") for n in ops_of(rewritten(Chain(), X)))


@pytest.mark.parametrize(
    ("mode", "added"), [(INFERENCE, 10), (INFERENCE | Mode.TORCH_COMPILE, 20), (TRAINING, 30)]
)
def test_kernels_are_chosen_as_kernelize_chooses_them(mode: Mode, added: int):
    class Plus10(nn.Module):
        def forward(self, x):
            return x + 10

    class Plus20(nn.Module):
        def forward(self, x):
            return x + 20

    class Plus30(nn.Module):
        def forward(self, x):
            return x + 30

    from tests.support.toys import ToyRepository

    registered = {
        INFERENCE: ToyRepository(Plus10),
        INFERENCE | Mode.TORCH_COMPILE: ToyRepository(Plus20),
        TRAINING: ToyRepository(Plus30),
    }
    graph_module = traced(nn.Sequential(Scale()))
    with only({"Scale": {"cpu": registered}}):
        rewrite(graph_module, mode=mode, example_inputs=(X,), verify_gradients=False)
    assert torch.equal(graph_module(X), X + added)


def test_a_model_kernelized_for_compiling_keeps_its_kernels():
    with only(Scale=OpaqueScale):
        model = kernelgraph.kernelize(Chain(), mode=INFERENCE | Mode.TORCH_COMPILE)
    graph_module = rewritten(model, X, Scale=TraceableScale)
    assert all("OpaqueScale" in n.target.name() for n in ops_of(graph_module))


def test_a_model_kernelized_for_eager_runs_its_kernels_as_they_are():
    model = kernelized(Chain())
    graph_module = rewritten(model, X, Scale=TraceableScale)
    assert [reason for _, reason, _ in decisions()] == [Reason.OWN_FORWARD] * 2
    with torch.no_grad():
        assert torch.equal(graph_module(X), model(X))


class Project(nn.Module):
    kernel_layer_name = "Project"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Project10(nn.Module):
    def forward(self, x):
        return x @ self.weight + 10


def test_the_autocast_region_is_that_of_the_rewrite():
    with torch.autocast("cpu", torch.bfloat16):
        inside = rewritten(nn.Sequential(Project()), X[None], Project=Project10)
        assert inside(X[None]).dtype is torch.bfloat16
    assert next(iter(ops_of(inside))).meta["val"].dtype is torch.bfloat16
    assert inside(X[None]).dtype is torch.bfloat16
    outside = rewritten(nn.Sequential(Project()), X[None], Project=Project10)
    assert outside(X[None]).dtype is torch.float32
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"expected is a torch\.float32 tensor"),
    ):
        outside(X[None])


def test_inference_mode():
    with torch.inference_mode():
        model, x = Chain(), torch.randn(2, 4)
        assert torch.equal(rewritten(model, x)(x), kernelized(model)(x))


def test_the_graph_can_be_transformed_and_exported():
    graph_module = rewritten(Chain(), X[None])
    expected = graph_module(X[None])
    assert torch.equal(fx.Transformer(graph_module).transform()(X[None]), expected)
    program = torch.export.export(graph_module, (X[None],))
    assert len(ops_of(program.graph_module)) == 2
    assert torch.equal(program.module()(X[None]), expected)


# --- once more ----------------------------------------------------------------------------------


class Refused(Scale):
    kernel_layer_name = "Scale"
    kernel_condition = staticmethod(lambda module: False)
    forward = Scale.forward


def test_a_second_run_changes_nothing(monkeypatch):
    model = nn.Sequential(Scale(), Refused(), Scale())
    graph_module = traced(model)
    recompiled = []
    with only(Scale=OpaqueScale):
        rewrite(graph_module, mode=INFERENCE, example_inputs=(X,))
        code = graph_module.code
        nodes = [(n, n.op, n.target, n.args, dict(n.meta)) for n in graph_module.graph.nodes]
        monkeypatch.setattr(type(graph_module), "recompile", lambda self: recompiled.append(self))
        rewrite(graph_module, mode=INFERENCE)  # the nodes have their values now
    assert [(n, n.op, n.target, n.args, dict(n.meta)) for n in graph_module.graph.nodes] == nodes
    assert graph_module.code == code
    assert recompiled == []
    assert decisions() == [("1", Reason.CONDITION, "")]


def test_a_graph_without_layers_is_left_alone():
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    before = graph_module.code
    assert rewrite(graph_module, mode=INFERENCE).code == before
    assert decisions() == []


# --- metadata -----------------------------------------------------------------------------------


class Turned(nn.Module):
    """Returns a transposed tensor, which its op does not."""

    kernel_layer_name = "Turned"

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).t()


class Turned10(nn.Module):
    def forward(self, x):
        return (x + 11).t()


class Parts(nn.Module):
    kernel_layer_name = "Parts"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"sum": x + 1, "turned": x.t(), "unused": x.sum()}


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


def description(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return [description(part) for part in value]
    if isinstance(value, dict):
        return {key: description(part) for key, part in value.items()}
    return None  # a number, say, of which torch 2.11's FakeTensorProp keeps nothing


def assert_values_are_right(graph_module: fx.GraphModule, *inputs: Tensor, key: str = "val"):
    """What each node carries is what a run of the graph on fakes gives."""
    other = copy.deepcopy(graph_module)
    FakeTensorProp(other, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    pairs = zip(graph_module.graph.nodes, other.graph.nodes, strict=True)
    for node, again in pairs:
        if node.op != "output":
            assert description(node.meta[key]) == description(again.meta["val"]), node


SQUARE = torch.randn(4, 4)


def test_values_of_a_run_on_example_inputs():
    graph_module = rewritten(Both(), SQUARE, **BOTH)
    assert len(ops_of(graph_module)) == 3
    assert_values_are_right(graph_module, SQUARE)
    leaves = [n.meta["val"] for n in graph_module.graph.nodes if isinstance(n.meta["val"], Tensor)]
    assert all(isinstance(v, FakeTensor) for v in leaves)
    assert len({v.fake_mode for v in leaves}) == 1


@pytest.mark.parametrize("key", ["val", "example_value"])
def test_values_that_the_nodes_carry(key: str):
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


def test_an_op_says_where_its_layer_was():
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


def test_symbolic_sizes_stay_symbolic():
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    x = mode.from_tensor(torch.randn(3, 4))
    torch._dynamo  # noqa: B018
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    from torch._dynamo.source import LocalSource

    x = mode.from_tensor(torch.randn(3, 4), symbolic_context=context, source=LocalSource("x"))
    graph_module = rewritten(Chain(), x)
    (first, last) = ops_of(graph_module)
    assert first.meta["val"].shape == x.shape
    assert isinstance(last.meta["val"].shape[0], torch.SymInt)
    assert mode.shape_env is not None
    assert mode.shape_env.guards == []


# --- forms of graphs ----------------------------------------------------------------------------


class Inputs(nn.Module):
    kernel_layer_name = "Inputs"

    def forward(
        self, x: Tensor, pair: tuple[Tensor, Tensor], n: int = 1, *, more: dict[str, Tensor]
    ) -> Tensor:
        return x * n + pair[0] - pair[1] + more["m"]


class Inputs10(nn.Module):
    def forward(self, x, pair, n=1, *, more):
        return x * n + pair[0] - pair[1] + more["m"] + 10


class Forms(nn.Module):
    """One layer, many times, with containers of nodes, and nodes that are containers."""

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


def test_containers_keywords_and_a_layer_called_often():
    model = Forms()
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


def test_an_optional_input_is_what_the_example_has():
    model = Optional()
    graph_module = rewritten(model, X, X + 1, Maybe=Maybe10)
    assert torch.equal(graph_module(X, X + 1), (X + 1) ** 2 + 10)


@pytest.mark.parametrize("inputs", [(X,), (X, None)])
def test_an_optional_input_that_is_left_out_keeps_the_reference(inputs: Any):
    graph_module = rewritten(Optional(), *inputs, Maybe=Maybe10)
    assert torch.equal(graph_module(X, X + 1), (X + 1) ** 2)
    assert decisions() == [
        (
            "maybe",
            Reason.NOT_AN_OP,
            "mask is None where the graph was looked at, and may be another value when it runs",
        )
    ]


def test_a_flag_that_the_graph_computes_keeps_the_reference():
    graph_module = rewritten(Computed(), X, Maybe=Maybe10)
    assert torch.equal(graph_module(X), -X)
    assert torch.equal(graph_module(X.long()), X.long() + 1)


def test_graph_modules_in_graph_modules():
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
    """A graph module that is called twice, at ranks of the caller's choice."""

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
def test_a_graph_module_called_twice(second: Any, reason: Reason):
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


def test_a_graph_with_flattened_inputs():
    model = Forms()
    graph = Tracer().trace(nested := Nested(), concrete_args={"pair": (fx.PH, {"b": fx.PH})})
    graph_module = fx.GraphModule(nested, graph)
    with only(Scale=TraceableScale):
        rewrite(graph_module, mode=INFERENCE, example_inputs=((X, {"b": X}),))
    with torch.no_grad():
        assert torch.equal(graph_module((X, {"b": X}))["y"], nested((X, {"b": X}))["y"] + 20)
    assert model is not None


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def forward(self, pair: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"y": self.scale(pair[0]) + pair[1]["b"]}


def test_data_dependent_sizes():
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Sequential(Wide())

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(x[x > 1])

    graph_module = rewritten(Picks(), X, Wide=Wide10)
    assert decisions() == [("scale.0", Reason.KERNEL, "")]
    assert torch.equal(graph_module(X), X[2:] * 2 + 10)


class Wide(nn.Module):
    kernel_layer_name = "Wide"

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Wide10(nn.Module):
    def forward(self, x):
        return x * 2 + 10


# --- the caller's own -----------------------------------------------------------------------------


class Remembers(nn.Module):
    """Sets an attribute, and writes into a buffer, at each call."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.last = x
        return x.add_(1)


class LeafRemembers(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Remembers) or super().is_leaf_module(m, module_qualified_name)


def test_a_run_on_fakes_leaves_the_caller_s_own_alone():
    model = nn.Sequential(Remembers(), nn.BatchNorm1d(4), Scale())
    graph_module = fx.GraphModule(model, LeafRemembers().trace(model))
    x, before = torch.randn(3, 4), copy.deepcopy(model.state_dict())
    given = x.clone()
    with only(Scale=OpaqueScale):
        rewrite(graph_module, mode=INFERENCE, example_inputs=(given,))
    assert torch.equal(given, x)
    assert model[0].last is None
    assert graph_module.get_submodule("0").last is None
    for name, tensor in graph_module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_modules_whose_tensors_an_op_reads_are_not_unused():
    graph_module = rewritten(nn.Sequential(Scale(), nn.Linear(4, 4)), X)
    expected = graph_module(X)
    state = list(graph_module.state_dict())
    graph_module.delete_all_unused_submodules()
    assert list(graph_module.state_dict()) == state
    assert torch.equal(graph_module(X), expected)


class Unannotated(nn.Module):
    """torch cannot pickle a graph whose inputs have annotations that are strings."""

    def __init__(self):
        super().__init__()
        self.chain = Chain()

    def forward(self, x):
        return self.chain(x)


def test_copies_and_pickles():
    graph_module = rewritten(Unannotated(), X)
    expected = graph_module(X)
    for again in (copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module))):
        assert len(ops_of(again)) == 2
        assert torch.equal(again(X), expected)
        again.get_parameter("chain.layers.2.weight").data.zero_()
        assert not torch.equal(again(X), expected)
    assert torch.equal(graph_module(X), expected)


def test_state_that_is_loaded_counts():
    graph_module = rewritten(Chain(), X)
    other = Chain()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
        graph_module.load_state_dict(other.state_dict())
        torch.testing.assert_close(graph_module(X), kernelized(other)(X))


# --- what is wrong --------------------------------------------------------------------------------


def test_what_is_no_graph_module():
    with pytest.raises(
        TypeError, match=r"^rewrite changes a torch.fx.GraphModule, not a .*Linear$"
    ):
        rewrite(nn.Linear(4, 4), mode=INFERENCE)


@pytest.mark.parametrize("mode", [Mode.FALLBACK, Mode.TORCH_COMPILE])
def test_modes_that_are_none_to_rewrite_for(mode: Mode):
    with pytest.raises(ValueError, match="mode must contain INFERENCE or TRAINING"):
        rewrite(traced(Chain()), mode=mode)


def test_example_inputs_that_are_one_tensor():
    with pytest.raises(TypeError, match=r"a tuple of the graph's arguments, not a torch\.Tensor"):
        rewrite(traced(Chain()), mode=INFERENCE, example_inputs=X)


@pytest.mark.parametrize("inputs", [(), (X, X)])
def test_example_inputs_of_another_number(inputs: Any):
    with pytest.raises(
        ValueError, match=rf"example_inputs are {len(inputs)} values, and the graph takes \(x\)"
    ):
        rewrite(traced(Chain()), mode=INFERENCE, example_inputs=inputs)


def unchanged(graph_module: fx.GraphModule, error: type[Exception], match: str, **kwargs: Any):
    text = str(graph_module.graph)
    metas = [dict(n.meta) for n in graph_module.graph.nodes]
    before = kernelgraph.last_report()
    with pytest.raises(error, match=match):
        rewrite(graph_module, mode=INFERENCE, **kwargs)
    assert str(graph_module.graph) == text
    assert [dict(n.meta) for n in graph_module.graph.nodes] == metas
    assert kernelgraph.last_report() is before


def test_no_values():
    with only(Scale=OpaqueScale):
        unchanged(
            traced(Chain()),
            ValueError,
            "^node x carries no fake value, and layer Scale at layers.0 takes it: "
            "pass example_inputs$",
        )


@pytest.mark.parametrize("nested", [False, True])
def test_example_inputs_that_do_not_fit(nested: bool):
    model = nn.Sequential(nn.Linear(4, 4), Scale())
    graph_module = traced(model)
    if nested:
        graph_module = split_module(graph_module, model, lambda node: 0)
    with only(Scale=OpaqueScale):
        unchanged(
            graph_module,
            RuntimeError,
            r"^node _0 \(0\) does not run on fake tensors of example_inputs: RuntimeError: ",
            example_inputs=(torch.ones(2, 3),),
        )


@pytest.mark.parametrize("nested", [False, True])
def test_a_repository_that_cannot_be_loaded_raises_its_own_error(nested: bool):
    model = nn.Sequential(Scale())
    graph_module = traced(model)
    if nested:
        graph_module = split_module(graph_module, model, lambda node: 0)
    broken = {"Scale": BrokenRepository()}
    with only(**broken):
        unchanged(graph_module, OSError, "^toy repository out of reach$", example_inputs=(X,))


def test_nothing_is_changed_where_a_later_layer_is_an_error():
    with only(Wide=Wide10, Scale=BrokenRepository()):
        unchanged(
            traced(nn.Sequential(Wide(), Scale())), OSError, "out of reach", example_inputs=(X,)
        )


def test_each_decision_is_logged(caplog):
    with caplog.at_level(logging.INFO, "kernelgraph"):
        rewritten(nn.Sequential(Scale()), X)
    (record,) = [r for r in caplog.records if r.levelno == logging.INFO]
    assert record.getMessage().startswith("rewrite: layer Scale at 0 for cpu, INFERENCE: tests")
