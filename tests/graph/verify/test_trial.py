"""Kernels that lie about their gradients are found out, in each of the known ways; honest ones,
whatever they are made of, are not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn import functional

from kernelgraph import cache
from kernelgraph.graph.gradients.gradient import (
    Overwrites,
    Source,
    SourceKind,
    wanted_of,
)
from kernelgraph.graph.verify import trial
from kernelgraph.graph.verify.trial import judge
from kernelgraph.graph.verify.verdict import Verdict
from kernelgraph.kernel import Kernel
from tests.support.op_calls import call_of, kernel_of, layer_of, own_backward

EPS = 1e-6


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """No verdict is known."""
    trial._verdicts.clear()
    cache.clear()


class Norm(nn.Module):
    def __init__(self, size: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def kernel(forward: Callable[..., Any], revision: str | None = None) -> Kernel:
    """A kernel with ``forward``, in a repository if it has a ``revision``."""
    toy = type("Toy", (nn.Module,), {"forward": forward, "__module__": __name__})
    return kernel_of(toy, revision)


def verdict(
    module: nn.Module,
    forward: Callable[..., Any] | Kernel,
    *args: Any,
    wanted: Any = None,
    compare: bool = True,
) -> Verdict:
    """That of a kernel with ``forward`` in a call of ``module`` with ``args``."""
    toy = forward if isinstance(forward, Kernel) else kernel(forward)
    call, operands = call_of(module, *args, forward=toy.forward)
    wanted = wanted_of(operands, every=True) if wanted is None else wanted
    return judge(layer_of(module), module, toy, call, operands, wanted, compare=compare)


def norm_backward(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    r = torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)
    gw = (g * x * r).sum_to_size(w.shape)
    g = g * w
    return r * g - x * r**3 * (g * x).mean(-1, keepdim=True), gw


def function(
    backward: Callable[..., Any],
    save: Callable[[Any, Tensor, Tensor, Tensor], None] | None = None,
) -> Callable[..., Any]:
    """The forward of a norm in a ``torch.autograd.Function`` with ``backward``.

    Args:
        backward: Of the context, what was saved and the gradient.
        save: Saves what the backward is to get; by default x and the weight.
    """

    class Norms(Function):
        @staticmethod
        def forward(ctx, x, w):
            y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w
            if save is None:
                ctx.save_for_backward(x, w)
            else:
                save(ctx, x, w, y)
            return y

        @staticmethod
        def backward(ctx, g):
            return backward(ctx, g)

    return lambda self, x: Norms.apply(x, self.weight)


X = torch.randn(6, 16)

# --- lies -------------------------------------------------------------------------------------


def composite(self, x):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * self.weight


def with_gradients_of(other: Callable[[Any, Tensor], Tensor]) -> Callable[..., Any]:
    """The norm's output, and the gradients of ``other``."""

    def forward(self, x):
        made = other(self, x)
        return composite(self, x).detach() + (made - made.detach())

    return forward


def scaled(of_x: float, of_weight: float) -> Callable[..., Any]:
    def backward(ctx, g):
        gx, gw = norm_backward(g, *ctx.saved_tensors)
        return gx * of_x, gw * of_weight

    return function(backward)


def from_numpy(self, x):
    x, w = x.detach().numpy(), self.weight.detach().numpy()
    return torch.from_numpy(x / ((x * x).mean(-1, keepdims=True) + EPS) ** 0.5 * w)


def ignores_weight(ctx, g):
    x, w = ctx.saved_tensors
    return norm_backward(g, x, torch.ones_like(w))[0], norm_backward(g, x, w)[1]


def raises(ctx, g):
    raise NotImplementedError("no backward\nyet")


LIES = {
    "numpy": (from_numpy, "it has no backward: no gradient flows through what it returns"),
    "detach": (lambda self, x: composite(self, x).detach(), "it has no backward"),
    "no_grad": (torch.no_grad()(composite), "it has no backward"),
    "zero": (
        function(lambda ctx, g: tuple(map(torch.zeros_like, ctx.saved_tensors))),
        "the gradient of x is zero; the gradient of weight is zero",
    ),
    "identity": (
        with_gradients_of(lambda self, x: x + 0 * self.weight),
        "the gradient of x is off by 0.",
    ),
    "factor 2": (scaled(2, 1), "the gradient of x is 2 times the layer's"),
    "factor 1.01": (scaled(1.01, 1), "the gradient of x is 1.01 times the layer's"),
    "sign": (scaled(1, -1), "the gradient of weight is -1 times the layer's"),
    "both": (
        scaled(0.5, 3),
        "the gradient of x is 0.5 times the layer's; the gradient of weight is 3 times the layer's",
    ),
    "one missing": (
        function(lambda ctx, g: (norm_backward(g, *ctx.saved_tensors)[0], None)),
        "the gradient of weight is missing",
    ),
    "one stops": (
        lambda self, x: (
            x * torch.rsqrt((x * x).mean(-1, keepdim=True).detach() + EPS) * self.weight
        ),
        "the gradient of x is off by 0.",
    ),
    "ignores the weight": (function(ignores_weight), "the gradient of x is off by 0."),
    "nan": (
        function(lambda ctx, g: tuple(t * float("nan") for t in ctx.saved_tensors)),
        "the gradient of x is not finite where the layer's is",
    ),
    "raises": (
        function(raises),
        "where gradients are wanted it raised NotImplementedError: no backward",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found_out(lie):
    forward, message = LIES[lie]
    found = verdict(Norm(), forward, X)
    assert found.own is None
    assert found.wrong.startswith(message)
    assert found.output == ""


def test_what_is_not_wanted_is_not_asked():
    assert verdict(Norm(), scaled(2, 1), X, wanted=(False, True)).own is not None
    assert verdict(Norm(), scaled(1, 2), X, wanted=(True, False)).own is not None
    assert verdict(Norm(), scaled(1, 2), X, wanted=(False, True)).own is None


def test_a_lie_that_only_some_layouts_show():
    """A kernel that ignores strides, and broadcasting, is right without."""

    def as_if_contiguous(ctx, g):
        x, w = ctx.saved_tensors
        flat = x.as_strided(x.shape, torch.empty(x.shape).stride())
        return norm_backward(g, flat, w)

    forward = function(as_if_contiguous)
    assert verdict(Norm(), forward, X).own is not None
    assert verdict(Norm(), forward, torch.randn(16, 40).t()[:, :16]).own is None


def test_a_lie_that_only_broadcasting_shows():
    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    class Adds(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.shapes = x.shape, y.shape
            return x + y

        @staticmethod
        def backward(ctx, g):
            return tuple(g[tuple(slice(n) for n in shape)].clone() for shape in ctx.shapes)

    def forward(self, x, y):
        return Adds.apply(x, y)

    assert verdict(Add(), forward, X, X).own is not None
    found = verdict(Add(), forward, X, torch.randn(1, 16))
    assert found.wrong.startswith("the gradient of y is off by ")
    found = verdict(Add(), forward, torch.randn(64, 1), torch.randn(1, 16))
    assert "the gradient of x" in found.wrong


def test_a_lie_about_one_result_of_two():
    class Two(nn.Module):
        def forward(self, x):
            return x.sin(), {"y": x.cos(), "n": 3}

    honest = verdict(Two(), lambda self, x: (x.sin(), {"y": x.cos(), "n": 3}), X)
    assert honest.own is not None
    assert honest.own.flows == (True, True)
    found = verdict(Two(), lambda self, x: (x.sin(), {"y": x.cos().detach(), "n": 3}), X)
    assert found.wrong.startswith("the gradient of x is off by ")


# --- wrong outputs ----------------------------------------------------------------------------

OUTPUTS = {
    "factor": (lambda self, x: composite(self, x) * 1.1, "it is 1.1 times the layer's"),
    "zero": (lambda self, x: composite(self, x) * 0, "it is zero"),
    "shape": (
        lambda self, x: composite(self, x).t(),
        "it returned a torch.float32 tensor of shape",
    ),
    "dtype": (lambda self, x: composite(self, x).double(), "it returned a torch.float64 tensor of"),
    "structure": (
        lambda self, x: (composite(self, x),),
        "it returned a tuple of 1 (a tensor), and",
    ),
    "set": (lambda self, x: {x}, "it returned 'a set', and the layer a tensor"),
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_a_wrong_output_is_found_out(what):
    forward, message = OUTPUTS[what]
    found = verdict(Norm(), forward, X)
    assert found.own is None
    assert found.output.startswith(message)
    assert found.wrong == f"its output is wrong: {found.output}"


def test_which_result_is_wrong_is_said():
    class Two(nn.Module):
        def forward(self, x):
            return x.sin(), x.argmax(-1)

    found = verdict(Two(), lambda self, x: (x.sin(), x.argmin(-1)), X)
    assert found.output.startswith("result 1 is off by")


# --- honest ones ------------------------------------------------------------------------------


def saves_the_output(ctx, x, w, y):
    ctx.save_for_backward(x, w, y)


def from_the_output(ctx, g):
    x, w, y = ctx.saved_tensors
    r = y / (x * w)
    gw = (g * y / w).sum_to_size(w.shape)
    g = g * w
    return r * g - x * r**3 * (g * x).mean(-1, keepdim=True), gw


def saves_its_own(ctx, x, w, y):
    ctx.save_for_backward(x.clone(), w.clone())


def holds_its_input(ctx, x, w, y):
    ctx.x = x
    ctx.save_for_backward(w)


def holds_its_output(ctx, x, w, y):
    ctx.y = y
    ctx.save_for_backward(x, w)


def honest(ctx, g):
    return norm_backward(g, *ctx.saved_tensors)


def into_operands(ctx, g):
    x, w = ctx.saved_tensors
    gx, gw = norm_backward(g, x, w)
    return x.copy_(gx), w.copy_(gw)


def into_gradient(ctx, g):
    gx, gw = norm_backward(g, *ctx.saved_tensors)
    return g.copy_(gx), gw


def into_its_own(ctx, g):
    x, w = ctx.saved_tensors
    gx, gw = norm_backward(g, x, w)
    return x.copy_(gx), w.copy_(gw)


def once(ctx, g):
    x = ctx.__dict__.pop("x")
    return norm_backward(g, x.clone(), *ctx.saved_tensors)


OPERANDS = (Source(SourceKind.OPERAND, 0), Source(SourceKind.OPERAND, 1))

HONEST = {
    "torch": (composite, own_backward((0, 1), (), (True,))),
    "function": (function(honest), own_backward((0, 1), (), (True,))),
    "saved output": (
        function(from_the_output, saves_the_output),
        own_backward((0, 1), (0,), (True,)),
    ),
    "own copies": (function(honest, saves_its_own), own_backward((), (), (True,))),
    "holds its input": (
        function(
            lambda ctx, g: norm_backward(g, ctx.x, *ctx.saved_tensors),
            holds_its_input,
        ),
        own_backward((), (), (True,), hidden_saves=True),
    ),
    "holds its output": (
        function(lambda ctx, g: norm_backward(g + 0 * ctx.y, *ctx.saved_tensors), holds_its_output),
        own_backward((), (), (True,), hidden_saves=True),
    ),
    "writes into operands": (
        function(into_operands),
        own_backward((0, 1), (), (True,), overwrites=Overwrites(saved=OPERANDS)),
    ),
    "writes into the gradient": (
        function(into_gradient),
        own_backward((0, 1), (), (True,), overwrites=Overwrites(grads=(0,))),
    ),
    "writes into its own": (
        function(into_its_own, saves_its_own),
        own_backward((), (), (True,), overwrites=Overwrites(private=True)),
    ),
    "runs once": (
        function(
            once, lambda ctx, x, w, y: (setattr(ctx, "x", x.clone()), ctx.save_for_backward(w))
        ),
        own_backward((1,), (), (True,)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", HONEST)
def test_what_an_honest_one_needs_is_told(what, dtype):
    forward, own = HONEST[what]
    assert verdict(Norm(dtype=dtype), forward, X.to(dtype)) == Verdict(own)


@pytest.mark.parametrize("what", HONEST)
def test_it_is_told_without_a_reference(what):
    class Unknown(Norm):
        def forward(self, x):
            raise AssertionError("the reference is not run")

    forward, own = HONEST[what]
    assert verdict(Unknown(), forward, X, compare=False) == Verdict(own)


def test_without_a_reference_only_what_is_missing_is_wrong():
    assert verdict(Norm(), scaled(2, 2), X, compare=False).own is not None
    assert verdict(Norm(), LIES["numpy"][0], X, compare=False).own is None
    assert verdict(Norm(), LIES["raises"][0], X, compare=False).own is None


@pytest.mark.parametrize("layout", ["gaps", "rows"])
def test_incoming_gradients_may_have_to_be_contiguous(layout):
    def as_if_contiguous(ctx, g):
        x, w = ctx.saved_tensors
        if layout == "gaps":  # it knows how long a row is in memory
            flat = g.as_strided(g.shape, (g.stride(0), 1))
        else:
            flat = g if g.stride(-1) != 1 else g.as_strided(g.shape, (g.shape[-1], 1))
        return norm_backward(flat, x, w)

    assert verdict(Norm(), function(as_if_contiguous), X) == Verdict(
        own_backward((0, 1), (), (True,)), contiguous=True
    )

    def refuses(ctx, g):
        if not g.is_contiguous():
            raise ValueError("not contiguous")
        return norm_backward(g, *ctx.saved_tensors)

    assert verdict(Norm(), function(refuses), X).contiguous


def test_what_reads_its_own_past_is_of_no_use():
    """It gives something else each time that it runs, copies or not."""

    def backward(ctx, g):
        ctx.count = getattr(ctx, "count", 0) + 1
        gx, gw = norm_backward(g, *ctx.saved_tensors)
        return gx * ctx.count, gw

    found = verdict(Norm(), function(backward), X)
    assert found.wrong == "its backward gives other gradients when it is run again"


def test_a_gradient_that_is_none_is_zero():
    class Unused(nn.Module):
        def forward(self, x, y):
            return x * 2 + 0 * y

    assert verdict(Unused(), lambda self, x, y: x * 2, X, X).own is not None


def test_a_layer_that_returns_what_it_is_given():
    class Identity(nn.Module):
        def forward(self, x):
            return x

    assert verdict(Identity(), lambda self, x: x, X).own is not None
    assert verdict(Identity(), lambda self, x: x.detach(), X).own is None


class Linear(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, dtype=dtype) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) @ self.weight


class Matmul(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mH, x.mH @ g


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers(dtype):
    module, x = Linear(dtype), torch.randn(6, 16, dtype=dtype)
    assert verdict(module, lambda self, x: Matmul.apply(x, self.weight), x).own is not None
    assert verdict(module, lambda self, x: torch.view_as_complex(parts(x @ self.weight)), x).output


def parts(y: Tensor) -> Tensor:
    """Real and imaginary parts, the latter with the wrong sign."""
    return torch.view_as_real(y) * torch.tensor([1.0, -1.0], dtype=y.real.dtype)


def test_eight_bits():
    x = torch.randn(6, 16).to(torch.float8_e4m3fn)

    def forward(self, x):
        return Matmul.apply(x.float(), self.weight)

    assert verdict(Linear(), forward, x, wanted=(False, True)).own is not None
    found = verdict(Linear(), lambda self, x: forward(self, x).detach(), x, wanted=(False, True))
    assert found.own is None


def test_scalars():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x, factor):
            return x * self.weight * factor

    def forward(self, x, factor):
        return factor * self.weight * x

    assert verdict(Scale(), forward, torch.tensor(3.0), 2).own is not None
    assert verdict(Scale(), forward, torch.randn(40, 1), 0.5).own is not None
    found = verdict(Scale(), lambda self, x, f: forward(self, x, f).sin(), torch.tensor(3.0), 2)
    assert found.output


def test_under_autocast():
    def forward(self, x):
        return Matmul.apply(x.bfloat16(), self.weight.bfloat16())

    with torch.autocast("cpu", torch.bfloat16):
        assert verdict(Linear(), forward, torch.randn(40, 16)).own is not None
        found = verdict(Linear(), lambda self, x: forward(self, times(x, 2.0)), torch.randn(40, 16))
        assert found.wrong == "the gradient of x is 2 times the layer's"


# --- precision --------------------------------------------------------------------------------


class Summing(nn.Module):
    """A sum that is rounded at each step."""

    def forward(self, x):
        total = x[:, 0]
        for i in range(1, x.shape[1]):
            total = total + x[:, i]
        return total * total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_that_is_better_than_its_layer_is_right(dtype):
    x = torch.randn(4, 2048).to(dtype)

    def better(self, x):
        return x.float().sum(1).square().to(x.dtype)

    assert verdict(Summing(), better, x).own is not None
    found = verdict(Summing(), lambda self, x: better(self, x) * 2, x)
    assert found.output


def test_a_kernel_that_is_worse_than_its_layer_by_far_is_wrong():
    class Sum(nn.Module):
        def forward(self, x):
            return x.double().sum(1).square().to(x.dtype)

    x = torch.randn(4, 4096, dtype=torch.bfloat16)
    assert verdict(Sum(), lambda self, x: Summing.forward(self, x), x).output


def test_tf32_is_right():
    def cut(t):
        return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)

    class Cut(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return cut(x) @ cut(w)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return cut(g) @ cut(w).t(), cut(x).t() @ cut(g)

    assert verdict(Linear(), lambda self, x: Cut.apply(x, self.weight), torch.randn(9, 16)).own


@pytest.mark.parametrize("which", ["kernel", "layer", "both"])
def test_float32_in_a_float64_call_is_right(which):
    """Many layers compute in it whatever they get."""

    def single(self, x):
        weight = self.weight.float()
        return composite(SimpleNamespace(weight=weight), x.float()).to(x.dtype)

    class Single(Norm):
        def forward(self, x):
            return single(self, x)

    module = (Norm if which == "kernel" else Single)(dtype=torch.float64)
    forward = composite if which == "layer" else single
    assert verdict(module, forward, X.double()).own is not None


# --- what cannot be told ----------------------------------------------------------------------


def untold(module: nn.Module, forward: Callable[..., Any], *args: Any) -> str:
    found = verdict(module, forward, *args)
    assert (found.own, found.output) == (None, "")
    assert found.wrong.startswith("its gradients cannot be compared: ")
    return found.wrong.partition(": ")[2]


def test_a_reference_that_raises():
    class Picky(nn.Module):
        def forward(self, x):
            raise ValueError("only real inputs\nplease")

    text = "the reference raised ValueError: only real inputs"
    assert untold(Picky(), lambda self, x: x, X) == text


def test_a_layer_that_writes_into_its_operands():
    class Writes(nn.Module):
        def forward(self, x, y):
            return x.mul_(y)

    found = verdict(Writes(), lambda self, x, y: x * y, X, X, wanted=(False, True))
    why = "its gradients cannot be compared: the layer writes into its operands"
    assert found == Verdict(None, why)
    assert "in-place operation" in untold(Writes(), lambda self, x, y: x * y, X, X)


def test_a_layer_that_sets_attributes():
    class Counts(nn.Module):
        def forward(self, x):
            setattr(self, "seen", 1)  # noqa: B010 (as no reader of its source sees)
            return x * 2

    assert "sets seen of the layer" in untold(Counts(), lambda self, x: x * 2, X)


def test_nothing_finite():
    class Log(nn.Module):
        def forward(self, x):
            return (-x * x).log()

    message = "nothing that the layer returns for made-up inputs is finite"
    assert untold(Log(), lambda self, x: (-x * x).log(), X) == message


def test_other_random_numbers():
    class Noise(nn.Module):
        def forward(self, x):
            return x * torch.rand_like(x)

    assert verdict(Noise(), lambda self, x: torch.rand_like(x) * x, X).own is not None

    def other(self, x):
        torch.rand(3)
        return x * torch.rand_like(x)

    message = "the layer is random, and the kernel draws other numbers"
    assert untold(Noise(), other, X) == message


def test_an_operand_that_cannot_be_made_up():
    class Dense(nn.Module):
        def forward(self, x):
            return x.to_dense()

    text = "no values can be made up for a sparse_coo Tensor"
    assert untold(Dense(), lambda self, x: x.to_dense(), X.to_sparse()) == text


def test_a_kernel_that_raises():
    def forward(self, x):
        raise ValueError("no")

    found = verdict(Norm(), forward, X)
    assert found == Verdict(None, "it raised ValueError: no")


def test_out_of_memory_is_not_kept(monkeypatch):
    ran = []

    def forward(self, x):
        ran.append(1)
        if len(ran) == 1:
            raise torch.OutOfMemoryError("full")
        return composite(self, x)

    toy = kernel(forward)
    assert untold(Norm(), toy, X) == "OutOfMemoryError: full"
    trial._verdicts.clear()
    assert verdict(Norm(), toy, X).own is not None


# --- the operands -----------------------------------------------------------------------------


Layout = tuple[tuple[int, ...], tuple[int, ...]]


def spying(seen: set[Layout]) -> Callable[..., Any]:
    """A kernel that notes the sizes and strides of what it gets."""

    def forward(self, x):
        seen.add((tuple(x.shape), x.stride()))
        return composite(self, x)

    return forward


def test_sizes_are_small_where_that_is_the_same_call():
    seen: set[Layout] = set()
    verdict(Norm(), spying(seen), torch.randn(4096, 1, 16))
    assert seen == {((12, 1, 16), (16, 16, 1))}


def test_the_calls_own_sizes_where_the_layer_wants_them():
    class Blocks(Norm):
        def forward(self, x):
            return super().forward(x.view(64, 16, 16)).view(1024, 16)

    seen: set[Layout] = set()
    assert verdict(Blocks(), spying(seen), torch.randn(1024, 16)).own is not None
    assert seen == {((1024, 16), (16, 1))}


def test_the_calls_own_sizes_where_the_kernel_wants_them():
    seen: set[Layout] = set()

    def forward(self, x):
        assert x.shape[0] % 128 == 0
        return spying(seen)(self, x)

    assert verdict(Norm(), forward, torch.randn(256, 16)).own is not None
    assert seen == {((256, 16), (16, 1))}


def test_the_layers_weights_stay():
    module = Norm()
    verdict(module, function(into_operands), X)
    assert torch.equal(module.weight, torch.ones(16))
    assert module.weight.grad is None


def test_random_numbers_go_on():
    state = torch.get_rng_state()
    verdict(Norm(), lambda self, x: composite(self, x) + 0 * torch.rand(()), X)
    assert torch.equal(torch.get_rng_state(), state)


def dynamic(dims: int) -> StatelessSymbolicContext:
    """Have the first of so many sizes be a symbol."""
    rest = [DimDynamic.STATIC] * (dims - 1)
    return StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, *rest])


def test_the_same_verdict_in_the_middle_of_a_trace():
    module = Norm()
    for forward, own in (HONEST["function"], (scaled(2, 1), None)):
        toy = kernel(forward)
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fake = mode.from_tensor(torch.empty(50, 16), symbolic_context=dynamic(2))
        call, operands = call_of(module, fake, forward=toy.forward)
        assert isinstance(operands[0].shape[0], torch.SymInt)
        with mode:
            found = judge(layer_of(module), module, toy, call, operands, (True, True))
        assert found.own == own


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_wherever_it_is_asked(mode):
    with mode():
        assert verdict(Norm(), composite, X).own is not None


class Experts(nn.Module):
    """A reference as transformers has them, in loops that depend on the data."""

    def __init__(self, how: str = "one_hot") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 16, 16) / 4)
        self.how = how

    def forward(self, x: Tensor, index: Tensor, scale: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        chosen = functional.one_hot(index, 6).bool() if self.how == "one_hot" else None
        for expert in range(6):
            mask = index == expert if chosen is None else chosen[..., expert]
            token, slot = torch.where(mask)
            out = out.index_add(0, token, x[token] @ self.weight[expert] * scale[token, slot, None])
        return out


def every_expert(self, x: Tensor, index: Tensor, scale: Tensor, wrong: float = 1.0) -> Tensor:
    dense = torch.einsum("ti,eij->tej", x, self.weight)
    # An index out of range would be the end of a process with a GPU.
    assert index.min() >= 0
    assert index.max() < 6
    dense = torch.cat([dense[:, :1], dense[:, 1:2] * wrong, dense[:, 2:]], 1)
    return (dense.gather(1, index[..., None].expand(-1, -1, 16)) * scale[..., None]).sum(1)


@pytest.mark.parametrize("how", ["one_hot", "mask"])
def test_a_lie_about_one_expert_is_found_out(how):
    args = torch.randn(40, 16), torch.zeros(40, 2, dtype=torch.int64), torch.rand(40, 2)
    assert verdict(Experts(how), every_expert, *args).own is not None

    def lies(self, x, index, scale):
        right, wrong = every_expert(self, x, index, scale), every_expert(self, x, index, scale, 2.0)
        return right.detach() + wrong - wrong.detach()

    found = verdict(Experts(how), lies, *args)
    assert "the gradient of weight is off by" in found.wrong


def test_indices_of_which_nothing_is_known_are_zeros():
    class Positions(nn.Module):
        def forward(self, x, position):
            return x * position[..., None].cos()

    seen: list[Tensor] = []

    def forward(self, x, position):
        seen.append(position)
        return x * position[..., None].cos()

    args = torch.randn(40, 7, 16), torch.arange(280).view(40, 7)
    assert verdict(Positions(), forward, *args).own is not None
    assert not any(position.any() for position in seen)


# --- kept -------------------------------------------------------------------------------------


def counted(ran: list[int], revision: str | None = "1" * 40) -> Kernel:
    def forward(self, x):
        ran.append(1)
        return composite(self, x)

    return kernel(forward, revision)


def runs_again(ran: list[int], toy: Kernel, *args: Any, **kwargs: Any) -> bool:
    """Whether it takes a run of ``toy`` to give a verdict; that it may train."""
    before = len(ran)
    assert verdict(Norm(), toy, *args, **kwargs) == Verdict(own_backward((0, 1), (), (True,)))
    return len(ran) > before


def test_a_verdict_is_kept_in_the_process():
    ran: list[int] = []
    toy = counted(ran, None)
    assert runs_again(ran, toy, X)
    assert not runs_again(ran, toy, X)
    assert runs_again(ran, toy, X, compare=False)
    assert not runs_again(ran, toy, torch.randn(6, 16))


def test_a_verdict_is_kept_on_disk():
    ran: list[int] = []
    toy = counted(ran)
    assert runs_again(ran, toy, X)
    trial._verdicts.clear()
    assert not runs_again(ran, toy, X)
    trial._verdicts.clear()
    assert runs_again(ran, counted(ran, "2" * 40), X), "another commit"
    cache.clear()
    trial._verdicts.clear()
    assert runs_again(ran, toy, X)


def test_one_of_a_class_in_no_kernel_is_not():
    """What its ``forward`` calls may have changed by the next process."""
    ran: list[int] = []
    toy = counted(ran, None)
    assert runs_again(ran, toy, X)
    trial._verdicts.clear()
    assert runs_again(ran, toy, X)
    assert cache.entries() == {}


def test_one_that_only_says_what_was_raised_is_not_kept_on_disk():
    """What raised may have wanted a compiler, say, that is there the next time."""
    missing = [True]

    def forward(self, x):
        if missing:
            raise OSError("no compiler")
        return composite(self, x)

    toy = kernel(forward, "1" * 40)
    assert verdict(Norm(), toy, X).wrong == "it raised OSError: no compiler"
    trial._verdicts.clear()
    missing.clear()
    assert verdict(Norm(), toy, X).own is not None


def test_calls_that_are_alike_at_small_sizes_are_judged_once():
    ran: list[int] = []
    toy = counted(ran)
    assert runs_again(ran, toy, torch.randn(100, 16))
    assert not runs_again(ran, toy, torch.randn(3000, 16))
    assert runs_again(ran, toy, torch.randn(16, 100).t())
    assert runs_again(ran, toy, torch.randn(5, 16))
    assert runs_again(ran, toy, torch.randn(3000, 16).double())


def test_what_is_on_disk_is_not_believed_blindly():
    ran: list[int] = []
    toy = counted(ran)
    assert runs_again(ran, toy, X)
    (path,) = cache.directory().glob("verdicts/*.json")
    for broken in ("{", path.read_text().replace('"own"', '"owned"')):
        path.write_text(broken)
        trial._verdicts.clear()
        assert runs_again(ran, toy, X)


def test_another_process_has_the_same_key():
    program = """
import torch
from tests.graph.verify import test_trial as here
from kernelgraph.graph.verify import trial

def never(*args): raise AssertionError("it is judged again")

trial._judge = never
print(here.verdict(here.Norm(), here.kernel(here.composite, "1" * 40), here.X))
"""
    found = verdict(Norm(), kernel(composite, "1" * 40), X)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == f"{found}\n", done.stderr


class Rotary(nn.Module):
    def forward(self, x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


def rotated(x: Tensor, cos: Tensor, sin: Tensor, back: float = 1.0) -> Tensor:
    """It takes the halves of the tables for equal, as they are."""
    half = x.shape[-1] // 2
    cos, sin, (first, second) = cos[..., :half], sin[..., :half] * back, x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Rotate(Function):
    @staticmethod
    def forward(ctx, x, cos, sin, back):
        ctx.save_for_backward(cos, sin)
        ctx.back = back
        return rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, g):
        return rotated(g, *ctx.saved_tensors, back=ctx.back), None, None, None


@pytest.mark.parametrize("batch", [1, 2])
def test_tables_with_equal_halves(batch):
    angles = torch.randn(1, 7, 8)
    cos, sin = (torch.cat([t, t], -1).expand(batch, 7, 16) for t in (angles.cos(), angles.sin()))
    args = torch.randn(batch, 7, 16), cos, sin
    x_only = (True, False, False)

    def forward(self, x, cos, sin):
        return Rotate.apply(x, cos, sin, -1.0)

    def identity(self, x, cos, sin):
        return Rotate.apply(x, cos, sin, 1.0)

    assert verdict(Rotary(), forward, *args, wanted=x_only) == Verdict(
        own_backward((1, 2), (), (True,))
    )
    found = verdict(Rotary(), identity, *args, wanted=x_only)
    assert found.wrong.startswith("the gradient of x is off by")
    assert verdict(Rotary(), forward, *args).output, "whoever wants all gradients has any tables"
    worse = verdict(Rotary(), lambda self, *a: forward(self, *a) * 2, *args, wanted=x_only)
    assert worse.output


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("what", HONEST)
def test_an_honest_one_on_a_gpu(what):
    forward, own = HONEST[what]
    assert verdict(Norm().cuda(), forward, X.cuda()) == Verdict(own)


@pytest.mark.cuda
@pytest.mark.parametrize("lie", sorted(LIES.keys() - {"numpy"}))
def test_a_lie_on_a_gpu(lie):
    forward, message = LIES[lie]
    found = verdict(Norm().cuda(), forward, X.cuda())
    assert (found.own, found.output) == (None, "")
    assert found.wrong.startswith(message)


@pytest.mark.cuda
def test_random_numbers_on_a_gpu_go_on():
    class Noise(nn.Module):
        def forward(self, x):
            return x * torch.rand_like(x)

    state = torch.cuda.get_rng_state()
    assert verdict(Noise(), lambda self, x: torch.rand_like(x) * x, X.cuda()).own is not None
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.cuda
@pytest.mark.parametrize("how", ["one_hot", "mask"])
def test_no_index_is_out_of_range_on_a_gpu(how):
    args = torch.randn(40, 16), torch.zeros(40, 2, dtype=torch.int64), torch.rand(40, 2)
    args = tuple(a.cuda() for a in args)
    assert verdict(Experts(how).cuda(), every_expert, *args).own is not None


# --- laws -------------------------------------------------------------------------------------


class Gate(nn.Module):
    """Broadcasts, reduces, and has a parameter that it may not use all of."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.silu(x) * y * self.scale


def by_other_means(self, x: Tensor, y: Tensor) -> Tensor:
    return (self.scale * y) * (x * torch.sigmoid(x))


def times(tensor: Tensor, factor: float) -> Tensor:
    """The same, with a gradient that is scaled."""
    return tensor * factor + (tensor * (1 - factor)).detach()


@st.composite
def calls(draw, *dtypes):
    """A layer, arguments that broadcast, and of which operands gradients are wanted."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 9, 40]), min_size=1, max_size=3))
    shapes = [[1 if draw(st.integers(0, 3)) == 0 else n for n in shape] for _ in range(2)]
    shapes[1] = shapes[1][draw(st.integers(0, len(shape) - 1)) :]
    width = draw(st.sampled_from([1, max(s[-1] for s in shapes)]))
    args = []
    for sizes in shapes:
        tensor = torch.randn(sizes).to(dtype)
        layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
        if layout == "transposed":
            tensor = tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
        elif layout == "sliced":
            tensor = torch.cat([tensor, tensor], -1)[..., : sizes[-1]]
        elif layout == "expanded" and sizes[0] > 1:
            tensor = tensor[:1].expand(sizes)
        args.append(tensor)
    wanted = draw(st.tuples(*[st.booleans()] * 3).filter(any))
    return Gate(width, dtype), args, wanted


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(calls(torch.float64, torch.float32, torch.bfloat16))
def test_whoever_computes_the_layer_by_other_means_may_train(call):
    """A kernel that computes what the layer does, by other means, is never refused."""
    module, args, wanted = call
    found = verdict(module, by_other_means, *args, wanted=wanted)
    assert found.own is not None, found
    assert found == Verdict(found.own)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    calls(torch.float64, torch.float32, torch.bfloat16),
    st.integers(0, 2),
    st.floats(0.06, 3),
    st.sampled_from([-1, 1]),
)
def test_whoever_scales_a_gradient_may_not(call, which, off, sign):
    """A kernel whose gradient of one operand is scaled by s with |s - 1| > 0.05 is refused where
    that gradient is wanted, and not where it is not.

    In bfloat16 if none is a sum: of terms that cancel, rounding may leave no more than that.
    """
    module, args, wanted = call
    x, y = args
    elements = {t.numel() for t in (x, y, module.scale, module(x, y))}
    assume(x.dtype != torch.bfloat16 or len(elements) == 1)
    factors = [1.0, 1.0, 1.0]
    factors[which] += sign * off

    def forward(self, x, y):
        x, y, scale = (times(t, f) for t, f in zip((x, y, self.scale), factors, strict=True))
        return functional.silu(x) * y * scale

    found = verdict(module, forward, *args, wanted=wanted)
    name = ("x", "y", "scale")[which]
    assert (found.own is None) == wanted[which], found
    assert found.output == ""
    if wanted[which]:
        assert found.wrong.startswith(f"the gradient of {name} ")
