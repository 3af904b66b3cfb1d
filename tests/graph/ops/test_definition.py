"""Ops as torch sees them: they pass its checks, whatever the operands and results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.op_calls import Op, lowered
from tests.support.op_toys import Native, Plus10, Scale, hub_layer, layer_with


def optional(self, x, bias=None, n=2, *, alpha=0.5):
    y = x * alpha * n
    return y if bias is None else y + bias


def several(self, x, y):
    return {"sum": x + y, "rest": (x * y, [None, x.sum()])}


def integers(self, x, index):
    return x[index], index + 1


def state(self, x):
    return functional.linear(x, self.proj.weight, self.proj.bias) + self.offset


X = torch.randn(3, 4)
CASES = {
    "one": (Scale(), Plus10, (X,), {}),
    "native": (Scale(), Native, (X,), {}),
    "empty": (Scale(), Plus10, (torch.ones(0, 4),), {}),
    "scalar": (Scale(1), Plus10, (torch.ones(()),), {}),
    "permuted": (Scale(3), Plus10, (X.t(),), {}),
    "expanded": (Scale(), Plus10, (torch.ones(1).expand(3, 4),), {}),
    "sliced": (Scale(2), Plus10, (X[:, ::2],), {}),
    "none": (layer_with(optional), hub_layer(optional), (X,), {"n": 3}),
    "bias": (layer_with(optional), hub_layer(optional), (X, torch.ones(4)), {"alpha": 2.0}),
    "several": (layer_with(several), hub_layer(several), (X, X + 1), {}),
    "integers": (layer_with(integers), hub_layer(integers), (X, torch.tensor([0, 2])), {}),
    "state": (layer_with(state, proj=nn.Linear(4, 4), offset=2), hub_layer(state), (X,), {}),
    "int8": (
        layer_with(lambda self, x: x + 1),
        hub_layer(lambda self, x: x + 1),
        (X.to(torch.int8),),
        {},
    ),
    "bf16": (Scale(4, torch.bfloat16), Plus10, (X.bfloat16(),), {}),
}


def case(name: str, **kwargs: Any) -> Op:
    module, toy, args, given = CASES[name]
    return lowered(module, toy, *args, **given, **kwargs)


def squared(self, x):
    return x * x * self.weight


def squared_natively(self, x):
    return torch.from_numpy(np.square(x.detach().numpy())) * self.weight


def loss(op):
    return lambda x: op(x, op.operands[1]).sum()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.vmap])
def test_op_is_transformed_as_its_layer(transform, training):
    layer = layer_with(squared, weight=nn.Parameter(torch.ones(4)))
    op = lowered(layer, hub_layer(squared_natively), X, training=training)
    made = transform(loss(op))(X.clone())
    torch.testing.assert_close(made, transform(lambda x: layer(x).sum())(X))


@pytest.mark.parametrize("batched", [torch.func.vmap, None])
def test_gradients_of_an_op_may_be_batched(batched):
    layer = layer_with(squared, weight=nn.Parameter(torch.ones(4)))
    op = lowered(layer, hub_layer(squared_natively), X, training=True)
    x = X.clone().requires_grad_()
    y, g = op(x, op.operands[1]), torch.randn(5, 3, 4)
    if batched is None:
        (made,) = torch.autograd.grad(y, x, g, is_grads_batched=True)
    else:
        made = batched(lambda one: torch.autograd.grad(y, x, one)[0])(g)
    torch.testing.assert_close(made, g * 2 * x)


@pytest.mark.parametrize("name", CASES)
def test_ops_pass_opcheck(name):
    op = case(name)
    operands = [o.detach() if isinstance(o, Tensor) else o for o in op.operands]
    torch.library.opcheck(op.overload, tuple(operands))
    training = case(name, training=True)
    inputs = [
        o.detach().requires_grad_(o.is_floating_point()) if isinstance(o, Tensor) else o
        for o in training.operands
    ]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if any(isinstance(o, Tensor) and o.requires_grad for o in inputs):
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(training.overload, tuple(inputs), test_utils=tests)
    backward = getattr(
        torch.ops.hubkernels, training.lowered.name.replace("_training", "_backward")
    )
    results = training.overload(*operands)
    results = [results] if isinstance(results, Tensor) else results
    grads = [torch.ones_like(r) if r.is_floating_point() else None for r in results]
    needs = [isinstance(o, Tensor) and o.is_floating_point() for o in operands]
    tensors = [o for o in operands if isinstance(o, Tensor)]
    numbers = [o for o in operands if not isinstance(o, Tensor)]
    torch.library.opcheck(backward.default, (*grads, tensors, *numbers, needs))


@pytest.mark.parametrize("name", ["several", "bias", "state"])
def test_op_returns_what_the_kernel_returns(name):
    module, toy, args, given = CASES[name]
    expected = toy.forward(module, *args, **given)
    torch.testing.assert_close(case(name)(), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [31, 32, 64, 200])
def test_op_may_have_more_operands_than_torch_allows_arguments(count, training):
    def total(self, xs, n):
        return sum(xs) * n * self.weight

    xs = [torch.full((1,), float(i), requires_grad=True) for i in range(count)]
    module = layer_with(total, weight=nn.Parameter(torch.ones(1)))
    op = lowered(module, hub_layer(total), xs, 2, training=training)
    y = op()
    assert y.item() == count * (count - 1)
    if training:
        *grads, grad = torch.autograd.grad(y, [*xs[1:], module.weight])
        assert [g.item() for g in grads] == [2.0] * (count - 1)
        assert grad.item() == y.item()
