"""Ops whose gradient is the kernel's own backward, which runs once and never the forward again."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernelgraph.graph.gradients.bypass import BypassedCall, intercept_apply
from kernelgraph.graph.gradients.gradient import Overwrites, OwnBackward, Source, SourceKind
from kernelgraph.graph.gradients.tape import Tape
from kernelgraph.graph.ops import registry
from kernelgraph.graph.ops.backward import ByKernel
from tests.support.op_calls import Op, lowered, own_backward

runs: list[str] = []


@pytest.fixture(autouse=True)
def fresh_runs() -> None:
    runs.clear()


def ran(what: str, x: Tensor) -> None:
    if not isinstance(x, FakeTensor):
        runs.append(what)


class Norm(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.eps = 0.25

    def forward(self, x: Tensor) -> Tensor:
        ran("reference", x)
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class NormFunction(torch.autograd.Function):
    """Saves an operand, a part of one, a result, and something of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, weight: Tensor) -> Tensor:
        ran("forward", x)
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        y = x * scale * weight
        ctx.save_for_backward(x, weight[1:], weight[:1], scale, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        runs.append("backward")
        x, most, first, scale, y = ctx.saved_tensors
        weight = torch.cat([first, most])
        normed = x * scale
        slope = (grad * y).mean(-1, keepdim=True)
        of_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return scale * (grad * weight - normed * slope), None, of_weight


class NormKernel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NormFunction.apply(x, self.eps, self.weight)


OWN = own_backward(operands=(0, 1), results=(0,), flows=(True,))


class PlainKernel(nn.Module):
    """Ordinary autograd, in several nodes."""

    def forward(self, x: Tensor) -> Tensor:
        ran("forward", x)
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).pow(-0.5) * self.weight


KERNELS = {"function": NormKernel, "autograd": PlainKernel}


def kernel(forward: Any) -> type[nn.Module]:
    return type("Toy", (nn.Module,), {"forward": forward})


def kept(op: Op) -> int:
    """How many forwards wait for their backward."""
    body = registry._bodies[op.lowered.name]
    assert isinstance(body, ByKernel)
    return len(body.tapes)


def norm(toy: type[nn.Module] = NormKernel, x: Tensor | None = None, **kwargs: Any) -> Op:
    x = torch.randn(3, 4) if x is None else x
    op = lowered(Norm(), toy, x, own=kwargs.pop("own", OWN), **kwargs)
    runs.clear()
    return op


def model(op: Op) -> Any:
    """The op between other things, whose buffers a compiler may put other values into."""

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return call(op, x.sin(), weight).cos() * 2

    return run


def call(op: Op, x: Tensor, weight: Tensor) -> Tensor:
    return op.overload(x, weight, 0.25)[0]


def reference(x: Tensor, weight: Tensor) -> Tensor:
    x = x.sin()
    y = x * (x.square().mean(-1, keepdim=True) + 0.25).rsqrt() * weight
    return y.cos() * 2


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(*(shape or (3, 4)), requires_grad=True)
    return x, torch.linspace(0.5, 1.5, x.shape[-1]).requires_grad_()


def assert_gradients(run: Any, *shape: int) -> None:
    x, weight = inputs(*shape)
    made = torch.autograd.grad(run(x, weight).square().sum(), (x, weight))
    expected = torch.autograd.grad(reference(x, weight).square().sum(), (x, weight))
    torch.testing.assert_close(made, expected)


# --- once forward, once backward ----------------------------------------------------------------


@pytest.mark.parametrize("toy", KERNELS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_backward_is_the_kernels_own(toy, backend):
    op = norm(KERNELS[toy])
    assert_gradients(torch.compile(model(op), backend=backend, fullgraph=True))
    assert runs == (["forward", "backward"] if toy == "function" else ["forward"])
    assert kept(op) == 0


@pytest.mark.parametrize("shapes", [[(3, 4), (5, 4), (2, 3, 4)]])
def test_sizes_of_all_kinds(shapes):
    for shape in shapes:
        op = norm(x=torch.randn(shape))
        compiled = torch.compile(model(op), backend="aot_eager", fullgraph=True, dynamic=True)
        assert_gradients(compiled, *shape)
        assert_gradients(compiled, *(n + 2 for n in shape[:-1]), 4)
    assert "reference" not in runs


def test_what_is_saved_is_told_from_the_memory_that_goes_on():
    """A compiler reuses memory that it has seen the last use of, also of what a kernel saved."""

    def run(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(3):
            x = call(op, x + 1, weight).sin() * 2 + 1
        return x

    def expected(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(3):
            x = x + 1
            x = x * (x.square().mean(-1, keepdim=True) + 0.25).rsqrt() * weight
            x = x.sin() * 2 + 1
        return x

    op = norm()
    compiled = torch.compile(run, fullgraph=True)
    x, weight = inputs(64, 4)
    made = torch.autograd.grad(compiled(x, weight).square().sum(), (x, weight))
    wanted = torch.autograd.grad(expected(x, weight).square().sum(), (x, weight))
    torch.testing.assert_close(made, wanted)
    assert runs == ["forward"] * 3 + ["backward"] * 3


def test_only_what_is_needed():
    op = norm()
    x, weight = inputs()
    (grad,) = torch.autograd.grad(call(op, x, weight).sum(), weight)
    scale = (x.square().mean(-1, keepdim=True) + 0.25).rsqrt()
    torch.testing.assert_close(grad, (x * scale).sum(0).detach())
    assert x.grad is None


def test_mixed_requires_grad_is_another_op_that_makes_no_other_gradient():
    wanted: list[Any] = []

    class Watched(NormFunction):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            wanted.append(ctx.needs_input_grad)
            return NormFunction.backward(ctx, grad)

    toy = kernel(lambda self, x: Watched.apply(x, self.eps, self.weight))
    x, weight = inputs()
    module = Norm()
    module.weight.requires_grad_(False)
    frozen = lowered(module, toy, x, own=OWN, every=False)
    y = frozen.overload(x, weight.detach(), 0.25)[0]
    y.sum().backward()
    assert wanted == [(True, False, False)]
    with pytest.raises(RuntimeError, match="no gradient of its operand weight"):
        frozen.overload(x, weight, 0.25)


def test_a_result_that_no_gradient_flows_through():
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            index = x.argmax(-1)
            ctx.mark_non_differentiable(index)
            ctx.shape = x.shape
            return x * 2, index

        @staticmethod
        def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:
            return grad * 2

    layer = type("Layer", (nn.Module,), {"forward": lambda self, x: (x * 2, x.argmax(-1))})
    x = torch.randn(3, 4, requires_grad=True)
    toy = kernel(lambda self, x: Both.apply(x))
    op = lowered(layer(), toy, x, own=own_backward(flows=(True, False)))
    y, index = op()
    assert (y.requires_grad, index.requires_grad) == (True, False)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 2.0))


# --- steps that are not one forward and one backward --------------------------------------------


@pytest.mark.parametrize("toy", KERNELS)
def test_a_retained_graph_and_two_backwards(toy):
    op = norm(KERNELS[toy])
    x, weight = inputs()
    y = model(op)(x, weight).square().sum()
    first = torch.autograd.grad(y, (x, weight), retain_graph=True)
    assert kept(op) == 1
    second = torch.autograd.grad(y, (x, weight))
    torch.testing.assert_close(first, second)
    assert runs.count("forward") == 1
    del y
    assert kept(op) == 0


def test_a_retained_graph_of_a_compiled_model():
    op = norm()
    with torch._functorch.config.patch(donated_buffer=False):
        compiled = torch.compile(model(op), fullgraph=True)
        x, weight = inputs()
        y = compiled(x, weight).square().sum()
        first = torch.autograd.grad(y, (x, weight), retain_graph=True)
        second = torch.autograd.grad(y, (x, weight))
    torch.testing.assert_close(first, second)
    assert runs == ["forward", "backward", "backward"]


def test_gradients_accumulate_over_forwards_that_wait():
    op = norm()
    compiled = torch.compile(model(op), backend="aot_eager", fullgraph=True)
    weight = inputs()[1]
    batches = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    losses = [compiled(x, weight).square().sum() for x in batches]
    assert kept(op) == 3
    for loss in reversed(losses):
        loss.backward()
    expected = torch.autograd.grad(
        sum(reference(x, weight).square().sum() for x in batches), weight
    )
    torch.testing.assert_close(weight.grad, expected[0])
    del losses, loss
    assert kept(op) == 0


def test_calls_alike_are_two_forwards_or_one_graph_used_twice():
    """A compiler takes two equal calls for one."""
    op = norm()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return call(op, x, weight).sin() + call(op, x, weight).cos()

    x, weight = inputs()
    made = torch.autograd.grad(torch.compile(run)(x, weight).sum(), (x, weight))
    expected = torch.autograd.grad(run(x, weight).sum(), (x, weight))
    torch.testing.assert_close(made, expected)


def test_an_error_in_a_backward_leaves_the_next_step_as_it_was():
    class Fails(NormFunction):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            if fails:
                raise ValueError("no luck")
            return NormFunction.backward(ctx, grad)

    op = norm(kernel(lambda self, x: Fails.apply(x, self.eps, self.weight)))
    compiled = torch.compile(model(op), backend="aot_eager", fullgraph=True)
    fails = True
    x, weight = inputs()
    with pytest.raises(RuntimeError, match=r"the backward of kernel .*Toy.* ValueError: no luck"):
        compiled(x, weight).sum().backward()
    fails = False
    assert_gradients(compiled)
    gc.collect()
    assert kept(op) == 0


def test_an_error_in_a_forward_keeps_nothing():
    def fails(self, x):
        y = NormFunction.apply(x, self.eps, self.weight)
        if type(x) is Tensor and x.sum() > 1e6:
            raise ValueError("too much")
        return y

    op = norm(kernel(fails))
    x, weight = inputs()
    with pytest.raises(RuntimeError, match=r"kernel .*Toy.* raised ValueError: too much"):
        call(op, x.detach() + 1e7, weight)
    gc.collect()
    assert kept(op) == 0


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_where_no_gradient_can_flow_nothing_is_kept(quiet):
    op = norm()
    x, weight = inputs()
    with quiet():
        y = call(op, x, weight)
        torch.testing.assert_close(y, Norm()(x))
        assert not y.requires_grad
        assert kept(op) == 0


def test_tensors_of_inference_mode():
    op = norm()
    with torch.inference_mode():
        x, weight = torch.randn(3, 4), torch.ones(4)
    assert call(op, x, weight).shape == (3, 4)
    assert kept(op) == 0


@pytest.mark.parametrize("selective", [False, True])
def test_activation_checkpointing(selective):
    op = norm()

    def policy(ctx: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        ours = "hubkernels" in str(function)
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def run(x: Tensor, weight: Tensor) -> Tensor:
        extra = {}
        if selective:
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            extra["context_fn"] = contexts
        return checkpoint(model(op), x, weight, use_reentrant=False, **extra)

    assert_gradients(torch.compile(run, backend="aot_eager", fullgraph=True))
    assert runs == ["forward"] * (1 if selective else 2) + ["backward"]
    assert kept(op) == 0


def test_checkpointing_around_a_compiled_model():
    op = norm()
    compiled = torch.compile(model(op), backend="aot_eager", fullgraph=True)
    assert_gradients(lambda x, w: checkpoint(compiled, x, w, use_reentrant=False))
    assert kept(op) == 0


def test_a_copy_of_what_autograd_saves_is_an_error_that_says_so():
    op = norm()
    x, weight = inputs()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        y = call(op, x, weight)
    with pytest.raises(RuntimeError, match=r"has copied what autograd saves.*own_backward"):
        y.sum().backward()


def test_no_gradient_of_a_gradient():
    op = norm()
    x, weight = inputs()
    (grad,) = torch.autograd.grad(call(op, x, weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of a gradient"):
        grad.sum().backward()


# --- what a kernel's backward may do ------------------------------------------------------------


def test_a_backward_that_writes_into_what_it_gets():
    class Spoils(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            own = x * 2
            y = x.square()
            ctx.save_for_backward(x, own, y)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            x, own, y = ctx.saved_tensors
            made = own.mul_(grad)
            x.zero_()
            y.zero_()
            grad.zero_()
            return made

    layer = type("Layer", (nn.Module,), {"forward": lambda self, x: x.square()})
    x = torch.randn(3, 4, requires_grad=True)
    operand, result = Source(SourceKind.OPERAND, 0), Source(SourceKind.RESULT, 0)
    overwrites = Overwrites((0,), (operand, result), True)
    own = OwnBackward((operand, result), (True,), overwrites=overwrites)
    op = lowered(layer(), kernel(lambda self, x: Spoils.apply(x)), x, own=own)
    before = x.detach().clone()
    y = op()
    after, grad = y.detach().clone(), torch.randn(3, 4)
    given = grad.clone()
    for _ in range(2):
        (made,) = torch.autograd.grad(y, x, given, retain_graph=True)
        torch.testing.assert_close(made, 2 * before * grad)
    assert torch.equal(x, before)
    assert torch.equal(y, after)
    assert torch.equal(given, grad)


def test_a_kernel_that_keeps_tensors_where_nobody_sees_it():
    class Holds(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.x = x
            ctx.y = x.exp()
            return ctx.y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.y + 0 * ctx.x

    layer = type("Layer", (nn.Module,), {"forward": lambda self, x: x.exp()})
    x = torch.randn(3, 4, requires_grad=True)
    op = lowered(
        layer(), kernel(lambda self, x: Holds.apply(x)), x, own=own_backward((), (), (True,), True)
    )
    y = op()
    expected = y.detach().clone()
    y.detach().zero_()  # as a compiler that is done with it may
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


def test_what_a_kernel_saves_beyond_what_it_showed_is_copied():
    op = norm(own=own_backward((), (), (True,)))
    x, weight = torch.randn(3, 4), torch.linspace(0.5, 1.5, 4)
    expected = torch.autograd.grad(Norm()(x.requires_grad_()).sum(), x, retain_graph=False)[0]
    given = x.detach().clone().requires_grad_()
    y = call(op, given, weight)
    given.data.zero_()
    y.data.zero_()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), given)[0], expected)


def test_gradients_come_contiguous_and_go_in_the_operands_form():
    class Raw(torch.autograd.Function):
        """Takes the gradient's memory for contiguous."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            assert grad.is_contiguous()
            return (grad * 2).t().contiguous().t()

    layer = type("Layer", (nn.Module,), {"forward": lambda self, x: x * 2})
    x = torch.randn(3, 4, requires_grad=True)
    op = lowered(
        layer(), kernel(lambda self, x: Raw.apply(x)), x, own=own_backward((), (), (True,))
    )
    (grad,) = torch.autograd.grad(op().sum(), x)
    assert grad.is_contiguous()
    assert torch.equal(grad, torch.full_like(x, 2.0))


def test_a_result_that_lost_its_gradient_is_an_error():
    def sometimes(self, x):
        y = x * self.weight + self.eps
        return y.detach() if not isinstance(x, FakeTensor) and lost else y

    lost = True
    op = norm(kernel(sometimes), own=own_backward((0, 1), (), (True,)))
    with pytest.raises(RuntimeError, match="result 0 has no gradient"):
        op()


# --- past autograd --------------------------------------------------------------------------------


@torch.library.custom_op("training_test::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


@scaled.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward_of_scaled(ctx: Any, grad: Tensor) -> Any:
    x, weight = ctx.saved_tensors
    return grad * weight, (grad * x).sum(0)


scaled.register_autograd(backward_of_scaled, setup_context=save_inputs)


class Split(torch.autograd.Function):
    """Its forward gets no context."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    setup_context = staticmethod(save_inputs)
    backward = staticmethod(backward_of_scaled)


class Views(torch.autograd.Function):
    """Saves parts of its operands and result in other shapes; its gradient is to be summed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        y = x * weight
        ctx.save_for_backward(x.view(-1, 2, 2), weight[:2], weight[2:], y.flatten())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, low, high, y = ctx.saved_tensors
        weight = torch.cat([low, high])
        assert torch.equal(y.view_as(grad), x.view_as(grad) * weight)
        return grad * x.view_as(grad), grad * weight


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


DIRECT = {
    "op": (lambda self, x: scaled(x, self.weight), ()),
    "split": (lambda self, x: Split.apply(x, self.weight), ()),
    "views": (lambda self, x: Views.apply(self.weight, x), (0,)),
}


def tapes_of(op: Op) -> list[type]:
    body = registry._bodies[op.lowered.name]
    assert isinstance(body, ByKernel)
    return [type(tape) for tape, _ in body.tapes._kept.values()]


@pytest.mark.parametrize("name", DIRECT)
def test_a_function_runs_past_autograd_from_its_second_call_on(name):
    forward, results = DIRECT[name]
    op = lowered(
        Scaled(), kernel(forward), torch.ones(3, 4), own=own_backward((0, 1), results, (True,))
    )
    for expected in (Tape, BypassedCall, BypassedCall):
        x, weight = inputs()
        y = op.overload(x, weight)[0]
        assert tapes_of(op) == [expected]
        made = torch.autograd.grad(y.square().sum(), (x, weight))
        wanted = torch.autograd.grad((x * weight).square().sum(), (x, weight))
        torch.testing.assert_close(made, wanted)
        del y
    x, weight = inputs(5, 4)  # other sizes are told anew
    y = op.overload(x, weight)[0]
    assert tapes_of(op) == [Tape]
    del y


@pytest.mark.parametrize("change", ["argument", "result", "saved", "twice", "error"])
def test_a_call_that_is_not_as_the_first_goes_the_long_way(change):
    """Whatever a kernel makes depend on values, its gradient is right."""

    class Scales(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            y = x * weight
            other = changed and change == "saved"
            ctx.save_for_backward(x.clone() if other else x, weight)
            if changed and change == "error":
                ctx.mark_dirty()
            return y

        backward = staticmethod(backward_of_scaled)

    def forward(self, x):
        if changed and change == "argument":
            return Scales.apply(x * 2, self.weight)
        y = Scales.apply(x, self.weight)
        if changed and change == "result":
            return y * 2
        if changed and change == "twice":
            return Scales.apply(x, self.weight)
        return y

    op = lowered(Scaled(), kernel(forward), torch.ones(3, 4), own=own_backward((0, 1), (), (True,)))
    changed = False
    x, weight = inputs()
    for _ in range(2):
        op.overload(x, weight)
    changed = True
    factor = 2 if change in ("argument", "result") else 1
    for _ in range(3):
        y = op.overload(x, weight)[0]
        assert tapes_of(op) == [Tape]
        made = torch.autograd.grad(y.square().sum(), (x, weight))
        expected = torch.autograd.grad((x * weight * factor).square().sum(), (x, weight))
        torch.testing.assert_close(made, expected)
        del y


class Conjugates(torch.autograd.Function):
    """Of ``x * weight``; what it returns is yet to be conjugated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x * weight).conj()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad.conj() * weight.conj(), (grad.conj() * x.conj()).sum(0)


class Signs(torch.autograd.Function):
    """Of ``x * weight``; what it returns is yet to be negated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.complex(x, x * weight).conj().imag

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return -grad * weight, -(grad * x).sum(0)


@pytest.mark.parametrize("function", [Conjugates, Signs])
def test_results_whose_signs_are_yet_to_be_put_into_their_memory(function):
    class Signed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            dtype = torch.complex64 if function is Conjugates else torch.float32
            self.weight = nn.Parameter(torch.full((1,), 1.5, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight
            return y.conj_physical() if x.is_complex() else -y

    module = Signed()
    x = torch.randn(1, 1, dtype=module.weight.dtype, requires_grad=True)
    forward = kernel(lambda self, x: function.apply(x, self.weight))
    op = lowered(module, forward, x, own=own_backward((0, 1), (), (True,)))
    for _ in range(3):
        y, expected = op.overload(x, module.weight)[0], module(x)
        assert not y.is_conj()
        assert not y.is_neg()
        torch.testing.assert_close(y, expected)
        wanted = (x, module.weight)
        made = torch.autograd.grad(y.abs().sum(), wanted)
        torch.testing.assert_close(made, torch.autograd.grad(expected.abs().sum(), wanted))


class Twice(torch.autograd.Function):
    """``x * weight``, and a part of that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        y = x * weight
        return y, y[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_part: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = torch.cat([grad[:1], grad[1:] + of_part])
        return grad * weight, (grad * x).sum(0)


def test_results_of_a_function_that_share_memory():
    class Parted(Scaled):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.weight, x[1:] * self.weight

    module, x = Parted(), torch.randn(3, 4, requires_grad=True)
    forward = kernel(lambda self, x: Twice.apply(x, self.weight))
    op = lowered(module, forward, x, own=own_backward((0, 1), (), (True, True)))
    for _ in range(3):
        whole, part = op.overload(x, module.weight)[:2]
        expected = module(x)
        torch.testing.assert_close((whole, part), expected)
        wanted = (x, module.weight)
        made = torch.autograd.grad(whole.sum() + part.square().sum(), wanted)
        summed = expected[0].sum() + expected[1].square().sum()
        torch.testing.assert_close(made, torch.autograd.grad(summed, wanted))
        before = part.clone()
        whole.data.fill_(99)
        assert torch.equal(part, before)


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
    op = lowered(module, kernel(forward), x, training=True, own=own)
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
def test_one_tensor_that_autograd_tells_apart(how, stopped):
    """In a compiled graph ``x`` and ``x.detach()`` are the same tensor."""
    forward, own = PRODUCTS[how]
    module, split = Product(), SPLITS[stopped]
    x = torch.randn(3, requires_grad=True)
    op = lowered(module, kernel(forward), *split(x), training=True, own=own)

    def total(product: Any, x: Tensor) -> Tensor:
        return product(*split(x.sin())).square().sum()

    compiled = torch.compile(total, backend="inductor", fullgraph=True)
    for _ in range(2):
        made = torch.autograd.grad(compiled(op, x), x)
        torch.testing.assert_close(made, torch.autograd.grad(total(module, x), x))


def test_conjugates_are_saved_as_such():
    """In the same memory as an operand, and not the same numbers."""

    class Conjugated(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.conj_physical() * y

    x, y = (torch.randn(3, dtype=torch.complex64, requires_grad=True) for _ in range(2))
    forward = kernel(lambda self, x, y: x.conj() * y)
    op = lowered(Conjugated(), forward, x, y, own=own_backward((0, 1), (), (True,)))
    for _ in range(2):
        made = torch.autograd.grad(op.overload(x, y)[0].abs().sum(), (x, y))
        expected = torch.autograd.grad((x.conj() * y).abs().sum(), (x, y))
        torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_an_operand_that_is_given_back(backend):
    class Residual(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x

    own = own_backward((), (), (True, True))
    op = lowered(Residual(), kernel(lambda self, x: (x * 2, x)), torch.ones(3), own=own)

    def run(x: Tensor) -> Tensor:
        doubled, same = op.overload(x.sin())[:2]
        return doubled.square() + same

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    x = torch.randn(3, requires_grad=True)
    (made,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad((4 * x.sin().square() + x.sin()).sum(), x)
    torch.testing.assert_close(made, expected)


def test_a_function_that_is_caught_is_nobody_elses_business():
    op = norm()
    for _ in range(2):
        op()
    x, weight = inputs()
    made = torch.autograd.grad(NormFunction.apply(x, 0.25, weight).sum(), (x, weight))
    expected = torch.autograd.grad(call(op, x, weight).sum(), (x, weight))
    torch.testing.assert_close(made, expected)

    class Derived(NormFunction):
        pass

    assert Derived.apply(x, 0.25, weight).grad_fn is not None
    assert intercept_apply(Split)
    expected = torch.autograd.grad((x * weight).sum(), (x, weight))
    for run in (Split.apply, lambda x, weight: Split.apply(x, weight)):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        made = torch.autograd.grad(compiled(x, weight).sum(), (x, weight))
        torch.testing.assert_close(made, expected)


def test_a_result_without_a_gradient_counts_as_zeros():
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            return x * 2, x * 3

        @staticmethod
        def backward(ctx: Any, double: Tensor, triple: Tensor) -> Tensor:
            return double * 2 + triple * 3

    layer = type("Layer", (nn.Module,), {"forward": lambda self, x: (x * 2, x * 3)})
    x = torch.randn(3, 4, requires_grad=True)
    own = own_backward((), (), (True, True))
    op = lowered(layer(), kernel(lambda self, x: Both.apply(x)), x, own=own)
    for _ in range(2):
        double, triple = op()
        (grad,) = torch.autograd.grad(triple.sum(), x, retain_graph=True)
        assert torch.equal(grad, torch.full_like(x, 3.0))
        (grad,) = torch.autograd.grad(double.sum() + triple.sum(), x)
        assert torch.equal(grad, torch.full_like(x, 5.0))


# --- nothing is left ----------------------------------------------------------------------------


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(o, Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("toy", KERNELS)
def test_no_leak_over_many_steps(toy):
    """Of 10 000 steps some run no backward, some two, some fail."""
    op = norm(KERNELS[toy])
    x, weight = inputs()

    def step(number: int) -> None:
        loss = call(op, x, weight).sum()
        if number % 3 == 0:
            return
        loss.backward(retain_graph=number % 5 == 0)
        if number % 5 == 0:
            loss.backward()

    for number in range(30):
        step(number)
    before = live_tensors()
    for number in range(10_000):
        step(number)
    assert kept(op) == 0
    assert live_tensors() <= before
    runs.clear()


def test_no_leak_in_a_compiled_model():
    op = norm()
    compiled = torch.compile(model(op), fullgraph=True)
    x, weight = inputs()
    before = 0
    for number in range(1000):
        loss = compiled(x, weight).sum()
        if number % 3:
            loss.backward()
        if number == 10:
            del loss
            before = live_tensors()
    del loss
    assert kept(op) == 0
    assert live_tensors() <= before


@pytest.mark.parametrize("own", [OWN, None])
def test_ops_hold_to_what_torch_asks_of_them(own):
    op = lowered(Norm(), NormKernel, torch.randn(3, 4), training=True, own=own)
    given = [o.detach().requires_grad_() if isinstance(o, Tensor) else o for o in op.operands]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.overload, given, test_utils=(*tests, "test_aot_dispatch_dynamic"))
    results = op.overload(*given)
    results = [results] if isinstance(results, Tensor) else [*results]
    x, weight, eps = (o.detach() if isinstance(o, Tensor) else o for o in given)
    backward = getattr(torch.ops.hubkernels, op.lowered.name.replace("_training", "_backward"))
    grad, needs = torch.randn(3, 4), [True, True, False]
    if own is None:
        torch.library.opcheck(backward.default, (grad, [x, weight], eps, needs))
    else:
        saved = [results[1], x, weight, results[0].detach()]
        arguments = (grad, saved, [3, 4, 4], needs)
        # The other checks give it copies, which a handle cannot be.
        check = "test_autograd_registration"
        torch.library.opcheck(backward.default, arguments, test_utils=check)
        real = backward(*arguments)
        with FakeTensorMode() as mode:
            fakes = pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
            fake = backward(*fakes)
        assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]
