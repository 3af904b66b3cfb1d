"""`kernelgraph.rewrite`: the graphs that it returns, and the arguments that it refuses."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

import kernelgraph
from kernelgraph import Mode, Tracer, rewrite
from kernelgraph.report import Reason
from tests.support.rewriting import (
    INFERENCE,
    TRAINING,
    Wide,
    Wide10,
    X,
    decisions,
    kernelized,
    ops_of,
    rewritten,
    traced,
)
from tests.support.toy_models import Chain, OpaqueScale, Scale, TraceableScale
from tests.support.toys import BrokenRepository, ToyRepository, only

# --- the rewritten graph ------------------------------------------------------------------------


def test_rewrite_changes_the_graph_in_place_and_runs_the_kernels():
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


def test_rewritten_graph_runs_with_other_sizes():
    graph_module = rewritten(Chain(), torch.ones(2, 4))
    for rows in (1, 2, 5):
        assert graph_module(torch.ones(rows, 4)).shape == (rows, 4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "hubkernels"])
def test_rewritten_graph_runs_under_any_backend(backend: str):
    model = Chain()
    options = {"inner": "aot_eager"} if backend == "hubkernels" else None
    graph_module = rewritten(model, torch.ones(2, 4))
    with torch.no_grad():
        compiled = torch.compile(graph_module, backend=backend, fullgraph=True, options=options)
        torch.testing.assert_close(compiled(X[None]), kernelized(model)(X[None]))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_rewritten_graph_trains_with_the_reference_s_gradient(backend: str | None):
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


def test_mode_decides_whether_ops_train_whatever_the_grad_mode():
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

    registered = {
        INFERENCE: ToyRepository(Plus10),
        INFERENCE | Mode.TORCH_COMPILE: ToyRepository(Plus20),
        TRAINING: ToyRepository(Plus30),
    }
    graph_module = traced(nn.Sequential(Scale()))
    with only({"Scale": {"cpu": registered}}):
        rewrite(graph_module, mode=mode, example_inputs=(X,), verify_gradients=False)
    assert torch.equal(graph_module(X), X + added)


def test_model_kernelized_for_compiling_keeps_its_kernels():
    with only(Scale=OpaqueScale):
        model = kernelgraph.kernelize(Chain(), mode=INFERENCE | Mode.TORCH_COMPILE)
    graph_module = rewritten(model, X, Scale=TraceableScale)
    assert all("OpaqueScale" in n.target.name() for n in ops_of(graph_module))


def test_model_kernelized_for_eager_runs_its_kernels_as_they_are():
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


def test_autocast_region_is_that_of_the_rewrite():
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


def test_rewrite_runs_in_inference_mode():
    with torch.inference_mode():
        model, x = Chain(), torch.randn(2, 4)
        assert torch.equal(rewritten(model, x)(x), kernelized(model)(x))


def test_rewritten_graph_can_be_transformed_and_exported():
    graph_module = rewritten(Chain(), X[None])
    expected = graph_module(X[None])
    assert torch.equal(fx.Transformer(graph_module).transform()(X[None]), expected)
    program = torch.export.export(graph_module, (X[None],))
    assert len(ops_of(program.graph_module)) == 2
    assert torch.equal(program.module()(X[None]), expected)


# --- a second run -------------------------------------------------------------------------------


class Refused(Scale):
    kernel_layer_name = "Scale"
    kernel_condition = staticmethod(lambda module: False)
    forward = Scale.forward


def test_second_run_changes_nothing(monkeypatch):
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


def test_graph_without_layers_stays_as_it_is():
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    before = graph_module.code
    assert rewrite(graph_module, mode=INFERENCE).code == before
    assert decisions() == []


# --- the modules and tensors of the caller ------------------------------------------------------


class Remembers(nn.Module):
    """A module that sets an attribute and writes into a buffer and its input at each call."""

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


def test_run_on_fakes_changes_neither_modules_nor_inputs():
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


def test_modules_whose_tensors_an_op_reads_count_as_used():
    graph_module = rewritten(nn.Sequential(Scale(), nn.Linear(4, 4)), X)
    expected = graph_module(X)
    state = list(graph_module.state_dict())
    graph_module.delete_all_unused_submodules()
    assert list(graph_module.state_dict()) == state
    assert torch.equal(graph_module(X), expected)


class Unannotated(nn.Module):
    """A `Chain` without annotations: torch cannot pickle graphs whose inputs have strings there."""

    def __init__(self):
        super().__init__()
        self.chain = Chain()

    def forward(self, x):
        return self.chain(x)


def test_copies_and_pickles_run_their_own_parameters():
    graph_module = rewritten(Unannotated(), X)
    expected = graph_module(X)
    for again in (copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module))):
        assert len(ops_of(again)) == 2
        assert torch.equal(again(X), expected)
        again.get_parameter("chain.layers.2.weight").data.zero_()
        assert not torch.equal(again(X), expected)
    assert torch.equal(graph_module(X), expected)


def test_ops_read_state_that_is_loaded_later():
    graph_module = rewritten(Chain(), X)
    other = Chain()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
        graph_module.load_state_dict(other.state_dict())
        torch.testing.assert_close(graph_module(X), kernelized(other)(X))


# --- errors -------------------------------------------------------------------------------------


def test_module_without_a_graph_is_refused():
    with pytest.raises(
        TypeError, match=r"^rewrite changes a torch.fx.GraphModule, not a .*Linear$"
    ):
        rewrite(nn.Linear(4, 4), mode=INFERENCE)


@pytest.mark.parametrize("mode", [Mode.FALLBACK, Mode.TORCH_COMPILE])
def test_mode_without_inference_or_training_is_refused(mode: Mode):
    with pytest.raises(ValueError, match="mode must contain INFERENCE or TRAINING"):
        rewrite(traced(Chain()), mode=mode)


def test_example_inputs_that_are_one_tensor_are_refused():
    with pytest.raises(TypeError, match=r"a tuple of the graph's arguments, not a torch\.Tensor"):
        rewrite(traced(Chain()), mode=INFERENCE, example_inputs=X)


@pytest.mark.parametrize("inputs", [(), (X, X)])
def test_example_inputs_of_another_number_are_refused(inputs: Any):
    with pytest.raises(
        ValueError, match=rf"example_inputs are {len(inputs)} values, and the graph takes \(x\)"
    ):
        rewrite(traced(Chain()), mode=INFERENCE, example_inputs=inputs)


def assert_unchanged(
    graph_module: fx.GraphModule, error: type[Exception], match: str, **kwargs: Any
):
    text = str(graph_module.graph)
    metas = [dict(n.meta) for n in graph_module.graph.nodes]
    before = kernelgraph.last_report()
    with pytest.raises(error, match=match):
        rewrite(graph_module, mode=INFERENCE, **kwargs)
    assert str(graph_module.graph) == text
    assert [dict(n.meta) for n in graph_module.graph.nodes] == metas
    assert kernelgraph.last_report() is before


def test_missing_values_are_an_error_that_changes_nothing():
    with only(Scale=OpaqueScale):
        assert_unchanged(
            traced(Chain()),
            ValueError,
            "^node x carries no fake value, and layer Scale at layers.0 takes it: "
            "pass example_inputs$",
        )


@pytest.mark.parametrize("nested", [False, True])
def test_example_inputs_that_do_not_fit_are_an_error_that_changes_nothing(nested: bool):
    model = nn.Sequential(nn.Linear(4, 4), Scale())
    graph_module = traced(model)
    if nested:
        graph_module = split_module(graph_module, model, lambda node: 0)
    with only(Scale=OpaqueScale):
        assert_unchanged(
            graph_module,
            RuntimeError,
            r"^node _0 \(0\) does not run on fake tensors of example_inputs: RuntimeError: ",
            example_inputs=(torch.ones(2, 3),),
        )


@pytest.mark.parametrize("nested", [False, True])
def test_repository_that_cannot_be_loaded_raises_its_own_error(nested: bool):
    model = nn.Sequential(Scale())
    graph_module = traced(model)
    if nested:
        graph_module = split_module(graph_module, model, lambda node: 0)
    broken = {"Scale": BrokenRepository()}
    with only(**broken):
        assert_unchanged(
            graph_module, OSError, "^toy repository out of reach$", example_inputs=(X,)
        )


def test_error_at_a_later_layer_changes_nothing():
    with only(Wide=Wide10, Scale=BrokenRepository()):
        assert_unchanged(
            traced(nn.Sequential(Wide(), Scale())), OSError, "out of reach", example_inputs=(X,)
        )


def test_each_decision_is_logged(caplog):
    with caplog.at_level(logging.INFO, "kernelgraph"):
        rewritten(nn.Sequential(Scale()), X)
    (record,) = [r for r in caplog.records if r.levelno == logging.INFO]
    assert record.getMessage().startswith("rewrite: layer Scale at 0 for cpu, INFERENCE: tests")
