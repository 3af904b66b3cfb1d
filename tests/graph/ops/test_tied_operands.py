"""Ops with operands that are one tensor, or that come back as results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.op_calls import lowered, own_backward
from tests.support.op_toys import hub_layer


class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.count = count
        return x * weight * count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return grad * weight * ctx.count, (grad * x).sum(0) * ctx.count, None


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = self.other = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (self.other * 0 + 1) * len(list(self.parameters()))


TIED = {
    "autograd": (Tied.forward, own_backward((0, 1, 2), (), (True,))),
    "holds": (Tied.forward, own_backward((0, 1, 2), (), (True,), hidden_saves=True)),
    "function": (
        lambda self, x: Counted.apply(
            x, self.weight, len(list(self.parameters())) * (self.other is self.weight)
        ),
        own_backward((0, 1), (), (True,)),
    ),
    "reference": (lambda self, x: Tied.forward(self, x.detach()), None),
}


@pytest.mark.parametrize("how", TIED)
def test_tied_weights_are_one_parameter(how):
    module, x = Tied(), torch.randn(3, 4, requires_grad=True)
    forward, own = TIED[how]
    op = lowered(module, hub_layer(forward), x, training=True, own=own)
    for _ in range(3):
        y, expected = op(), module(x)
        torch.testing.assert_close(y, expected)
        wanted = (x, module.weight)
        made = torch.autograd.grad(y.square().sum(), wanted)
        torch.testing.assert_close(made, torch.autograd.grad(expected.square().sum(), wanted))


class Product(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y + y.sin()


PRODUCTS = {
    "autograd": (Product.forward, own_backward((0, 1), (), (True,))),
    "reference": (lambda self, x, y: (x * y + y.sin()).detach(), None),
}


SPLITS = {
    "first": lambda x: (x.detach(), x),
    "second": lambda x: (x, x.detach()),
    "none": lambda x: (x, x),
}


@pytest.mark.parametrize("how", PRODUCTS)
@pytest.mark.parametrize("stopped", SPLITS)
def test_tensor_and_its_detached_twin_have_separate_gradients(how, stopped):
    """In a compiled graph ``x`` and ``x.detach()`` are one tensor."""
    forward, own = PRODUCTS[how]
    module, split = Product(), SPLITS[stopped]
    x = torch.randn(3, requires_grad=True)
    op = lowered(module, hub_layer(forward), *split(x), training=True, own=own)

    def total(product: Any, x: Tensor) -> Tensor:
        return product(*split(x.sin())).square().sum()

    compiled = torch.compile(total, backend="inductor", fullgraph=True)
    for _ in range(2):
        made = torch.autograd.grad(compiled(op, x), x)
        torch.testing.assert_close(made, torch.autograd.grad(total(module, x), x))


def test_conjugate_of_an_operand_is_saved_as_such():
    """A conjugate is in the memory of its operand, but its numbers are others."""

    class Conjugated(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.conj_physical() * y

    x, y = (torch.randn(3, dtype=torch.complex64, requires_grad=True) for _ in range(2))
    forward = hub_layer(lambda self, x, y: x.conj() * y)
    op = lowered(Conjugated(), forward, x, y, own=own_backward((0, 1), (), (True,)))
    for _ in range(2):
        made = torch.autograd.grad(op.overload(x, y)[0].abs().sum(), (x, y))
        expected = torch.autograd.grad((x.conj() * y).abs().sum(), (x, y))
        torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_operand_may_be_returned(backend):
    class Residual(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x

    own = own_backward((), (), (True, True))
    op = lowered(Residual(), hub_layer(lambda self, x: (x * 2, x)), torch.ones(3), own=own)

    def run(x: Tensor) -> Tensor:
        doubled, same = op.overload(x.sin())[:2]
        return doubled.square() + same

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    x = torch.randn(3, requires_grad=True)
    (made,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad((4 * x.sin().square() + x.sin()).sum(), x)
    torch.testing.assert_close(made, expected)
