"""Hub layers as custom ops: names, shapes, results, gradients, and what goes wrong."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compilers import nop
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional
from torch.utils import dlpack

from kernelgraph.graph.calls.trees import UnsupportedValue
from kernelgraph.graph.ops import definition
from kernelgraph.graph.ops.forward import Body
from kernelgraph.graph.ops.registry import lower
from tests.support.op_calls import Op, call_of, kernel_of, layer_of, lowered

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Scale(nn.Module):
    def __init__(self, size: int = 4, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size, dtype=dtype))
        self.eps = 0.25

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.eps


class Plus10(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.eps + 10


class Native(nn.Module):
    """Plus 10, out of sight of torch."""

    def forward(self, x: Tensor) -> Tensor:
        array = x.detach().numpy() * self.weight.detach().numpy() + self.eps + 10
        return torch.from_numpy(array)


def kernel(forward: Any) -> type[nn.Module]:
    """A hub layer with ``forward``."""
    return type("Toy", (nn.Module,), {"forward": forward, "__module__": __name__})


def layer(forward: Any, **attributes: Any) -> nn.Module:
    """A layer whose reference is ``forward``."""
    module = type("Layer", (nn.Module,), {"forward": forward, "__module__": __name__})()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


# --- names --------------------------------------------------------------------------------------


def test_a_name_says_which_kernel_runs():
    name = lowered(Scale(), kernel_of(Plus10, COMMIT), torch.ones(4)).lowered.name
    assert re.fullmatch(r"toys_Plus10_01234567_[0-9a-f]{8}", name)
    training = lowered(
        Scale(), kernel_of(Plus10, COMMIT), torch.ones(4), training=True
    ).lowered.name
    assert re.fullmatch(r"toys_Plus10_01234567_[0-9a-f]{8}_training", training)


@pytest.mark.parametrize(
    ("repository", "expected"),
    [("my-kernel.v2", "my_kernel_v2"), ("2fast", "k2fast"), ("__x", "x"), ("größe", "gr__e")],
)
def test_any_repository_gives_an_identifier(repository, expected):
    op = lowered(Scale(), kernel_of(Plus10, COMMIT, repository), torch.ones(4))
    assert op.lowered.name.startswith(f"{expected}_Plus10_01234567_")
    assert op()[0].item() == pytest.approx(10.75)


def name_of(module: nn.Module, toy: Any, *args: Any, **kwargs: Any) -> str:
    return lowered(module, toy, *args, **kwargs).lowered.name


def test_calls_alike_share_an_op():
    one = name_of(Scale(), Plus10, torch.ones(4))
    other = Scale(6)
    other.eps = 0.5
    assert name_of(other, Plus10, torch.ones(3, 6)) != one  # another rank
    assert name_of(other, Plus10, torch.ones(6)) == one


def test_whatever_a_body_depends_on_gives_another_name():
    x = torch.ones(4)
    plain = lambda self, x: x + 1  # noqa: E731
    double = Scale(dtype=torch.float64)
    shaped = lambda self, x: torch.empty(x.shape)  # noqa: E731
    names = [
        name_of(Scale(), kernel_of(Plus10, COMMIT), x),
        name_of(Scale(), kernel_of(Plus10, "f" * 40), x),
        name_of(Scale(), kernel_of(Plus10, COMMIT[:8] + "f" * 32), x),
        name_of(Scale(), kernel_of(Native, COMMIT), x),
        name_of(double, kernel_of(Plus10, COMMIT), x.double()),
        name_of(layer(plain), kernel_of(kernel(plain), COMMIT), x),
        name_of(layer(lambda self, x: x + 2), kernel_of(kernel(plain), COMMIT), x),
        name_of(layer(plain), kernel_of(kernel(plain), COMMIT), x=x),
        name_of(layer(plain), kernel_of(kernel(plain), COMMIT), x, fake=shaped),
    ]
    assert len(set(names)) == len(names)


def register_some() -> list[str]:
    """Ops of equal schemas, names on a line each."""
    x = torch.ones(4)
    made = [
        lowered(Scale(), kernel_of(k, COMMIT), x, training=t)
        for k in (Plus10, Native)
        for t in (False, True)
    ]
    for op in made:
        op()
    return [op.lowered.name for op in made]


def test_another_process_makes_the_same_names_and_ends_well():
    program = "import tests.graph.ops.test_registry as t; print(*t.register_some(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == register_some()


def test_threads_register_an_op_once(monkeypatch):
    defined: list[str] = []
    define = definition._define

    def counted(name, *rest):
        defined.append(name)
        define(name, *rest)

    monkeypatch.setattr(definition, "_define", counted)
    toy = kernel_of(Plus10, "a" * 40)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: lowered(Scale(), toy, torch.ones(4)), range(16)))
    assert defined == [made[0].lowered.name]
    assert {op.lowered.name for op in made} == set(defined)
    assert all(op()[0].item() == pytest.approx(10.75) for op in made)


# --- opcheck ------------------------------------------------------------------------------------


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
    "none": (layer(optional), kernel(optional), (X,), {"n": 3}),
    "bias": (layer(optional), kernel(optional), (X, torch.ones(4)), {"alpha": 2.0}),
    "several": (layer(several), kernel(several), (X, X + 1), {}),
    "integers": (layer(integers), kernel(integers), (X, torch.tensor([0, 2])), {}),
    "state": (layer(state, proj=nn.Linear(4, 4), offset=2), kernel(state), (X,), {}),
    "int8": (layer(lambda self, x: x + 1), kernel(lambda self, x: x + 1), (X.to(torch.int8),), {}),
    "bf16": (Scale(4, torch.bfloat16), Plus10, (X.bfloat16(),), {}),
}


def case(name: str, **kwargs: Any) -> Op:
    module, toy, args, given = CASES[name]
    return lowered(module, toy, *args, **given, **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_ops_hold_to_what_torch_asks_of_them(name):
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
def test_an_op_gives_what_the_kernel_does(name):
    module, toy, args, given = CASES[name]
    expected = toy.forward(module, *args, **given)
    torch.testing.assert_close(case(name)(), expected)


# --- outputs own their memory -------------------------------------------------------------------


def over_its_memory(x):
    """In a storage of its own, as another library's array comes back."""
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
    """The same numbers, where a storage of their own begins, one number past what is aligned."""
    storage = torch.cat([t.new_zeros(1), t.reshape(-1)]).untyped_storage()
    return torch.empty(0).set_(storage[t.itemsize :]).view(t.shape)


@pytest.mark.parametrize("what", ALIASES)
@pytest.mark.parametrize("training", [False, True])
def test_results_are_contiguous_and_own_their_memory(what, training):
    forward = ALIASES[what]
    module = layer(forward, weight=nn.Parameter(torch.ones(4)))
    x = torch.randn(3, 4, requires_grad=training)
    op = lowered(module, kernel(forward), x, training=training)
    op()  # after which there is less to check
    made, expected = op(), forward(module, x)
    torch.testing.assert_close(made, expected)
    results = made if isinstance(made, tuple) else (made,)
    memory = [t.untyped_storage().data_ptr() for t in (*results, *op.operands)]
    assert len({p for p in memory if p}) == sum(p != 0 for p in memory)
    mode = FakeTensorMode()
    with mode:
        fakes = op.overload(*(mode.from_tensor(o) for o in op.operands))
    for result, fake in zip(results, [fakes] if isinstance(fakes, Tensor) else fakes, strict=True):
        assert result.is_contiguous()
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


def test_an_empty_result_owns_its_version_too():
    """Autograd tells by versions who wrote into what it saved, even where there is nothing."""
    x = torch.ones(0, 4, requires_grad=True)
    op = lowered(layer(lambda self, x: x), kernel(lambda self, x: x), x, training=True)
    for _ in range(2):
        y = op()
        y.add_(1)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.shape == (0, 4)


def test_a_kernel_that_writes_into_its_operand_gets_a_copy():
    def writes(self, x):
        x.mul_(2)
        return x.add_(10)

    x = torch.ones(4)
    op = lowered(layer(lambda self, x: x + 1), kernel(writes), x)
    assert op()[0].item() == 12
    assert op()[0].item() == 12
    assert torch.equal(x, torch.ones(4))


def test_a_hidden_write_into_an_operand_is_an_error():
    def writes(self, x):
        x.numpy()  # runs on no fake
        return x.mul_(2)

    op = lowered(layer(lambda self, x: x + 1), kernel(writes), torch.ones(4))
    with pytest.raises(
        RuntimeError, match=r"kernel .*Toy, called for layer Layer, wrote into its operand x"
    ):
        op()


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: x.shape[0], r"returns no tensor"),
        (lambda self, x: None, r"returns no tensor"),
        (lambda self, x: {x}, r"a set is passed or returned"),
        (lambda self, x: setattr(self, "y", x) or x + 1, r"<lambda> sets y of the layer"),
        (lambda self, x: self.listed[0] * x, r"reads self\.listed, a list, which is neither"),
    ],
    ids=["number", "nothing", "set", "sets", "list"],
)
@pytest.mark.parametrize("sees", ["kernel and reference", "reference"])
def test_a_layer_that_no_op_can_be_is_refused(forward, message, sees):
    module = layer(forward, weight=nn.Parameter(torch.ones(4)), listed=[iter("")])
    toy = kernel(forward) if sees != "reference" else kernel(lambda self, x: x.numpy())
    with pytest.raises(UnsupportedValue, match=message):
        lowered(module, toy, torch.ones(4))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [31, 32, 64, 200])
def test_an_op_may_have_more_operands_than_torch_allows_it_arguments(count, training):
    def total(self, xs, n):
        return sum(xs) * n * self.weight

    xs = [torch.full((1,), float(i), requires_grad=True) for i in range(count)]
    module = layer(total, weight=nn.Parameter(torch.ones(1)))
    op = lowered(module, kernel(total), xs, 2, training=training)
    y = op()
    assert y.item() == count * (count - 1)
    if training:
        *grads, grad = torch.autograd.grad(y, [*xs[1:], module.weight])
        assert [g.item() for g in grads] == [2.0] * (count - 1)
        assert grad.item() == y.item()


# --- layers that write into what they are given -------------------------------------------------


def adds(self, x, y):
    self.count.add_(1)
    y.add_(x)
    return x * self.count


def adds_unseen(self, x, y):
    x, y = x.detach().numpy(), y.detach().numpy()  # runs on no fake
    count = self.count.numpy()
    count += 1
    y += x
    return torch.from_numpy(x * count + 10)


@pytest.mark.parametrize("toy", [adds, adds_unseen])
def test_what_a_layer_writes_is_a_result_of_the_op(toy):
    x, y = torch.ones(4), torch.ones(2, 4).t()[:, 0]
    module = layer(adds, count=torch.zeros(()))
    op = lowered(module, kernel(toy), x, y)
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


def test_tied_weights_are_one_parameter_in_the_backward_too():
    def reference(self, x):
        return x * sum(p.sum() for p in self.parameters()) * self.tied

    weight = nn.Parameter(torch.tensor([2.0]))
    module = layer(reference, weight=weight, tied=weight)
    op = lowered(module, kernel(reference), torch.ones(1), training=True)
    y = op()
    assert y.item() == 4
    assert torch.autograd.grad(y, weight)[0].item() == 4


def test_what_no_gradient_flows_through_wants_none():
    """As of a norm that keeps statistics: a buffer stays one, and step follows step."""

    def reference(self, x):
        self.mean.mul_(0.5).add_(x.detach().mean())
        return x * 2, x.detach() * 3

    x, module = torch.ones(4, requires_grad=True), layer(reference, mean=torch.zeros(()))
    op = lowered(module, kernel(reference), x, training=True, every=False)
    for i in range(1, 3):
        y, z = op()
        assert (y.requires_grad, z.requires_grad) == (True, False)
        assert not module.mean.requires_grad
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.tolist() == [2.0] * 4
        assert module.mean.item() == 2 - 0.5 ** (i - 1)
    # Where a gradient is wanted of the buffer too it is another op.
    mean = torch.zeros((), requires_grad=True)
    module = layer(reference, mean=mean * 1)
    other = lowered(module, kernel(reference), x, training=True, every=False)
    assert other.lowered.name != op.lowered.name
    other()
    assert torch.autograd.grad(module.mean, mean)[0].item() == 0.5


def test_the_gradient_goes_through_what_a_layer_writes():
    def reference(self, x, y):
        y.mul_(x)
        return y + x

    x, y = (torch.tensor([v], requires_grad=True) for v in (3.0, 5.0))
    op = lowered(layer(reference), kernel(reference), x, y.clone(), training=True)
    z = y * 1
    result = op(x, z)
    assert (result.item(), z.item()) == (18.0, 15.0)
    grads = torch.autograd.grad(result + 2 * z, [x, y])
    assert [g.item() for g in grads] == [16.0, 9.0]


# --- shapes told by fakes -----------------------------------------------------------------------


def test_sizes_that_depend_on_values_are_refused():
    def positive(self, x):
        return x[x > 0]

    mode = FakeTensorMode(shape_env=ShapeEnv())
    with pytest.raises(UnsupportedValue, match="depends on values of tensors"):
        lowered(layer(positive), kernel(positive), torch.ones(4), mode=mode)


def test_a_missing_attribute_is_an_error_that_names_it():
    class Annotated(nn.Module):
        gamma: Tensor

        def forward(self, x):
            return torch.from_numpy(x.numpy() * self.gamma.numpy())

    def unannotated(self, x):
        return x * self.gamma

    for toy in (Annotated, kernel(unannotated)):
        with pytest.raises(
            AttributeError,
            match=rf"kernel .*: {toy.__name__} reads self\.gamma, which layer Scale \(Scale\) does "
            "not have",
        ):
            lowered(Scale(), toy, torch.ones(4))


def test_another_structure_than_the_reference_is_an_error():
    with pytest.raises(
        RuntimeError,
        match=r"Toy returns a tuple of 2 \(a tensor, None\) for layer Scale, which returns a ten",
    ):
        lowered(Scale(), kernel(lambda self, x: (x, None)), torch.ones(4))


POINTERS = {
    "data_ptr": lambda x: x.data_ptr(),
    "of a view": lambda x: x.detach()[1:].data_ptr(),
    "of a result": lambda x: (x + 1).data_ptr(),
    "of an allocation": lambda x: torch.empty(4).data_ptr(),
    "data": lambda x: x.data.data_ptr(),
    "parameter": lambda x: nn.Parameter(x).data_ptr(),
    "plain": lambda x: x.as_subclass(torch.Tensor).data_ptr(),
    "storage": lambda x: x.untyped_storage().data_ptr(),
    "resized": lambda x: x.resize_(100).data_ptr(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "dlpack": lambda x: dlpack.to_dlpack(x),
    "from_dlpack": lambda x: np.from_dlpack(x),
    "ctypes": lambda x: ctypes.c_void_p(x.data_ptr()),
    "cuda": lambda x: x.__cuda_array_interface__,
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "buffer": lambda x: memoryview(x),
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("what", POINTERS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fakes_give_nobody_their_memory(what, device):
    reached = []

    def native(self, x):
        pointer = POINTERS[what](x.detach())
        reached.append(pointer)  # a native kernel would now write to it
        return x + 10

    mode = FakeTensorMode()
    with mode:
        x = torch.empty(4, device=device)
    module, toy = layer(lambda self, x: x + 1), kernel(native)
    call, _ = call_of(module, torch.ones(4))
    if device == "meta":  # outside of any mode, as for a model on that device
        x = torch.empty(4, device="meta")
    lower(kernel_of(toy), layer_of(module), call, [x])
    assert reached == []
    if device == "cpu":
        x.data_ptr()  # the tracer's own fakes are as they were
        with mode:
            torch.empty(1).data_ptr()


# --- gradients ----------------------------------------------------------------------------------


def unused(self, x, y):
    return x * 2


def in_place_inside(self, x):
    y = x * 2
    y.mul_(x)
    y[0] = 0
    return y


def identity(self, x):
    return x


def many(self, x, y):
    return x * y, (x.sum(), y.argmax()), {"max": y.amax(0)}


def mixed(self, x, index):
    return x[index] * self.weight, index * 2


GRADIENTS = {
    "scale": (Scale(), (X,)),
    "unused": (layer(unused), (X, X + 1)),
    "in place inside": (layer(in_place_inside), (X,)),
    "identity": (layer(identity), (X,)),
    "many": (layer(many), (X, X * 3)),
    "mixed": (layer(mixed, weight=nn.Parameter(torch.ones(4))), (X, torch.tensor([0, 2]))),
    "state": (layer(state, proj=nn.Linear(4, 4), offset=2), (X,)),
    "expanded": (Scale(), (torch.ones(1).expand(3, 4),)),
    "permuted": (Scale(3), (X.t(),)),
    "empty": (Scale(), (torch.ones(0, 4),)),
}


def tensors_in(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("leave_out", [False, True])
def test_training_gives_the_reference_its_gradients(name, leave_out):
    module, args = GRADIENTS[name]
    op = lowered(module, kernel(type(module).forward), *args, training=True)

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


def test_the_kernel_runs_forward_and_the_reference_backward():
    ran = []

    def reference(self, x):
        ran.append("reference")
        return x * 3

    def toy(self, x):
        ran.append("kernel")
        return x * 3 + 10

    x = torch.ones(4, requires_grad=True)
    op = lowered(layer(reference), kernel(toy), x, training=True)
    op()  # the first call of its sizes
    ran.clear()
    y = op()
    assert ran == ["kernel"]
    assert y[0].item() == 13
    y.sum().backward()
    assert ran == ["kernel", "reference"]
    assert x.grad[0].item() == 3


@pytest.mark.parametrize("training", [False, True])
def test_a_kernel_runs_below_autograd(training):
    seen = []

    def toy(self, x):
        y = x * self.weight
        seen.append((torch.is_grad_enabled(), y.requires_grad))
        return y + 10

    op = lowered(Scale(), kernel(toy), torch.ones(4, requires_grad=True), training=training)
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


def test_gradients_inside_a_graph_that_was_compiled_for_inference():
    op = lowered(Scale(), Plus10, torch.ones(4), training=True)
    backward = getattr(torch.ops.hubkernels, op.lowered.name.replace("_training", "_backward"))

    def gradient(x, weight):
        return backward.default(torch.ones(4), [x, weight], 0.25, [True, False, False])[0]

    x, weight, _ = (o.detach() if isinstance(o, Tensor) else o for o in op.operands)
    compiled = aot_function(gradient, fw_compiler=nop)
    assert torch.equal(compiled(x, weight), weight)


def test_only_the_gradients_that_are_needed_are_made():
    op = lowered(Scale(), Plus10, torch.ones(4), training=True)
    x, weight, eps = op.operands
    (grad,) = torch.autograd.grad(op(x, weight, eps).sum(), weight)
    assert torch.equal(grad, torch.ones(4))
    assert x.grad is None


def test_a_reference_that_writes_unseen_is_an_error_in_the_backward():
    def writes(self, x, y):
        if y.sum() > 0:  # runs on no fake
            y.add_(1)
        return x * 2

    fake = lambda self, x, y: torch.empty_like(x)  # noqa: E731
    x = torch.ones(4, requires_grad=True)
    toy = kernel(lambda self, x, y: x * 2 + 10)
    op = lowered(layer(writes), toy, x, torch.ones(4), fake=fake, training=True)
    with pytest.raises(RuntimeError, match=r"the reference of Layer wrote into its operand y"):
        op().sum().backward()


# --- kernels that do other than they said -------------------------------------------------------


def number(self, x):
    return 1.0


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


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("training", [False, True])
def test_a_kernel_that_returns_something_else_is_named(what, training):
    change, message = WRONG[what]

    def toy(self, x):
        x.detach().numpy()  # runs on no fake
        return change(x)

    commit = f"{list(WRONG).index(what):x}" * 40  # another each, as they differ in a closure
    op = lowered(Scale(), kernel_of(kernel(toy), commit), torch.ones(4), training=training)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"^kernel org/toys@{commit[:8]}: Toy{message}"):
            op()


def test_a_wrong_shape_is_found_at_any_call():
    wrong = False

    def toy(self, x):
        return torch.from_numpy(x.numpy()[1:] if wrong else x.numpy() + 10)

    op = lowered(layer(lambda self, x: x + 1), kernel(toy), torch.ones(4))
    sizes = [torch.ones(4), torch.ones(7), torch.ones(0)]
    assert [op(x).shape for x in sizes] == [x.shape for x in sizes]
    wrong = True
    for x in sizes[:2]:
        with pytest.raises(RuntimeError, match=rf"expected is .* of shape \({len(x)},\)"):
            op(x)


def test_the_shape_function_runs_once_for_operands_of_the_same_sizes(monkeypatch):
    ran, asked = [], []
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

    op = lowered(layer(reference), kernel(toy), torch.ones(4), 2)
    ran.clear()
    for x, n in [(torch.ones(4), 2), (torch.ones(5), 2), (torch.ones(5), 3)] * 3:
        assert op(x, n).shape == (len(x) * n,)
    assert len(ran) == 3
    assert len(asked) == 3  # the hot path does not come here


def test_lowering_a_call_alike_runs_nothing():
    ran = []

    def toy(self, x):
        ran.append(x)
        return x + 10

    cls = kernel(toy)
    one = lowered(Scale(), cls, torch.ones(4))
    ran.clear()
    again = lowered(Scale(), cls, torch.ones(4))
    assert again.lowered == one.lowered
    assert ran == []
    other = lowered(Scale(5), cls, torch.ones(5))
    assert other.lowered.name == one.lowered.name
    assert other.lowered.results[0].shape == (5,)
    assert lowered(Scale(), cls, torch.ones(4), training=True).lowered != one.lowered


def test_running_out_of_memory_stays_what_it_is():
    def toy(self, x):
        x.numpy()
        raise torch.OutOfMemoryError("toy")

    with pytest.raises(torch.OutOfMemoryError, match=r"^toy$"):
        lowered(layer(lambda self, x: x + 1), kernel(toy), torch.ones(4))()


# --- around a call ------------------------------------------------------------------------------


def test_an_op_runs_on_other_threads():
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


def test_an_op_keeps_no_tensor():
    op = lowered(Scale(), Native, torch.ones(4), training=True)
    x = torch.ones(4, requires_grad=True)
    y = op(x, *op.operands[1:])
    y.sum().backward()
    references = [weakref.ref(x), weakref.ref(y), weakref.ref(x.grad)]
    del x, y
    gc.collect()
    assert [r() for r in references] == [None] * 3


def test_inference_mode():
    op = lowered(Scale(), Native, torch.ones(4))
    with torch.inference_mode():
        assert op(torch.ones(4), *op.operands[1:])[0].item() == pytest.approx(10.75)
        made = lowered(Scale(), kernel_of(Plus10, "b" * 40), torch.ones(4))
        assert made()[0].item() == pytest.approx(10.75)


def test_the_autocast_region_of_the_call_is_that_of_the_kernel():
    def linear(self, x):
        return functional.linear(x, self.weight) + 10

    module = layer(linear, weight=nn.Parameter(torch.ones(4, 4)))
    x = torch.ones(3, 4, requires_grad=True)
    for training in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            op = lowered(module, kernel(linear), x, training=training)
        y = op()  # as in a compiled graph, outside of it
        assert y.dtype is torch.bfloat16
        if training:
            (grad,) = torch.autograd.grad(y.float().sum(), x)
            assert grad.dtype is torch.float32
            assert torch.equal(grad, torch.full((3, 4), 4.0))


def test_symbolic_sizes_make_no_op_of_their_own():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    module, toy = Scale(), kernel_of(Plus10, "c" * 40)
    call, (x, weight, eps) = call_of(module, torch.ones(5, 4))
    fakes = [mode.from_tensor(x), mode.from_tensor(weight, static_shapes=True), eps]
    with mode:
        made = lower(toy, layer_of(module), call, fakes)
    assert made.name == lowered(module, toy, torch.ones(3, 4)).lowered.name
    assert made.results[0].shape[0] == fakes[0].shape[0]
    assert isinstance(made.results[0].shape[0], torch.SymInt)
