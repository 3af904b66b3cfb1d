"""Eager training: whatever a kernel's gradient is, the model trains on the layer's."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import logging
import pickle
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernelgraph import Mode, kernelize, last_report, report, use_kernel_forward_from_hub
from kernelgraph.report import Reason
from tests.support.toys import BrokenRepository, Plus10, Scale, forwards, only

TRAINING = Mode.TRAINING
WIDTH = 4


@use_kernel_forward_from_hub("Gate")
class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x) * self.weight + y


# --- kernels, honest and lying -------------------------------------------------------------------

calls: list[str] = []
"""What the honest kernel did."""


class Honest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        calls.append("forward")
        ctx.save_for_backward(x, weight)
        ctx.shape = y.shape
        return torch.tanh(x) * weight + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        calls.append("backward")
        x, weight = ctx.saved_tensors
        th = torch.tanh(x)
        weights = (grad * th).reshape(-1, WIDTH).sum(0)
        return grad * weight * (1 - th * th), weights, grad.sum_to_size(ctx.shape)


class Zero(Honest):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(torch.zeros_like(g) for g in Honest.backward(ctx, grad))


class Identity(Honest):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, weights, ys = Honest.backward(ctx, grad)
        return grad, weights, ys


class Factor(Honest):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xs, weights, ys = Honest.backward(ctx, grad)
        return 2 * xs, weights, ys


class NoWeight(Honest):
    """Has no gradient of the weight."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xs, _, ys = Honest.backward(ctx, grad)
        return xs, None, ys


class ContiguousInput(Honest):
    """Reads its input in the backward as if it were contiguous."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        strides = torch.empty(x.shape, device="meta").stride()
        th = torch.tanh(x.as_strided(x.shape, strides))
        weights = (grad * th).reshape(-1, WIDTH).sum(0)
        return grad * weight * (1 - th * th), weights, grad.sum_to_size(ctx.shape)


class NoBroadcast(Honest):
    """Has the gradient of its last operand where it was not broadcast."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xs, weights, ys = Honest.backward(ctx, grad)
        return xs, weights, grad if ctx.shape == grad.shape else torch.ones_like(ys)


class ContiguousGradient(Honest):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return Honest.backward(ctx, grad if grad.is_contiguous() else torch.ones_like(grad))


class SpoilsGradient(Honest):
    """Writes into the gradient that it is given."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made = Honest.backward(ctx, grad.clone())
        grad.zero_()
        return made


class SpoilsInput(Honest):
    """Writes into what it saved of its input."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        th = torch.tanh(x)
        weights = (grad * th).reshape(-1, WIDTH).sum(0)
        x.data.zero_()
        return grad * weight * (1 - th * th), weights, grad.sum_to_size(ctx.shape)


class SpoilsOwn(Honest):
    """Writes into what it made in its forward for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        th = torch.tanh(x)
        ctx.save_for_backward(th, weight)
        ctx.shape = y.shape
        return th * weight + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        th, weight = ctx.saved_tensors
        weights = (grad * th).reshape(-1, WIDTH).sum(0)
        slope = th.square_().neg_().add_(1)
        return grad * weight * slope, weights, grad.sum_to_size(ctx.shape)


class Holds(Honest):
    """Keeps its input, its result and its weight where autograd does not look after them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        ctx.x, ctx.weight, ctx.shape = x.detach(), weight.detach(), y.shape
        return torch.tanh(x) * weight + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        th = torch.tanh(ctx.x)
        weights = (grad * th).reshape(-1, WIDTH).sum(0)
        return grad * ctx.weight * (1 - th * th), weights, grad.sum_to_size(ctx.shape)


class Once(Honest):
    """Frees what it needs when its backward has run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        made = Honest.forward(ctx, x, weight, y)
        ctx.left = 1
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.left -= 1
        return Honest.backward(ctx, grad if ctx.left >= 0 else 0 * grad)


def kernel_of(function: Any) -> type[nn.Module]:
    def forward(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return function.apply(x, self.weight, y)

    return type(function.__name__, (nn.Module,), {"forward": forward})


class Detached(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x.detach()) * self.weight.detach() + y.detach()


class Numpy(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, weight, y = (v.detach().numpy() for v in (x, self.weight, y))
        return torch.from_numpy(torch.tanh(torch.from_numpy(x)).numpy() * weight + y)


class HalfDetached(nn.Module):
    """Gradients flow to one of its inputs alone."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x.detach()) * self.weight.detach() + y


class Plain(nn.Module):
    """Of operations that autograd knows."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.weight * x.tanh()


RIGHT = [kernel_of(Honest), Plain]
PREPARED = list(map(kernel_of, [ContiguousGradient, SpoilsGradient, SpoilsInput, SpoilsOwn, Holds]))
"""Right where they get contiguous gradients, or copies."""
ALWAYS_WRONG = [*map(kernel_of, [Zero, Identity, Factor, NoWeight, Once]), Detached, Numpy]
AT_TIMES_WRONG = [*map(kernel_of, [ContiguousInput, NoBroadcast]), HalfDetached]
KERNELS = [*RIGHT, *PREPARED, *ALWAYS_WRONG, *AT_TIMES_WRONG]
by_name = functools.partial(pytest.mark.parametrize, ids=lambda kernel: kernel.__name__)


def kernelized(kernel: Any, layer: nn.Module | None = None, **options: Any) -> Any:
    with only(Gate=kernel):
        return kernelize(layer or Gate(), mode=TRAINING, **options)


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    shape = shape or (3, WIDTH)
    return torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)


Loss = Callable[[Tensor], Tensor]


def square(output: Tensor) -> Tensor:
    return output.square().sum()


def gradients(layer: nn.Module, x: Tensor, y: Tensor, loss: Loss = square) -> list[Tensor | None]:
    """Those of a loss of a layer's output, of all that requires them."""
    wanted = [v for v in (x, y, *layer.parameters()) if v.requires_grad]
    return list(torch.autograd.grad(loss(layer(x, y)), wanted, allow_unused=True))


def assert_trains_like_the_reference(
    kernel: Any, x: Tensor, y: Tensor, loss: Loss = square, **options: Any
) -> None:
    layer = kernelized(kernel, **options)
    for _ in range(2):  # the call that decides, and one that goes the way decided on
        made, wanted = gradients(layer, x, y, loss), gradients(Gate(), x, y, loss)
        torch.testing.assert_close(made, wanted)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger="kernelgraph")
    report._warned.clear()
    return lambda: caplog.messages


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- the law -------------------------------------------------------------------------------------


@by_name("kernel", KERNELS)
class TestGradients:
    def test_are_the_layers(self, kernel: Any) -> None:
        assert_trains_like_the_reference(kernel, *inputs())

    def test_of_incoming_gradients_that_are_expanded(self, kernel: Any) -> None:
        assert_trains_like_the_reference(kernel, *inputs(), loss=torch.sum)

    def test_of_inputs_that_are_not_contiguous(self, kernel: Any) -> None:
        x = torch.randn(WIDTH, 3, requires_grad=True)
        assert_trains_like_the_reference(kernel, x.t(), torch.randn(3, WIDTH), loss=square)
        assert_trains_like_the_reference(kernel, x[:, ::2].t(), torch.randn(2, WIDTH))

    def test_of_inputs_that_are_broadcast(self, kernel: Any) -> None:
        x, _ = inputs(2, 3, WIDTH)
        for shape in [(WIDTH,), (1, WIDTH), (3, 1), ()]:
            assert_trains_like_the_reference(kernel, x, torch.randn(shape, requires_grad=True))

    def test_of_some_inputs_alone(self, kernel: Any) -> None:
        layer, reference = kernelized(kernel), Gate()
        x, y = inputs()
        for wanted in [(True, False, False), (False, True, False), (False, False, True)]:
            for one in (layer, reference):
                one.weight.requires_grad_(wanted[0])
            x.requires_grad_(wanted[1])
            y.requires_grad_(wanted[2])
            torch.testing.assert_close(gradients(layer, x, y), gradients(reference, x, y))

    def test_accumulate(self, kernel: Any) -> None:
        layer, reference = kernelized(kernel), Gate()
        for _ in range(3):
            x, y = inputs()
            for one in (layer, reference):
                one(x, y).square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, reference.weight.grad)

    def test_of_a_graph_that_is_retained(self, kernel: Any) -> None:
        layer, (x, y) = kernelized(kernel), inputs()
        wanted = gradients(Gate(), x, y)
        loss = square(layer(x, y))
        for _ in range(2):
            made = torch.autograd.grad(loss, [x, y, layer.weight], retain_graph=True)
            torch.testing.assert_close(list(made), wanted)

    def test_where_another_reads_the_same_gradient(self, kernel: Any) -> None:
        def twice(output: Tensor) -> Tensor:
            return (output + y * 3).sum()

        x, y = inputs()
        assert_trains_like_the_reference(kernel, x, y, twice)

    def test_leave_the_inputs_as_they_were(self, kernel: Any) -> None:
        x, y = inputs()
        before = x.detach().clone(), y.detach().clone()
        layer = kernelized(kernel)
        weight = layer.weight.detach().clone()
        for _ in range(2):
            gradients(layer, x, y)
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])
        assert torch.equal(layer.weight, weight)

    def test_within_activation_checkpointing(self, kernel: Any) -> None:
        for reentrant in (False, True):
            layer, (x, y) = kernelized(kernel), inputs()

            def run(x: Tensor, y: Tensor, layer: Any = layer, reentrant: bool = reentrant) -> Any:
                return checkpoint(layer, x, y, use_reentrant=reentrant)

            for _ in range(2):
                made = torch.autograd.grad(square(run(x, y)), [x, y]) if not reentrant else None
                x.grad = y.grad = None
                square(run(x, y)).backward()
                wanted = gradients(Gate(), x, y)[:2]
                torch.testing.assert_close([x.grad, y.grad], wanted)
                if made is not None:
                    torch.testing.assert_close(list(made), wanted)

    def test_in_an_autocast_region(self, kernel: Any) -> None:
        layer, (x, y) = kernelized(kernel), inputs()
        gradients(layer, x, y)
        with torch.autocast("cpu", torch.bfloat16):
            made, wanted = gradients(layer, x, y), gradients(Gate(), x, y)
        torch.testing.assert_close(made, wanted)

    def test_in_low_precision(self, kernel: Any) -> None:
        if kernel is Numpy:
            pytest.skip("numpy has no bfloat16")
        layer, reference = (made.bfloat16() for made in (kernelized(kernel), Gate()))
        x, y = (v.detach().bfloat16().requires_grad_() for v in inputs())
        made, wanted = gradients(layer, x, y), gradients(reference, x, y)
        torch.testing.assert_close(made, wanted, rtol=0.05, atol=0.05)

    def test_where_the_reference_is_to_be_used(self, kernel: Any) -> None:
        assert_trains_like_the_reference(kernel, *inputs(), wrong_gradient="reference")

    def test_where_an_input_or_the_output_is_written_into_afterwards(self, kernel: Any) -> None:
        layer, reference = kernelized(kernel), Gate()

        def found(one: nn.Module, x: Tensor, y: Tensor, *, output: bool) -> Any:
            used = x * 1
            made = one(used, y)
            (made if output else used).mul_(2)
            return list(torch.autograd.grad(square(made), [x, y, *one.parameters()]))

        for output in (True, False, True, False):
            x, y = inputs()
            wanted = found(reference, x, y, output=output)
            try:
                made = found(layer, x, y, output=output)
            except RuntimeError as error:  # as autograd says where it cannot go back
                if not re.search(r"in-?place operation", str(error)) or output:
                    raise
            else:
                torch.testing.assert_close(made, wanted)


@st.composite
def arguments(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two inputs, one maybe transposed, expanded or sliced, and the other maybe broadcast."""
    sizes = [*draw(st.lists(st.integers(1, 3), max_size=2)), WIDTH]
    layout = draw(st.sampled_from(["plain", "transposed", "expanded", "sliced"]))
    x = torch.randn([n * 2 for n in sizes])[tuple(slice(0, n) for n in sizes)]
    if layout == "plain":
        x = torch.randn(sizes)
    elif layout == "transposed":
        x = torch.randn(sizes[::-1]).permute(*reversed(range(len(sizes))))
    elif layout == "expanded":
        x = torch.randn([1] * len(sizes)).expand(sizes)
    cut = draw(st.integers(0, len(sizes)))
    other = [draw(st.sampled_from([n, 1])) for n in sizes[cut:]]
    y = torch.randn(other)
    return x.requires_grad_(draw(st.booleans())), y.requires_grad_(draw(st.booleans()))


@settings(max_examples=60)
@given(
    st.sampled_from(KERNELS),
    arguments(),
    st.booleans(),
    st.sampled_from([torch.sum, square, lambda output: output.mean(0).sum()]),
    st.sampled_from(["recompute", "reference"]),
)
def test_whatever_a_kernels_gradient_is_training_sees_the_references(
    kernel: Any, given: tuple[Tensor, Tensor], frozen: bool, loss: Loss, wrong: str
) -> None:
    x, y = given
    layer, reference = kernelized(kernel, wrong_gradient=wrong), Gate()
    for one in (layer, reference):
        one.weight.requires_grad_(not frozen)
    for _ in range(2):
        output, wanted = layer(x, y), reference(x, y)
        torch.testing.assert_close(output, wanted)
        assert output.requires_grad == wanted.requires_grad
        if wanted.requires_grad:
            torch.testing.assert_close(
                gradients(layer, x, y, loss), gradients(reference, x, y, loss)
            )


# --- a kernel whose backward is right ------------------------------------------------------------


class TestHonest:
    def test_runs_once_forward_and_once_backward(self) -> None:
        layer, (x, y) = kernelized(kernel_of(Honest)), inputs()
        gradients(layer, x, y)
        calls.clear()
        for _ in range(3):
            gradients(layer, x, y)
        assert calls == ["forward", "backward"] * 3

    def test_is_called_as_it_is(self) -> None:
        layer, (x, y) = kernelized(kernel_of(Honest)), inputs()
        for _ in range(2):
            assert type(layer(x, y).grad_fn).__name__ == "HonestBackward"
        assert type(kernelized(Plain)(x, y).grad_fn).__name__ == "AddBackward0"

    def test_says_nothing(self, messages: Callable[[], list[str]]) -> None:
        gradients(kernelized(kernel_of(Honest)), *inputs())
        assert messages() == []
        assert last_report().decisions[0].gradient == "kernel"
        assert last_report().decisions[0].uses_kernel


# --- a kernel that needs the reference -----------------------------------------------------------


@use_kernel_forward_from_hub("Gate")
class Counted(Gate):
    """A layer that counts its own forwards."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        counts["reference"] += 1
        return torch.tanh(x) * self.weight + y


counts = {"reference": 0, "kernel": 0}


class CountedZero(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        counts["kernel"] += 1
        return Zero.apply(x, self.weight, y)


class TestWrongGradient:
    def counted(self, **options: Any) -> dict[str, int]:
        layer, (x, y) = kernelized(CountedZero, Counted(), **options), inputs()
        gradients(layer, x, y)
        for name in counts:
            counts[name] = 0
        gradients(layer, x, y)
        return dict(counts)

    def test_recompute_runs_the_kernel_and_for_the_gradient_the_reference(self) -> None:
        assert self.counted() == {"reference": 1, "kernel": 1}

    def test_reference_runs_no_kernel(self) -> None:
        assert self.counted(wrong_gradient="reference") == {"reference": 1, "kernel": 0}

    def test_is_believed_where_gradients_are_not_to_be_verified(self) -> None:
        assert self.counted(verify_gradients=False) == {"reference": 0, "kernel": 1}
        made = gradients(kernelized(CountedZero, verify_gradients=False), *inputs())
        assert all(not gradient.any() for gradient in made)

    @by_name("kernel", [Detached, Numpy])
    def test_is_never_missing_even_then(self, kernel: Any) -> None:
        assert_trains_like_the_reference(kernel, *inputs(), verify_gradients=False)

    def test_a_double_backward_is_that_of_the_reference(self) -> None:
        layer = kernelized(Detached)
        x, y = (v.detach().double().requires_grad_() for v in inputs())
        layer.double()
        assert torch.autograd.gradcheck(layer, (x, y))
        assert torch.autograd.gradgradcheck(layer, (x, y))
        assert torch.autograd.gradgradcheck(lambda x: layer(x, x * x), (x,))

    def test_no_gradient_is_wanted_where_the_layer_has_none(self) -> None:
        @use_kernel_forward_from_hub("Gate")
        class Still(Gate):
            def forward(self, x: Tensor, y: Tensor) -> Any:
                return torch.tanh(x) * self.weight + y, x.argmax(-1), y.detach()

        class Kernel(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Any:
                return Detached.forward(self, x, y), x.argmax(-1), y.detach()

        layer, (x, y) = kernelized(Kernel, Still()), inputs()
        for _ in range(2):
            first, indices, last = layer(x, y)
            assert (first.requires_grad, indices.requires_grad, last.requires_grad) == (
                True,
                False,
                False,
            )
            assert indices.dtype == torch.int64

    def test_an_identity_gives_a_tensor_of_its_own(self) -> None:
        @use_kernel_forward_from_hub("Gate")
        class Same(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return x * 1

        class Kernel(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return x.detach()

        x, y = inputs()
        layer = kernelize_on_cpu(Kernel, Same())
        used = x * 1
        for _ in range(2):
            output = layer(used, y)
            output.mul_(2)
            assert not torch.equal(output, used)
        assert torch.equal(torch.autograd.grad(output.sum(), x)[0], torch.full_like(x, 2))


def kernelize_on_cpu(kernel: Any, layer: nn.Module) -> nn.Module:
    with only(Gate=kernel):
        return kernelize(layer, mode=TRAINING, device="cpu")


class TestWrongOutput:
    def test_trains_nothing(self, messages: Callable[[], list[str]]) -> None:
        with only(Scale=Plus10):
            layer = kernelize(Scale(2.0), mode=TRAINING)
        x = torch.ones((), requires_grad=True)
        for _ in range(2):
            assert layer(x) == 2
        with torch.no_grad():
            assert layer(x) == 12
        with torch.inference_mode():
            assert layer(torch.ones(())) == 12
        layer.requires_grad_(False)
        assert layer(x.detach()) == 12
        (decision,) = last_report().decisions
        assert (decision.reason, decision.kernel, decision.gradient) == (Reason.WRONG, "", "")
        assert decision.detail.startswith("tests@")
        assert ": Plus10: it is off by" in decision.detail
        (message,) = messages()
        assert message.endswith("; where a gradient is wanted, the layer runs on its own forward")

    def test_is_believed_where_it_is_not_to_be_verified(self) -> None:
        with only(Scale=Plus10):
            layer = kernelize(Scale(2.0), mode=TRAINING, verify_gradients=False)
        assert layer(torch.ones((), requires_grad=True)) == 12


# --- calls of every kind -------------------------------------------------------------------------


@dataclasses.dataclass
class Both:
    first: Tensor
    second: Any = None


@use_kernel_forward_from_hub("Gate")
class Nested(nn.Module):
    """Takes and gives tensors in containers, and has some in submodules and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.more = [torch.ones(WIDTH, requires_grad=True)]
        self.scale = 2.0

    def forward(self, parts: Any, *, both: Any = None, index: Any = None, add: float = 0.0) -> Any:
        first = self.inner(parts["x"][0]) * self.more[0] * self.scale + add
        if both is not None:
            first = first + both.first
        if index is not None:
            first = first[index]
        return Both(first, {"square": [first * first, None], "count": 3})


class NestedDetached(nn.Module):
    def forward(self, parts: Any, *, both: Any = None, index: Any = None, add: float = 0.0) -> Any:
        x, weight = parts["x"][0].detach(), self.inner.weight.detach()
        first = (x @ weight.t() + self.inner.bias.detach()) * self.more[0].detach()
        first = first * self.scale + add
        if both is not None:
            first = first + both.first.detach()
        if index is not None:
            first = first[index]
        return Both(first, {"square": [first * first, None], "count": 3})


class TestCalls:
    def gradients(self, layer: Any, **kwargs: Any) -> list[Any]:
        x = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH).requires_grad_()
        output = layer({"x": (x, None)}, **kwargs)
        assert type(output) is Both
        assert output.second["count"] == 3
        square, nothing = output.second["square"]
        assert nothing is None
        loss = output.first.sum() + square.sum()
        held = [x, layer.more[0], *layer.parameters()]
        held += [v.first for v in kwargs.values() if type(v) is Both]
        return list(torch.autograd.grad(loss, held, allow_unused=True))

    def test_with_containers(self) -> None:
        reference = Nested()
        layer = kernelized(NestedDetached, copy.deepcopy(reference))
        index = torch.tensor([2, 0])
        for kwargs in [
            {},
            {"add": 1.5},
            {"add": 2},
            {"both": Both(torch.ones(3, WIDTH, requires_grad=True))},
            {"index": index},
            {"index": index, "add": 1.5},
        ]:
            for _ in range(2):
                made, wanted = (self.gradients(one, **kwargs) for one in (layer, reference))
                torch.testing.assert_close(made, wanted)
        assert last_report().decisions[0].gradient.startswith("reference: it has no backward")

    def test_after_the_layer_has_changed(self) -> None:
        reference = Nested()
        layer = kernelized(NestedDetached, copy.deepcopy(reference))
        for change in [
            lambda one: setattr(one, "scale", 3.0),
            lambda one: one.inner.weight.requires_grad_(False),
            lambda one: one.inner.weight.requires_grad_(True),
            lambda one: setattr(one, "more", [torch.full((WIDTH,), 2.0, requires_grad=True)]),
            lambda one: one.inner.weight.data.mul_(2),
            lambda one: setattr(one.inner, "weight", nn.Parameter(torch.ones(WIDTH, WIDTH))),
            lambda one: one.eval(),
            lambda one: one.double(),
            lambda one: one.float(),
        ]:
            self.gradients_or_none(layer)
            for one in (layer, reference):
                change(one)
            made, wanted = self.gradients_or_none(layer), self.gradients_or_none(reference)
            torch.testing.assert_close(made, wanted)

    def gradients_or_none(self, layer: Any) -> list[Any]:
        x = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH).to(layer.inner.bias.dtype)
        x.requires_grad_()
        output = layer({"x": (x, None)})
        held = [v for v in (x, layer.more[0], *layer.parameters()) if v.requires_grad]
        return list(torch.autograd.grad(output.first.square().sum(), held))

    def test_of_layers_with_other_attributes(self) -> None:
        # One that is right with this attribute, and wrong with that.
        @use_kernel_forward_from_hub("Gate")
        class Turned(nn.Module):
            def __init__(self, by: str, factor: float) -> None:
                super().__init__()
                self.by, self.factor = by, factor
                self.weight = nn.Parameter(torch.ones(WIDTH)) if by == "weight" else None

            def forward(self, x: Tensor) -> Tensor:
                made = x * self.factor if self.by == "factor" else x.sin()
                return made if self.weight is None else made * self.weight

        class Kernel(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                made = x * self.factor if self.by == "factor" else x.sin()
                if self.weight is not None:
                    return (made * self.weight).detach()
                return made if self.by == "factor" else made.detach()

        pairs = [("factor", 2.0), ("sin", 2.0), ("weight", 3.0), ("factor", 5.0), ("sin", 3.0)]
        model = nn.ModuleList(Turned(*pair) for pair in pairs)
        with only(Gate=Kernel):
            kernelize(model, mode=TRAINING)
        x = torch.randn(3, WIDTH, requires_grad=True)
        for layer in [*model, *model]:
            made = torch.autograd.grad(layer(x).sum(), x)
            torch.testing.assert_close(made, torch.autograd.grad(Turned.forward(layer, x).sum(), x))
        sources = [d.gradient.partition(":")[0] for d in last_report().decisions]
        assert sources == ["kernel", "reference", "reference", "kernel", "reference"]

    def test_without_gradients_go_to_the_kernel(self) -> None:
        layer, (x, y) = kernelized(CountedZero, Counted()), inputs()
        for name in counts:
            counts[name] = 0
        with torch.no_grad():
            layer(x, y)
        with torch.inference_mode():
            layer(x, y)
        layer.requires_grad_(False)
        layer(x.detach(), y.detach())
        assert counts == {"reference": 0, "kernel": 3}
        assert last_report().decisions[0].gradient == ""

    def test_in_transforms_of_torch_func_go_to_the_reference(self) -> None:
        layer, (x, y) = kernelized(Detached), inputs()
        wanted = gradients(Gate(), x, y)
        made = torch.func.grad(lambda x: square(layer(x, y)))(x)
        torch.testing.assert_close(made, wanted[0])
        for one in (layer, Gate()):
            _, tangent = torch.func.jvp(lambda x, one=one: one(x, y), (x,), (torch.ones_like(x),))
            torch.testing.assert_close(tangent, (1 - x.tanh() ** 2) * one.weight)
        weights = dict(layer.named_parameters())
        made = torch.func.grad(
            lambda weights: square(torch.func.functional_call(layer, weights, (x, y)))
        )(weights)
        torch.testing.assert_close(made["weight"], wanted[2])

    def test_with_weights_from_elsewhere(self) -> None:
        layer, (x, y) = kernelized(Detached), inputs()
        for _ in range(2):
            weight = torch.full((WIDTH,), 3.0, requires_grad=True)
            output = torch.func.functional_call(layer, {"weight": weight}, (x, y))
            torch.testing.assert_close(output, torch.tanh(x) * 3 + y)
            (made,) = torch.autograd.grad(output.sum(), weight)
            torch.testing.assert_close(made, torch.tanh(x).sum(0))

    def test_with_one_tensor_twice(self) -> None:
        layer, (x, _) = kernelized(Detached), inputs()
        for _ in range(2):
            made = torch.autograd.grad(square(layer(x, x)), x)
            torch.testing.assert_close(made, torch.autograd.grad(square(Gate()(x, x)), x))


# --- calls of which nothing can be told ----------------------------------------------------------


class Odd:
    """Holds a tensor where nobody looks."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@use_kernel_forward_from_hub("Gate")
class TakesOdd(nn.Module):
    def forward(self, odd: Any) -> Tensor:
        return odd.tensor.sin()


class OddDetached(nn.Module):
    def forward(self, odd: Any) -> Tensor:
        return odd.tensor.detach().sin()


@use_kernel_forward_from_hub("Gate")
class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.steps = nn.Parameter(torch.ones(WIDTH)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x * self.weight


class CountsDetached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return (x * self.weight).detach()


@use_kernel_forward_from_hub("Gate")
class Averages(nn.Module):
    """Writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return x * self.weight


class AveragesDetached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return (x * self.weight).detach()


@use_kernel_forward_from_hub("Gate")
class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


class DropsDetached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.detach(), 0.5, self.training)


class TestUntold:
    @pytest.mark.parametrize(
        ("layer", "kernel"),
        [
            (TakesOdd, OddDetached),
            (Counts, CountsDetached),
            (Averages, AveragesDetached),
            (Drops, DropsDetached),
        ],
    )
    def test_keeps_the_reference(
        self, layer: Any, kernel: Any, messages: Callable[[], list[str]]
    ) -> None:
        made, reference = kernelize_on_cpu(kernel, layer()), layer()
        for _ in range(3):
            found = []
            for one in (made, reference):
                torch.manual_seed(1)
                x = torch.randn(3, WIDTH, requires_grad=True)
                output = one(Odd(x) if layer is TakesOdd else x)
                found.append([output, *torch.autograd.grad(square(output), x)])
            torch.testing.assert_close(*found)
        torch.testing.assert_close(made.state_dict(), reference.state_dict())
        assert vars(made).get("steps") == vars(reference).get("steps")
        (decision,) = last_report().decisions
        assert decision.reason is Reason.WRONG
        (message,) = messages()
        assert "gradient" in message
        assert message.endswith("; where a gradient is wanted, the layer runs on its own forward")

    def test_without_gradients_runs_the_kernel(self) -> None:
        made = kernelize_on_cpu(CountsDetached, Counts())
        made.requires_grad_(False)
        assert made(torch.ones(WIDTH)).grad_fn is None
        assert last_report().decisions[0].uses_kernel


# --- errors --------------------------------------------------------------------------------------


class Fails(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if failing["forward"]:
            raise ArithmeticError("the kernel fails")
        return Detached.forward(self, x, y)


class FailsBackward(Honest):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if failing["backward"]:
            raise ArithmeticError("the backward fails")
        return Honest.backward(ctx, grad)


failing = {"forward": False, "backward": False}


class TestErrors:
    @pytest.mark.parametrize("where", ["forward", "backward"])
    def test_leave_nothing_broken(self, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = kernelized(Fails if where == "forward" else kernel_of(FailsBackward))
        x, y = inputs()
        gradients(layer, x, y)
        for _ in range(2):
            with monkeypatch.context() as patched:
                patched.setitem(failing, where, True)
                with pytest.raises(ArithmeticError, match=r"^the (kernel|backward) fails$"):
                    gradients(layer, x, y)
            torch.testing.assert_close(gradients(layer, x, y), gradients(Gate(), x, y))

    def test_of_the_very_first_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class First(Fails):
            pass

        layer, (x, y) = kernelized(First), inputs()
        with monkeypatch.context() as patched:
            patched.setitem(failing, "forward", True)
            with pytest.raises(ArithmeticError, match="the kernel fails"):
                gradients(layer, x, y)

    def test_a_kernel_that_returns_another_number_of_tensors(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Any:
                made = Detached.forward(self, x, y)
                return made, made

        layer, (x, y) = kernelized(Two, verify_gradients=False), inputs()
        with pytest.raises(RuntimeError, match=r"Two returned 2 tensors, and the layer 1$"):
            layer(x, y)


# --- options -------------------------------------------------------------------------------------


class TestOptions:
    @pytest.mark.parametrize("value", [None, 1, "yes"])
    def test_verify_gradients_is_a_bool(self, value: Any) -> None:
        layer = Gate()
        with pytest.raises(TypeError, match=r"^verify_gradients is True or False, not "):
            kernelized(BrokenRepository(), layer, verify_gradients=value)
        assert forwards(layer) == {}

    @pytest.mark.parametrize("value", [None, True, ["recompute"]])
    def test_wrong_gradient_is_a_str(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r'^wrong_gradient is "recompute" or "reference", not '):
            kernelized(BrokenRepository(), wrong_gradient=value)

    def test_wrong_gradient_is_one_of_two(self) -> None:
        with pytest.raises(
            ValueError, match=r"^wrong_gradient is \"recompute\" or \"reference\", not 'raise'$"
        ):
            kernelized(BrokenRepository(), wrong_gradient="raise")

    @pytest.mark.parametrize("mode", [TRAINING, TRAINING | Mode.TORCH_COMPILE, Mode.INFERENCE])
    def test_are_kept_in_copies_and_pickles(self, mode: Mode) -> None:
        with only(Scale=Plus10):
            layer = kernelize(
                Scale(), mode=mode, verify_gradients=False, wrong_gradient="reference"
            )
        for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            recipe = vars(one)["forward"].recipe
            assert (recipe.verify_gradients, recipe.wrong_gradient) == (False, "reference")

    def test_hold_in_copies_and_pickles(self) -> None:
        for options in ({}, {"verify_gradients": False}):
            with only(Scale=Plus10):
                layer = kernelize(Scale(), mode=TRAINING, **options)
            for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert one(torch.ones(())) == (11 if options else 1)


# --- what is told --------------------------------------------------------------------------------


def gates(count: int) -> nn.Sequential:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Gate()

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(x, x)

    return nn.Sequential(*(Step() for _ in range(count)))


class TestTold:
    def test_one_warning_for_a_kernel_layer_and_reason(
        self, messages: Callable[[], list[str]]
    ) -> None:
        for _ in range(2):
            model = kernelized(Detached, gates(3))
            for rows in (2, 3, 2):
                model(torch.randn(rows, WIDTH, requires_grad=True)).sum().backward()
        (message,) = messages()
        kernel = str(last_report().decisions[0].kernel)
        assert message == (
            f"kernel {kernel} for layer Gate at 0.gate: it has no backward: no gradient flows "
            "through what it returns; its backward runs the layer's own forward again, for its "
            "gradient"
        )

    def test_the_report_says_where_the_gradient_comes_from(self) -> None:
        model = kernelized(Detached, gates(2))
        published = last_report()
        assert [d.gradient for d in published.decisions] == ["", ""]
        x = torch.randn(2, WIDTH, requires_grad=True)
        model[0](x)
        assert [bool(d.gradient) for d in last_report().decisions] == [True, False]
        model(x)
        told = last_report().decisions
        assert [d.path for d in told] == ["0.gate", "1.gate"]
        for decision in told:
            assert decision.reason is Reason.KERNEL
            assert decision.gradient.startswith("reference: it has no backward")
        # What was published stays what it was.
        assert [d.gradient for d in published.decisions] == ["", ""]

    def test_the_report_says_which_keep_their_reference(self) -> None:
        model = kernelized(Detached, gates(2), wrong_gradient="reference")
        kernel = last_report().decisions[0].kernel
        model(torch.randn(2, WIDTH, requires_grad=True))
        for decision in last_report().decisions:
            assert (decision.reason, decision.kernel) == (Reason.WRONG, "")
            assert decision.detail.startswith(f"{kernel}: it has no backward")

    def test_the_worst_of_the_calls_counts(self) -> None:
        class Wide(nn.Module):
            """Has a gradient of wide inputs alone."""

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                made = Plain.forward(self, x, y)
                return made if x.dim() > 1 else made.detach()

        layer = kernelized(Wide)
        for shape, source in [((2, WIDTH), "kernel"), ((WIDTH,), "refer"), ((2, WIDTH), "refer")]:
            gradients(layer, *inputs(*shape))
            assert last_report().decisions[0].gradient.startswith(source)

    def test_the_report_of_another_is_left_alone(self) -> None:
        model = kernelized(Detached, gates(1))
        with only(Scale=Plus10):
            kernelize(Scale(), mode=Mode.INFERENCE)
        other = last_report()
        model(torch.randn(2, WIDTH, requires_grad=True))
        assert last_report() is other

    def test_of_a_copy_is_not_told_in_the_report(self, messages: Callable[[], list[str]]) -> None:
        layer = kernelized(Detached)
        report = last_report()
        for one in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            gradients(one, *inputs())
        assert last_report() is report
        assert len(messages()) == 1
        assert " for layer Gate: it has no backward" in messages()[0]


# --- all else is as it was -----------------------------------------------------------------------


class TestUnchanged:
    @by_name("kernel", [kernel_of(Holds), Plain, Detached])
    def test_a_model_compiled_by_any_backend(self, kernel: Any) -> None:
        layer, (x, y) = kernelized(kernel), inputs()
        gradients(layer, x, y)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, y), Gate()(x, y))

    @by_name("kernel", [kernel_of(Honest), Detached])
    def test_hooks(self, kernel: Any) -> None:
        layer, (x, y) = kernelized(kernel), inputs()
        seen: list[str] = []
        layer.register_forward_hook(lambda *_: seen.append("forward"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
        layer.weight.register_post_accumulate_grad_hook(lambda _: seen.append("weight"))
        for _ in range(2):
            layer(x, y).sum().backward()
        assert sorted(seen) == sorted(["forward", "weight", "backward"] * 2)

    def test_state_and_signature(self) -> None:
        layer = kernelized(Detached)
        gradients(layer, *inputs())
        assert list(layer.state_dict()) == ["weight"]
        assert vars(layer).keys() == {*vars(Gate()), "forward"}
        copied = copy.deepcopy(layer)
        with torch.no_grad():
            copied.weight.fill_(1)
        reference, (x, y) = Gate(), inputs()
        reference.load_state_dict(copied.state_dict())
        torch.testing.assert_close(gradients(copied, x, y), gradients(reference, x, y))

    @by_name("kernel", [kernel_of(Honest), Detached])
    @pytest.mark.usefixtures("one_process")
    def test_data_parallel_training(self, kernel: Any) -> None:
        layer, reference, (x, y) = kernelized(kernel), Gate(), inputs()
        parallel = nn.parallel.DistributedDataParallel(layer)
        for _ in range(2):
            square(parallel(x, y)).backward()
            square(reference(x, y)).backward()
        torch.testing.assert_close(layer.weight.grad, reference.weight.grad)

    def test_threads(self) -> None:
        layer, reference = kernelized(Detached), Gate()
        errors: list[BaseException] = []

        def train(number: int) -> None:
            try:
                for rows in range(1, 12):
                    x = torch.full((rows, WIDTH), number / 7.0, requires_grad=True)
                    y = torch.ones(rows, WIDTH, requires_grad=True)
                    made, wanted = gradients(layer, x, y), gradients(reference, x, y)
                    torch.testing.assert_close(made, wanted)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@by_name("kernel", [Detached, kernel_of(Holds), kernel_of(SpoilsOwn), kernel_of(Honest)])
def test_nothing_is_left_of_steps_whose_backward_never_runs(kernel: Any) -> None:
    layer, (x, y) = kernelized(kernel), inputs()
    layer(x, y).sum().backward()
    before = live_tensors()
    for step in range(2000):
        loss = layer(x, y).sum()
        if step % 3 == 0:
            loss.backward()
    del loss
    assert live_tensors() <= before
