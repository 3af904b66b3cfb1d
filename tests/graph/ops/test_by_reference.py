"""Ops whose gradient is that of the reference, which runs again in the backward."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compilers import nop
from torch.nn import functional

from tests.support.op_calls import lowered
from tests.support.op_toys import Plus10, Scale, hub_layer, layer_with

X = torch.randn(3, 4)


def state(self, x):
    return functional.linear(x, self.proj.weight, self.proj.bias) + self.offset


def test_tied_weights_are_one_parameter_in_the_backward():
    def reference(self, x):
        return x * sum(p.sum() for p in self.parameters()) * self.tied

    weight = nn.Parameter(torch.tensor([2.0]))
    module = layer_with(reference, weight=weight, tied=weight)
    op = lowered(module, hub_layer(reference), torch.ones(1), training=True)
    y = op()
    assert y.item() == 4
    assert torch.autograd.grad(y, weight)[0].item() == 4


def test_result_that_no_gradient_flows_through_requires_none():
    """A norm that keeps statistics: its buffer requires no gradient, however many steps run."""

    def reference(self, x):
        self.mean.mul_(0.5).add_(x.detach().mean())
        return x * 2, x.detach() * 3

    x, module = torch.ones(4, requires_grad=True), layer_with(reference, mean=torch.zeros(()))
    op = lowered(module, hub_layer(reference), x, training=True, every=False)
    for i in range(1, 3):
        y, z = op()
        assert (y.requires_grad, z.requires_grad) == (True, False)
        assert not module.mean.requires_grad
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.tolist() == [2.0] * 4
        assert module.mean.item() == 2 - 0.5 ** (i - 1)
    # Where a gradient of the buffer is wanted too, it is another op.
    mean = torch.zeros((), requires_grad=True)
    module = layer_with(reference, mean=mean * 1)
    other = lowered(module, hub_layer(reference), x, training=True, every=False)
    assert other.lowered.name != op.lowered.name
    other()
    assert torch.autograd.grad(module.mean, mean)[0].item() == 0.5


def test_gradient_flows_through_an_operand_that_a_layer_writes_into():
    def reference(self, x, y):
        y.mul_(x)
        return y + x

    x, y = (torch.tensor([v], requires_grad=True) for v in (3.0, 5.0))
    op = lowered(layer_with(reference), hub_layer(reference), x, y.clone(), training=True)
    z = y * 1
    result = op(x, z)
    assert (result.item(), z.item()) == (18.0, 15.0)
    grads = torch.autograd.grad(result + 2 * z, [x, y])
    assert [g.item() for g in grads] == [16.0, 9.0]


def unused(self, x, y):
    return x * 2


def in_place_inside(self, x):
    y = x * 2
    y.mul_(x)
    y[0] = 0
    return y


def identity(self, x):
    return x.clone()


def many(self, x, y):
    return x * y, (x.sum(), y.argmax()), {"max": y.amax(0)}


def mixed(self, x, index):
    return x[index] * self.weight, index * 2


GRADIENTS = {
    "scale": (Scale(), (X,)),
    "unused": (layer_with(unused), (X, X + 1)),
    "in place inside": (layer_with(in_place_inside), (X,)),
    "identity": (layer_with(identity), (X,)),
    "many": (layer_with(many), (X, X * 3)),
    "mixed": (layer_with(mixed, weight=nn.Parameter(torch.ones(4))), (X, torch.tensor([0, 2]))),
    "state": (layer_with(state, proj=nn.Linear(4, 4), offset=2), (X,)),
    "expanded": (Scale(), (torch.ones(1).expand(3, 4),)),
    "permuted": (Scale(3), (X.t(),)),
    "empty": (Scale(), (torch.ones(0, 4),)),
}


def tensors_in(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("leave_out", [False, True])
def test_gradients_are_those_of_the_reference(name, leave_out):
    module, args = GRADIENTS[name]
    op = lowered(module, hub_layer(type(module).forward), *args, training=True)

    def gradients(function, inputs):
        outputs = [t for t in tensors_in(function(inputs)) if t.requires_grad]
        used = outputs[:1] if leave_out else outputs
        total = sum((t * torch.arange(1.0, t.numel() + 1).view(t.shape)).sum() for t in used)
        wanted = [i for i in inputs if isinstance(i, Tensor) and i.requires_grad]
        return torch.autograd.grad(total, wanted, materialize_grads=True)

    def fresh():
        return [
            o.detach().clone().requires_grad_(o.is_floating_point()) if isinstance(o, Tensor) else o
            for o in op.operands
        ]

    reference = op.call  # run as the backward op would, by the same operands
    from kernelgraph.graph.calls.runner import Runner

    expected = gradients(Runner(type(module).forward, reference), fresh())
    made = gradients(lambda operands: op(*operands), fresh())
    torch.testing.assert_close(made, expected)


def test_kernel_runs_forward_and_reference_backward():
    ran: deque[str] = deque()  # a list would be set back

    def reference(self, x):
        ran.append("reference")
        return x * 3

    def toy(self, x):
        ran.append("kernel")
        return x * 3 + 10

    x = torch.ones(4, requires_grad=True)
    op = lowered(layer_with(reference), hub_layer(toy), x, training=True)
    op()  # the first call of its sizes
    ran.clear()
    y = op()
    assert [*ran] == ["kernel"]
    assert y[0].item() == 13
    y.sum().backward()
    assert [*ran] == ["kernel", "reference"]
    assert x.grad[0].item() == 3


def test_backward_op_runs_in_a_graph_compiled_for_inference():
    op = lowered(Scale(), Plus10, torch.ones(4), training=True)
    backward = getattr(torch.ops.hubkernels, op.lowered.name.replace("_training", "_backward"))

    def gradient(x, weight):
        return backward.default(torch.ones(4), [x, weight], 0.25, [True, False, False])[0]

    x, weight, _ = (o.detach() if isinstance(o, Tensor) else o for o in op.operands)
    compiled = aot_function(gradient, fw_compiler=nop)
    assert torch.equal(compiled(x, weight), weight)


def test_only_needed_gradients_are_computed():
    op = lowered(Scale(), Plus10, torch.ones(4), training=True)
    x, weight, eps = op.operands
    (grad,) = torch.autograd.grad(op(x, weight, eps).sum(), weight)
    assert torch.equal(grad, torch.ones(4))
    assert x.grad is None


def test_reference_that_writes_unseen_is_an_error_in_the_backward():
    def writes(self, x, y):
        if y.sum() > 0:  # fails on fakes
            y.add_(1)
        return x * 2

    fake = lambda self, x, y: torch.empty_like(x)  # noqa: E731
    x = torch.ones(4, requires_grad=True)
    toy = hub_layer(lambda self, x, y: x * 2 + 10)
    op = lowered(layer_with(writes), toy, x, torch.ones(4), fake=fake, training=True)
    with pytest.raises(RuntimeError, match=r"the reference of Layer wrote into its operand y"):
        op().sum().backward()
