"""The body of an op: the memory of its results, what a kernel writes, and what goes wrong."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional

from kernelgraph.graph._torch import recording_gradients
from kernelgraph.graph.ops.forward import Body
from tests.support.op_calls import kernel_of, lowered
from tests.support.op_toys import Native, Plus10, Scale, hub_layer, layer_with

# --- kernels that use autograd --------------------------------------------------------------------


def gradient_of_square(self, x):
    with torch.enable_grad():
        v = x.detach().requires_grad_()
        return torch.autograd.grad((v * v).sum(), v)[0]


def test_kernel_may_use_autograd_below_autograd():
    op = lowered(layer_with(lambda self, x: x * 2), hub_layer(gradient_of_square), torch.ones(3))
    for _ in range(2):
        assert torch.equal(op(), torch.full((3,), 2.0))
        with recording_gradients(enabled=False, below=True):
            assert torch.equal(op(), torch.full((3,), 2.0))


# --- results own their memory ---------------------------------------------------------------------


def over_its_memory(x):
    """Return the memory of ``x`` in another storage, as arrays of other libraries come back."""
    if isinstance(x, FakeTensor):
        return torch.empty_like(x)
    return torch.from_numpy(np.asarray(x.detach()))


ALIASES = {
    "itself": lambda self, x: x,
    "a view": lambda self, x: x.view(4, 3),
    "a transpose": lambda self, x: x.t(),
    "a slice": lambda self, x: x[1:],
    "a column": lambda self, x: x[:, 1],
    "numpy's": lambda self, x: over_its_memory(x),
    "a slice of numpy's": lambda self, x: over_its_memory(x)[1:2],
    "twice one": lambda self, x: (y := x + 1, y),
    "overlapping": lambda self, x: (y := x + 1, y[1:]),
    "its weight": lambda self, x: self.weight,
    "its expanded weight": lambda self, x: self.weight.expand(3, 4),
    "permuted": lambda self, x: (x + 1).t(),
    "a negative": lambda self, x: torch.complex(x, x).conj().imag,
    "a negative number": lambda self, x: torch.complex(x, x).conj().imag[:1, :1],
    "a conjugate": lambda self, x: torch.complex(x, x).conj(),
    "empty": lambda self, x: x[:0],
    "one and its empty part": lambda self, x: (y := x + 1, y[:0]),
    "two halves": lambda self, x: (x + 1).view(2, 6).unbind(),
    "the end": lambda self, x: (x + 1)[1:],
    "not aligned": lambda self, x: misaligned(x + 1),
}


def misaligned(t):
    """Return a copy at the start of a storage that begins one number past an aligned address."""
    storage = torch.cat([t.new_zeros(1), t.reshape(-1)]).untyped_storage()
    return torch.empty(0).set_(storage[t.itemsize :]).view(t.shape)


@pytest.mark.parametrize("what", ALIASES)
@pytest.mark.parametrize("training", [False, True])
def test_results_are_dense_and_own_their_memory(what, training):
    forward = ALIASES[what]

    def reference(self, x):
        return torch.utils._pytree.tree_map(torch.clone, forward(self, x))

    module = layer_with(reference, weight=nn.Parameter(torch.ones(4)))
    x = torch.randn(3, 4, requires_grad=training)
    op = lowered(module, hub_layer(forward), x, training=training)
    op()  # later calls are checked less
    made, expected = op(), forward(module, x)
    torch.testing.assert_close(made, expected)
    results = made if isinstance(made, tuple) else (made,)
    memory = [t.untyped_storage().data_ptr() for t in (*results, *op.operands)]
    assert len({p for p in memory if p}) == sum(p != 0 for p in memory)
    mode = FakeTensorMode()
    with mode:
        fakes = op.overload(*(mode.from_tensor(o) for o in op.operands))
    for result, fake in zip(results, [fakes] if isinstance(fakes, Tensor) else fakes, strict=True):
        assert torch._prims_common.is_non_overlapping_and_dense_or_false(result)
        assert not result.is_conj()
        assert not result.is_neg()
        assert result.storage_offset() == 0
        assert result.data_ptr() % 16 == 0
        assert (result.shape, result.stride()) == (fake.shape, fake.stride())
    with torch.no_grad():
        for result in results:
            others = [t for t in (*results, *op.operands) if t is not result]
            kept = [t.clone() for t in others]
            result.fill_(99)
            assert all(map(torch.equal, others, kept))


def test_empty_result_has_a_version_of_its_own():
    """Autograd detects writes into saved tensors by their versions, also into empty ones."""
    x = torch.ones(0, 4, requires_grad=True)
    op = lowered(layer_with(lambda self, x: x * 1), hub_layer(lambda self, x: x), x, training=True)
    for _ in range(2):
        y = op()
        y.add_(1)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.shape == (0, 4)


# --- writes into operands -------------------------------------------------------------------------


def test_kernel_that_writes_into_its_operand_gets_a_copy():
    def writes(self, x):
        x.mul_(2)
        return x.add_(10)

    x = torch.ones(4)
    op = lowered(layer_with(lambda self, x: x + 1), hub_layer(writes), x)
    assert op()[0].item() == 12
    assert op()[0].item() == 12
    assert torch.equal(x, torch.ones(4))


@pytest.mark.parametrize("training", [False, True])
def test_write_that_autograd_does_not_count_stays_unseen(training):
    def writes(self, x):
        array = x.detach().numpy()
        array *= 2
        return x

    x = torch.ones(4, requires_grad=training)
    op = lowered(layer_with(lambda self, x: x * 2), hub_layer(writes), x, training=training)
    for _ in range(3):
        made = op()
        assert made[0].item() == 2
        assert x.tolist() == [1, 1, 1, 1]
        if training:
            made.sum().backward()  # what the formula has saved was not written into


def adds(self, x, y):
    self.count.add_(1)
    y.add_(x)
    return x * self.count


def adds_unseen(self, x, y):
    x, y = x.detach().numpy(), y.detach().numpy()  # fails on fakes
    count = self.count.numpy()
    count += 1
    y += x
    return torch.from_numpy(x * count + 10)


@pytest.mark.parametrize("toy", [adds, adds_unseen])
def test_operand_that_a_layer_writes_into_is_a_result(toy):
    x, y = torch.ones(4), torch.ones(2, 4).t()[:, 0]
    module = layer_with(adds, count=torch.zeros(()))
    op = lowered(module, hub_layer(toy), x, y)
    assert op.lowered.written == (1, 2)
    plus = 10 if toy is adds_unseen else 0
    for i in (1, 2):
        kept = [v.clone() for v in op.operands]
        results = op.overload(*op.operands)
        assert all(map(torch.equal, op.operands, kept))  # the op itself writes into nothing
        assert [r.tolist() for r in results[1:]] == [[i + 1.0] * 4, i]
        assert op().tolist() == [i + plus] * 4
        assert y.tolist() == [i + 1.0] * 4
        assert module.count.item() == i


@pytest.mark.parametrize("training", [False, True])
def test_kernel_runs_below_autograd(training):
    seen = []

    def toy(self, x):
        y = x * self.weight
        seen.append((torch.is_grad_enabled(), y.requires_grad))
        return y + 10

    op = lowered(Scale(), hub_layer(toy), torch.ones(4, requires_grad=True), training=training)
    op()  # the first call of its sizes runs on fakes too
    seen.clear()
    y = op()
    assert seen == [(False, False)]
    if training:
        assert y.grad_fn is not None
    else:  # torch says so when somebody wants a gradient
        with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
            y.sum().backward()
        assert op.operands[0].grad is None


WRONG = {
    "raises": (
        lambda x: [][1],
        r", called for layer Scale, raised IndexError: list index out of range",
    ),
    "tuple": (lambda x: (x, x), r" returned a tuple of 2 \(a tensor, a tensor\) for layer Scale"),
    "none": (lambda x: None, r" returned None for layer Scale; expected is a tensor"),
    "number": (lambda x: 1.0, r" returned 1\.0 for layer Scale; expected is a tensor"),
    "set": (lambda x: {1}, r" returned a set for layer Scale; expected is a tensor"),
    "dtype": (
        lambda x: x.double(),
        r" returned a torch.float64 tensor of shape \(4,\) on cpu for layer Scale; expected is a "
        r"torch.float32 tensor of shape \(4,\) on cpu",
    ),
    "rank": (
        lambda x: x[None],
        r" returned a .* of shape \(1, 4\) on cpu for layer Scale; expected .*\(4,\)",
    ),
    "shape": (
        lambda x: x[1:],
        r" returned a .* of shape \(3,\) on cpu for layer Scale; expected .*\(4,\)",
    ),
    "device": (
        lambda x: x.to("meta"),
        r" returned a .* on meta for layer Scale; expected is .* on cpu",
    ),
}


# --- wrong results and errors ---------------------------------------------------------------------


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("training", [False, True])
def test_kernel_that_returns_something_else_is_named_in_the_error(what, training):
    change, message = WRONG[what]

    def toy(self, x):
        x.detach().numpy()  # fails on fakes
        return change(x)

    commit = f"{list(WRONG).index(what):x}" * 40  # a commit for each: they differ only in a closure
    op = lowered(Scale(), kernel_of(hub_layer(toy), commit), torch.ones(4), training=training)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"^kernel org/toys@{commit[:8]}: Toy{message}"):
            op()


def test_wrong_shape_is_found_at_any_call():
    wrong = False

    def toy(self, x):
        return torch.from_numpy(x.numpy()[1:] if wrong else x.numpy() + 10)

    op = lowered(layer_with(lambda self, x: x + 1), hub_layer(toy), torch.ones(4))
    sizes = [torch.ones(4), torch.ones(7), torch.ones(0)]
    assert [op(x).shape for x in sizes] == [x.shape for x in sizes]
    wrong = True
    for x in sizes[:2]:
        with pytest.raises(RuntimeError, match=rf"expected is .* of shape \({len(x)},\)"):
            op(x)


def test_shape_function_runs_once_for_operands_of_the_same_sizes(monkeypatch):
    ran: deque[Any] = deque()  # a layer that appends to a list is no op
    asked = []
    result_sizes = Body._result_sizes

    def counted(self, operands):
        asked.append(operands)
        return result_sizes(self, operands)

    monkeypatch.setattr(Body, "_result_sizes", counted)

    def reference(self, x, n):
        ran.append(x)
        return x.repeat(n)

    def toy(self, x, n):
        return torch.from_numpy(np.tile(x.numpy(), n)) + 10

    op = lowered(layer_with(reference), hub_layer(toy), torch.ones(4), 2)
    ran.clear()
    for x, n in [(torch.ones(4), 2), (torch.ones(5), 2), (torch.ones(5), 3)] * 3:
        assert op(x, n).shape == (len(x) * n,)
    assert len(ran) == 3
    assert len(asked) == 3  # the hot path does not come here


def test_out_of_memory_error_of_a_kernel_is_raised_unchanged():
    def toy(self, x):
        x.numpy()
        raise torch.OutOfMemoryError("toy")

    with pytest.raises(torch.OutOfMemoryError, match=r"^toy$"):
        lowered(layer_with(lambda self, x: x + 1), hub_layer(toy), torch.ones(4))()


# --- around a call --------------------------------------------------------------------------------


def test_op_runs_on_other_threads():
    op = lowered(Scale(), Native, torch.ones(4))
    training = lowered(Scale(), Native, torch.ones(4), training=True)

    def run(i):
        x = torch.full((4 + i % 3 * 0,), float(i), requires_grad=True)
        _, weight, eps = op.operands
        training(x, weight, eps).sum().backward()
        return op(x, weight, eps)[0].item(), x.grad[0].item()

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(64)))
    assert results == [(pytest.approx(i * 0.5 + 10.25), 0.5) for i in range(64)]


def test_op_keeps_no_tensor():
    op = lowered(Scale(), Native, torch.ones(4), training=True)
    x = torch.ones(4, requires_grad=True)
    y = op(x, *op.operands[1:])
    y.sum().backward()
    references = [weakref.ref(x), weakref.ref(y), weakref.ref(x.grad)]
    del x, y
    gc.collect()
    assert [r() for r in references] == [None] * 3


def test_op_runs_in_inference_mode():
    op = lowered(Scale(), Native, torch.ones(4))
    with torch.inference_mode():
        assert op(torch.ones(4), *op.operands[1:])[0].item() == pytest.approx(10.75)
        made = lowered(Scale(), kernel_of(Plus10, "b" * 40), torch.ones(4))
        assert made()[0].item() == pytest.approx(10.75)


def test_kernel_runs_in_the_autocast_region_of_the_call():
    def linear(self, x):
        return functional.linear(x, self.weight) + 10

    module = layer_with(linear, weight=nn.Parameter(torch.ones(4, 4)))
    x = torch.ones(3, 4, requires_grad=True)
    for training in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            op = lowered(module, hub_layer(linear), x, training=training)
        y = op()  # as in a compiled graph, outside of it
        assert y.dtype is torch.bfloat16
        if training:
            (grad,) = torch.autograd.grad(y.float().sum(), x)
            assert grad.dtype is torch.float32
            assert torch.equal(grad, torch.full((3, 4), 4.0))
