"""``options={"verify": True}``: a kernel that is wrong is not used, and the report says why."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernelgraph import last_report, replace_kernel_forward_from_hub, use_kernel_mapping
from kernelgraph.graph.calls.trees import flatten
from kernelgraph.graph.fx.planner import plan
from kernelgraph.graph.fx.rewriter import replace_layers
from kernelgraph.graph.lowering.options import Options
from kernelgraph.graph.lowering.sites import GraphDecisions
from kernelgraph.graph.verify.outputs import Output, difference, output_error
from kernelgraph.graph.verify.tolerance import TOLERANCES
from kernelgraph.layers import extensible
from kernelgraph.report import Decision, Reason
from kernelgraph.selection import current_mapping
from tests.support.op_calls import call_of, kernel_of, layer_of
from tests.support.toy_models import on_cpu


def hub_layer(forward: Callable[..., Any]) -> type[nn.Module]:
    """Return a hub layer with ``forward``."""
    return type("Toy", (nn.Module,), {"forward": forward, "__module__": __name__})


def layer(forward: Any, **attributes: Any) -> nn.Module:
    """Return a layer called Layer whose reference is ``forward``."""
    cls = type("Layer", (nn.Module,), {"forward": forward, "__module__": __name__})
    replace_kernel_forward_from_hub(cls, "Layer")
    module = cls()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def compile_with(
    module: nn.Module, toy: type[nn.Module], *args: Any, inner: Any = "eager", **kwargs: Any
) -> tuple[Any, tuple[Decision, ...]]:
    """Compile ``module`` with a verified kernel; return what it gives, and the decisions."""
    options = {"inner": inner, "verify": True}
    f = torch.compile(module, backend="hubkernels", fullgraph=True, options=options, **kwargs)
    with use_kernel_mapping(on_cpu(Layer=toy), inherit_mapping=False):
        result = f(*args)
    report = last_report()
    assert report is not None
    return result, report.decisions


def why_not(module: nn.Module, toy: type[nn.Module], *args: Any, **kwargs: Any) -> str:
    """Return why the reference is used for ``module(*args)``, and not ``toy``."""
    result, (decision,) = compile_with(module, toy, *args, **kwargs)
    torch.testing.assert_close(result, extensible(type(module)).reference(module, *args))
    assert decision.reason is Reason.WRONG
    assert decision.detail.startswith("tests@")
    return decision.detail.split(": Toy: ", 1)[1]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


def double(self, x):
    return x * self.weight * 2


def weight() -> nn.Parameter:
    return nn.Parameter(torch.linspace(0.5, 1.5, 4))


# --- what is right ------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_kernel_that_computes_the_same_is_used(inner, dynamic):
    ran = []

    def kernel(self, x):
        ran.append(tuple(x.shape))
        return torch.from_numpy(x.numpy() * self.weight.detach().numpy() * 2)

    module, x = layer(double, weight=weight()), torch.randn(6, 4)
    result, (decision,) = compile_with(module, hub_layer(kernel), x, inner=inner, dynamic=dynamic)
    torch.testing.assert_close(result, double(module, x))
    assert decision.reason is Reason.KERNEL
    assert ran[0] == (6, 4), "at the sizes of the call"


def test_without_the_option_nothing_is_compared():
    ran: deque[Any] = deque()  # a layer that appends to a list is no op

    def reference(self, x):
        ran.append(torch.compiler.is_dynamo_compiling() or type(x))
        return x * 2

    module = layer(reference)
    with use_kernel_mapping(on_cpu(Layer=hub_layer(lambda self, x: x * 3)), inherit_mapping=False):
        f = torch.compile(module, backend="hubkernels", options={"inner": "eager"})
        assert f(torch.ones(2))[0].item() == 3
    assert Tensor not in ran


def test_equal_layers_are_compared_once():
    ran = []

    def kernel(self, x):
        ran.append(type(x))
        return x * self.weight * 2

    cls = type(layer(double))
    layers = [cls() for _ in range(8)]
    for module in layers:
        module.weight = weight()
    _, decisions = compile_with(nn.Sequential(*layers), hub_layer(kernel), torch.randn(6, 4))
    assert [d.reason for d in decisions] == [Reason.KERNEL] * 8
    # The compared run, and the calls of the ops.
    assert ran.count(Tensor) == 1 + 8


def test_weights_of_the_layer_are_used_and_keep_their_values():
    seen = []

    def kernel(self, x):
        if type(x) is Tensor:
            seen.append(self.weight.tolist())
            self.weight.mul_(0)
        return x * 2 * torch.linspace(0.5, 1.5, 4)

    module = layer(double, weight=weight())
    compile_with(module, hub_layer(kernel), torch.randn(6, 4))
    assert seen[0] == weight().tolist()
    assert torch.equal(module.weight, weight())


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_wrong_kernel_is_not_used(inner, dynamic):
    def kernel(self, x):
        y = x * self.weight * 2
        y[:, 0] += 0.5
        return y

    args = layer(double, weight=weight()), hub_layer(kernel), torch.randn(6, 4)
    assert why_not(*args, inner=inner, dynamic=dynamic).startswith(
        "6 of 24 values are beyond the tolerance of torch.float32 (1e-05 of the root mean square "
        "and 1.3e-06 of the value); the largest error is 0.5, and relative to the value "
    )
    assert "the kernel does not compute what the layer does (tests@" in str(last_report())


def fails(self, x):
    raise ValueError("no\nand more")


WRONG = {
    "raises": (fails, "raised ValueError: no"),
    "structure": (lambda self, x: (x, None), "returned a tuple of 2 (a tensor, None), and the"),
    "dtype": (
        lambda self, x: x.double(),
        "returned a torch.float64 tensor of shape (3, 4) on cpu, and the layer a torch.float32",
    ),
    "shape": (lambda self, x: x.t(), "returned a torch.float32 tensor of shape (4, 3) on cpu"),
    "number": (lambda self, x: 3, "returned 3, and the layer tensor"),
    "set": (lambda self, x: {x}, "raised UnsupportedValue: a set is passed or returned"),
    "attribute": (lambda self, x: self.gamma, "raised AttributeError: 'Layer' object has no"),
    "nan": (lambda self, x: x * float("nan"), "12 of 12 values are beyond the tolerance"),
}


@pytest.mark.parametrize("what", WRONG)
def test_error_of_a_wrong_kernel_is_reported(what):
    kernel, message = WRONG[what]
    assert why_not(layer(lambda self, x: x * 2), hub_layer(kernel), torch.randn(3, 4)).startswith(
        message
    )


def test_wrong_result_is_named():
    module = layer(lambda self, x: (x * 2, {"n": x.argmax(-1)}))
    kernel = hub_layer(lambda self, x: (x * 2, {"n": x.argmin(-1)}))
    assert why_not(module, kernel, torch.randn(30, 40)).startswith(
        "result 1: 30 of 30 values are beyond the tolerance of torch.int64 (equality); the largest "
    )


def test_training_call_is_compared():
    x = torch.randn(3, 4, requires_grad=True)
    with torch.enable_grad():
        args = layer(double, weight=weight()), hub_layer(lambda self, x: x * self.weight), x
        assert why_not(*args).startswith("12 of 12 values are beyond")


def test_fx_pass_compares():
    class Leaves(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return True

    model = nn.Sequential(layer(double, weight=weight()))
    for kernel, reason in ((double, Reason.KERNEL), (lambda self, x: x, Reason.WRONG)):
        graph = fx.GraphModule(model, Leaves().trace(model))
        mode = FakeTensorMode()
        for node in graph.graph.nodes:
            node.meta["val"] = mode.from_tensor(torch.ones(6, 4))
        with use_kernel_mapping(on_cpu(Layer=hub_layer(kernel)), inherit_mapping=False):
            choices = GraphDecisions(Options(verify=True), current_mapping())
            done = replace_layers(plan(graph, choices), choices)
        assert len(done) == (reason is Reason.KERNEL)
        (decision,) = choices.decisions
        assert decision.reason is reason


# --- what cannot be compared --------------------------------------------------------------------


def test_kernel_is_used_where_the_reference_cannot_run(caplog):
    def reference(self, index, table):
        if type(index) is Tensor:
            raise ValueError("no zeros")
        return table[index]

    def kernel(self, index, table):
        return table[index] + 10

    with caplog.at_level(logging.WARNING, "kernelgraph"):
        index, table = torch.tensor([1, 2]), torch.zeros(4)
        result, (decision,) = compile_with(layer(reference), hub_layer(kernel), index, table)
    assert result.tolist() == [10, 10]
    assert decision.reason is Reason.KERNEL
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.getMessage().endswith(
        "for layer Layer at (model) is not verified: the reference raised ValueError: no zeros"
    )


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_weights_without_values_are_made_up(where):
    module = layer(double, weight=weight())
    toy = kernel_of(hub_layer(lambda self, x: x * self.weight))
    call, operands = call_of(module, torch.ones(6, 4), forward=toy.forward)
    if where == "meta":
        module.to("meta")
    else:
        module.weight = nn.Parameter(FakeTensorMode().from_tensor(torch.ones(4)))
    error = output_error(layer_of(module), module, "layer", toy, call, operands)
    assert "24 of 24 values are beyond" in error


# --- the tolerance ------------------------------------------------------------------------------


def outputs(*tensors: Tensor) -> list[Output]:
    made = []
    for tensor in tensors:
        leaves, template = flatten(tensor)
        made.append(Output(template, leaves))
    return made


@given(
    st.sampled_from(sorted(TOLERANCES, key=str)),
    st.floats(-1, 1.5),  # beyond this, float8 overflows
    st.floats(0.0, 8.0),
    st.integers(0, 2**32),
)
def test_values_pass_exactly_within_the_tolerance_of_the_table(dtype, magnitude, ratio, seed):
    """Values pass exactly where each is within what the table allows."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.float64 if not dtype.is_complex else torch.complex128
    reference = (torch.randn(50, generator=generator, dtype=real) * 10**magnitude).to(dtype)
    relative, absolute = TOLERANCES[dtype]
    wide = reference.to(real)
    allowed = absolute * wide.abs().square().mean().sqrt() + relative * wide.abs()
    made = (wide + ratio * allowed * torch.rand(50, generator=generator).to(real)).to(dtype)
    errors = (made.to(real) - wide).abs()
    # Nearer to the bound, the arithmetic of the comparison itself decides.
    assume((errors - allowed).abs().div(allowed).min() > 1e-3)
    assert bool(difference(*outputs(made, reference))) == bool((errors > allowed).any())


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_integers_and_bools_must_be_equal(dtype):
    reference = torch.tensor([0, 1, 1]).to(dtype)
    assert difference(*outputs(reference.clone(), reference)) == ""
    made = torch.tensor([1, 1, 1]).to(dtype)
    assert difference(*outputs(made, reference)).startswith("1 of 3 values are beyond")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_special_values_are_equal_to_themselves(value):
    reference = torch.tensor([value, 1.0])
    assert difference(*outputs(reference.clone(), reference)) == ""
    assert difference(*outputs(torch.tensor([2.0, 1.0]), reference)) != ""
    alone = torch.tensor([value])
    assert difference(*outputs(alone.clone(), alone)) == ""
    assert difference(*outputs(alone.new_empty(0), alone.new_empty(0))) == ""
