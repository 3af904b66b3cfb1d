"""Eager training: whatever a kernel's gradient is, the model trains on the layer's."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernelgraph import Mode, kernelize, last_report, training, use_kernel_forward_from_hub
from kernelgraph.report import Reason
from tests.toys import BrokenRepository, Plus10, Scale, ToyRepository, forwards, only

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
        return torch.from_numpy((torch.tanh(torch.from_numpy(x)).numpy() * weight + y))


class HalfDetached(nn.Module):
    """Gradients flow to one of its inputs alone."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x.detach()) * self.weight.detach() + y


class Plain(nn.Module):
    """Of operations that autograd knows."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.weight * x.tanh()


RIGHT = [kernel_of(Honest), Plain]
PREPARED = list(
    map(kernel_of, [ContiguousGradient, SpoilsGradient, SpoilsInput, SpoilsOwn, Holds])
)
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
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    caplog.set_level(logging.WARNING, logger="kernelgraph")
    training._warned.clear()
    yield lambda: caplog.messages


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
        for number in range(2):
            for _ in range(2):
                x, y = inputs()
                made, wanted = [], []
                for one, found in ((layer, made), (reference, wanted)):
                    used = x * 1
                    output = one(used, y)
                    (used if number else output).mul_(2)
                    try:
                        found += torch.autograd.grad(square(output), [x, y, one.weight])
                    except RuntimeError as error:
                        assert "modified by an inplace" in str(error) or "in-place" in str(error)
                if made and wanted:
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


LOSSES: list[Loss] = [torch.sum, square, lambda output: output.t().square().sum()]


@settings(max_examples=60, deadline=None)
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
