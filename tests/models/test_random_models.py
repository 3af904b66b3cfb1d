"""Random models of random layers with random kernels, compiled, against their eager calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tests.support import random_layers
from tests.support.random_layers import Model, build, inputs_of, models
from tests.support.random_models import assert_kernels, assert_same, eager, examples, mapping

# --- what is compared ---------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of the model's layers, plain attributes included."""
    found = dict(model.state_dict())
    return {
        **found,
        **{f"{i}.plain": m.plain for i, m in enumerate(model.layers) if hasattr(m, "plain")},
    }


class Recorder:
    """An inner compiler that counts the kernel ops in a graph, and runs the graph as it is."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        targets = [str(node.target) for node in graph_module.graph.nodes]
        self.counts.append(sum(t.startswith("hubkernels.") for t in targets))
        return graph_module.forward


def gradients(outputs: list[Tensor], inputs: list[Tensor], model: nn.Module) -> list[Any]:
    """Return the gradients of everything differentiable."""
    wanted = [t for t in (*inputs, *model.parameters()) if t.requires_grad]
    total = sum(random_layers.mix(t).real for t in outputs if t.requires_grad)
    if not isinstance(total, Tensor) or not wanted:
        return []
    return list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))


def check(
    spec: Model,
    inner: Any,
    region: Any,
    *,
    dynamic: bool | None = None,
    lengths: Sequence[int] = (4, 4, 6),
) -> None:
    """Check the law for inputs of these ``lengths``, one after the other."""
    torch.compiler.reset()
    note(spec.text())
    torch.manual_seed(0)
    model = build(spec)
    twin = eager(spec, model)
    compiled = torch.compile(
        model,
        backend="hubkernels",
        fullgraph=True,
        dynamic=dynamic,
        options={"inner": inner, "verify_gradients": False},  # the kernels add 10
    )
    with mapping(spec.layers):
        for length in lengths:
            inputs = inputs_of(spec, length)
            others = [copy.deepcopy(t) for t in inputs]
            with region():
                made, expected = compiled(*inputs), twin(*others)
            assert_kernels(spec)
            assert_same(made, expected)
            assert_same(inputs, others)
            assert_same(state(model), state(twin))
            if spec.training:
                assert [t.requires_grad for t in made] == [t.requires_grad for t in expected]
                found = [gradients(made, inputs, model), gradients(expected, others, twin)]
                # They are sums of what was rounded to bfloat16, in some order.
                halves = torch.bfloat16 in [layer.dtype for layer in spec.layers]
                rounded = halves or any(call.autocast for call in spec.calls)
                assert_same(*found, **({"rtol": 0.02, "atol": 0.02} if rounded else {}))
    if isinstance(inner, Recorder):
        assert set(inner.counts) == {len(spec.calls)}


@examples(20)
@given(models(training=False), st.sampled_from([torch.no_grad, torch.inference_mode]))
def test_compiled_model_equals_eager_model(spec: Model, region: Any) -> None:
    """A compiled model returns and changes the same as the eager model with its kernels."""
    check(spec, Recorder(), region)


@examples(6)
@given(models(training=False))
def test_model_through_aot_eager_equals_eager_model(spec: Model) -> None:
    check(spec, "aot_eager", torch.no_grad, dynamic=True)


@examples(2)
@given(models(training=False))
def test_model_through_inductor_equals_eager_model(spec: Model) -> None:
    check(spec, "inductor", torch.no_grad, lengths=(4, 4))


@examples(8)
@given(models(training=True))
def test_gradients_equal_those_of_the_eager_model(spec: Model) -> None:
    """Its gradients are those of the references at the values that the kernels return."""
    check(spec, "aot_eager", torch.enable_grad)


class Calls:
    """An inner compiler that keeps the kernel ops that run, with copies of their arguments."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found = self.found

        class Keeping(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if str(target).startswith("hubkernels."):
                    found.append((target, pytree.tree_map_only(Tensor, torch.clone, args)))
                return super().call_function(target, args, kwargs)

        return Keeping(graph_module).run


@examples(12)
@given(models(training=False))
def test_op_of_a_random_model_passes_opcheck(spec: Model) -> None:
    """Every op of a layer passes torch's opcheck."""
    torch.compiler.reset()
    note(spec.text())
    torch.manual_seed(0)
    calls = Calls()
    model, inputs = build(spec), inputs_of(spec, 4)
    compiled = torch.compile(model, backend="hubkernels", fullgraph=True, options={"inner": calls})
    with mapping(spec.layers), torch.no_grad():
        compiled(*inputs)
        assert len(calls.found) == len(spec.calls)
        for op, args in calls.found:
            torch.library.opcheck(op, args)
