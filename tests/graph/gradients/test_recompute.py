"""Gradients of the layer's reference, recomputed for a call that ran on a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph.graph.gradients.recompute import Recompute
from tests.support.op_calls import call_of, layer_of


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, 4, dtype=torch.double))

    def forward(self, x: Tensor, scale: float, y: Tensor) -> Any:
        return x.tanh() * self.weight * scale, (y * 2).detach()


class Accumulates(nn.Module):
    """Writes into an operand."""

    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        total.add_(x.square())
        return x * 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.one + self.other.square()


FLOWS = (True, False)


def inputs() -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 3, 4, dtype=torch.double)
    return x.requires_grad_(), y.requires_grad_()


def recompute_of(layer: nn.Module, *args: Any, **options: Any) -> tuple[Recompute, list[Any]]:
    call, operands = call_of(layer, *args)
    return Recompute(layer_of(layer), call, **options), operands


def run_below_autograd(layer: Gate, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    recompute, operands = recompute_of(layer, x, 2.0, y)

    def kernel() -> list[Tensor]:
        assert not torch.is_grad_enabled()
        return [x.tanh() * layer.weight * 2.0, y * 2]

    return recompute.call(kernel, operands, FLOWS)


def test_join_undoes_split() -> None:
    recompute, operands = recompute_of(Gate(), inputs()[0], 2.0, inputs()[1])
    tensors, numbers = recompute.split(operands)
    assert numbers == [2.0]
    assert [type(v) for v in tensors] == [Tensor, Tensor, nn.Parameter]
    joined = recompute.join(tensors, numbers)
    assert all(a is b for a, b in zip(joined, operands, strict=True))


def test_gradients_of_a_call_are_the_references() -> None:
    layer, (x, y) = Gate(), inputs()
    results = run_below_autograd(layer, x, y)
    wanted = layer(x, 2.0, y)
    torch.testing.assert_close(results, wanted)
    made = torch.autograd.grad(results[0].square().sum(), (x, layer.weight))
    expected = torch.autograd.grad(wanted[0].square().sum(), (x, layer.weight))
    torch.testing.assert_close(made, expected)


def test_results_of_a_call_require_gradients_where_these_flow() -> None:
    results = run_below_autograd(Gate(), *inputs())
    assert tuple(result.requires_grad for result in results) == FLOWS


def test_double_backward_of_a_call_is_the_references() -> None:
    layer, (x, y) = Gate(), inputs()

    def first(x: Tensor) -> Tensor:
        return run_below_autograd(layer, x, y)[0]

    assert torch.autograd.gradcheck(first, (x,))
    assert torch.autograd.gradgradcheck(first, (x,))


def test_gradients_are_zeros_where_there_is_none_and_own_their_memory() -> None:
    x, y = inputs()
    recompute, operands = recompute_of(Gate(), x, 2.0, y)
    grads = [torch.ones(3, 4, dtype=torch.double), None]
    needs = recompute.join([True, True, False], [False])
    of_x, of_y = recompute.gradients(grads, operands, needs)
    assert torch.equal(of_y, torch.zeros_like(y))
    assert of_x.is_contiguous()
    assert not of_x.requires_grad
    assert len({v.data_ptr() for v in (of_x, of_y, grads[0], x, y)}) == 5


def test_gradient_of_tied_weights_goes_to_the_first() -> None:
    layer, x = Tied(), torch.randn(3, 4)
    recompute, operands = recompute_of(layer, x)
    tied = [False, *(v is layer.one for v in operands[1:])]
    made = recompute.gradients([torch.ones(3, 4)], operands, tied)
    (expected,) = torch.autograd.grad(layer(x).sum(), layer.one)
    torch.testing.assert_close(made[0], expected)
    assert not any(gradient.any() for gradient in made[1:])


def test_operands_that_the_reference_returns_have_gradients_too() -> None:
    x, total = torch.randn(3, 4), torch.zeros(3, 4)
    recompute, operands = recompute_of(Accumulates(), x, total, returned=(1,))
    grads = [None, torch.ones(3, 4)]
    (of_x, of_total) = recompute.gradients(grads, operands, [True, True])
    torch.testing.assert_close(of_x, 2 * x)
    torch.testing.assert_close(of_total, torch.ones(3, 4))
    assert not total.any()


class Normalizes(nn.Module):
    """Writes its buffers, which their versions do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, training=True)


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)


def test_buffers_that_the_reference_is_known_to_write_stay() -> None:
    layer, x = Normalizes(), torch.randn(3, 4)
    recompute, operands = recompute_of(layer, x, returned=(1, 2))
    recompute.gradients([torch.ones(3, 4), None, None], operands, [True, False, False])
    assert not layer.mean.any()
    assert torch.equal(layer.var, torch.ones(4))


def test_buffers_that_the_reference_writes_unexpectedly_are_restored_with_an_error() -> None:
    layer = Normalizes()
    recompute, operands = recompute_of(layer, torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="wrote into its operand mean, var, unlike in its trial"):
        recompute.gradients([torch.ones(3, 4)], operands, [True, False, False])
    assert not layer.mean.any()
    assert torch.equal(layer.var, torch.ones(4))


def test_random_numbers_that_the_reference_draws_are_put_back_with_an_error() -> None:
    recompute, operands = recompute_of(Drops(), torch.randn(3, 4))
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="drew random numbers"):
        recompute.gradients([torch.ones(3, 4)], operands, [True])
    assert torch.equal(torch.get_rng_state(), before)


def test_reference_that_writes_into_an_operand_unexpectedly_is_an_error() -> None:
    recompute, operands = recompute_of(
        Accumulates(), torch.randn(3, 4), torch.zeros(3, 4), place=lambda operands: " at block.0"
    )
    with pytest.raises(
        RuntimeError,
        match=r"^the reference of Accumulates at block\.0 wrote into its operand total",
    ):
        recompute.gradients([torch.ones(3, 4)], operands, [True, False])
