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

from kernelgraph.graph.gradients.gradient import Overwrites, OwnBackward, Source, SourceKind
from tests.support.norm_op import (
    KERNELS,
    OWN,
    Norm,
    NormFunction,
    NormKernel,
    assert_gradients,
    call,
    inputs,
    model,
    norm,
    reference,
    runs,
    waiting,
)
from tests.support.op_calls import lowered, own_backward
from tests.support.op_toys import hub_layer

# --- one forward and one backward -----------------------------------------------------------------


@pytest.mark.parametrize("toy", KERNELS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_backward_is_the_kernels_own(toy, backend):
    op = norm(KERNELS[toy])
    assert_gradients(torch.compile(model(op), backend=backend, fullgraph=True))
    assert runs == (["forward", "backward"] if toy == "function" else ["forward"])
    assert waiting(op) == 0


@pytest.mark.parametrize("shapes", [[(3, 4), (5, 4), (2, 3, 4)]])
def test_gradients_are_right_at_any_sizes(shapes):
    for shape in shapes:
        op = norm(x=torch.randn(shape))
        compiled = torch.compile(model(op), backend="aot_eager", fullgraph=True, dynamic=True)
        assert_gradients(compiled, *shape)
        assert_gradients(compiled, *(n + 2 for n in shape[:-1]), 4)
    assert "reference" not in runs


def test_saved_tensors_survive_the_reuse_of_their_memory():
    """A compiler reuses memory after its last use, also that of tensors that a kernel saved."""

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


def test_only_needed_gradients_are_computed():
    op = norm()
    x, weight = inputs()
    (grad,) = torch.autograd.grad(call(op, x, weight).sum(), weight)
    scale = (x.square().mean(-1, keepdim=True) + 0.25).rsqrt()
    torch.testing.assert_close(grad, (x * scale).sum(0).detach())
    assert x.grad is None


def test_frozen_operand_makes_another_op_without_its_gradient():
    wanted: list[Any] = []

    class Watched(NormFunction):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            wanted.append(ctx.needs_input_grad)
            return NormFunction.backward(ctx, grad)

    toy = hub_layer(lambda self, x: Watched.apply(x, self.eps, self.weight))
    x, weight = inputs()
    module = Norm()
    module.weight.requires_grad_(False)
    frozen = lowered(module, toy, x, own=OWN, every=False)
    y = frozen.overload(x, weight.detach(), 0.25)[0]
    y.sum().backward()
    assert wanted == [(True, False, False)]
    with pytest.raises(RuntimeError, match="no gradient of its operand weight"):
        frozen.overload(x, weight, 0.25)


def test_result_that_no_gradient_flows_through_requires_none():
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
    toy = hub_layer(lambda self, x: Both.apply(x))
    op = lowered(layer(), toy, x, own=own_backward(flows=(True, False)))
    y, index = op()
    assert (y.requires_grad, index.requires_grad) == (True, False)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 2.0))


# --- other steps than one forward and one backward ------------------------------------------------


@pytest.mark.parametrize("toy", KERNELS)
def test_retained_graph_runs_two_backwards(toy):
    op = norm(KERNELS[toy])
    x, weight = inputs()
    y = model(op)(x, weight).square().sum()
    first = torch.autograd.grad(y, (x, weight), retain_graph=True)
    assert waiting(op) == 1
    second = torch.autograd.grad(y, (x, weight))
    torch.testing.assert_close(first, second)
    assert runs.count("forward") == 1
    del y
    assert waiting(op) == 0


def test_retained_graph_of_a_compiled_model_runs_two_backwards():
    op = norm()
    with torch._functorch.config.patch(donated_buffer=False):
        compiled = torch.compile(model(op), fullgraph=True)
        x, weight = inputs()
        y = compiled(x, weight).square().sum()
        first = torch.autograd.grad(y, (x, weight), retain_graph=True)
        second = torch.autograd.grad(y, (x, weight))
    torch.testing.assert_close(first, second)
    assert runs == ["forward", "backward", "backward"]


def test_gradients_accumulate_over_waiting_forwards():
    op = norm()
    compiled = torch.compile(model(op), backend="aot_eager", fullgraph=True)
    weight = inputs()[1]
    batches = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    losses = [compiled(x, weight).square().sum() for x in batches]
    assert waiting(op) == 3
    for loss in reversed(losses):
        loss.backward()
    expected = torch.autograd.grad(
        sum(reference(x, weight).square().sum() for x in batches), weight
    )
    torch.testing.assert_close(weight.grad, expected[0])
    del losses, loss
    assert waiting(op) == 0


def test_equal_calls_in_one_graph_have_right_gradients():
    """A compiler may merge two equal calls into one."""
    op = norm()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return call(op, x, weight).sin() + call(op, x, weight).cos()

    x, weight = inputs()
    made = torch.autograd.grad(torch.compile(run)(x, weight).sum(), (x, weight))
    expected = torch.autograd.grad(run(x, weight).sum(), (x, weight))
    torch.testing.assert_close(made, expected)


def test_error_in_a_backward_leaves_the_next_step_intact():
    class Fails(NormFunction):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            if fails:
                raise ValueError("no luck")
            return NormFunction.backward(ctx, grad)

    op = norm(hub_layer(lambda self, x: Fails.apply(x, self.eps, self.weight)))
    compiled = torch.compile(model(op), backend="aot_eager", fullgraph=True)
    fails = True
    x, weight = inputs()
    with pytest.raises(RuntimeError, match=r"the backward of kernel .*Toy.* ValueError: no luck"):
        compiled(x, weight).sum().backward()
    fails = False
    assert_gradients(compiled)
    gc.collect()
    assert waiting(op) == 0


def test_error_in_a_forward_keeps_no_tape():
    def fails(self, x):
        y = NormFunction.apply(x, self.eps, self.weight)
        if type(x) is Tensor and x.sum() > 1e6:
            raise ValueError("too much")
        return y

    op = norm(hub_layer(fails))
    x, weight = inputs()
    with pytest.raises(RuntimeError, match=r"kernel .*Toy.* raised ValueError: too much"):
        call(op, x.detach() + 1e7, weight)
    gc.collect()
    assert waiting(op) == 0


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_call_without_gradients_keeps_no_tape(quiet):
    op = norm()
    x, weight = inputs()
    with quiet():
        y = call(op, x, weight)
        torch.testing.assert_close(y, Norm()(x))
        assert not y.requires_grad
        assert waiting(op) == 0


def test_inference_tensors_keep_no_tape():
    op = norm()
    with torch.inference_mode():
        x, weight = torch.randn(3, 4), torch.ones(4)
    assert call(op, x, weight).shape == (3, 4)
    assert waiting(op) == 0


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_in_a_compiled_model_saves_or_recomputes(selective):
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
    assert waiting(op) == 0


def test_checkpointing_around_a_compiled_model_gives_right_gradients():
    op = norm()
    compiled = torch.compile(model(op), backend="aot_eager", fullgraph=True)
    assert_gradients(lambda x, w: checkpoint(compiled, x, w, use_reentrant=False))
    assert waiting(op) == 0


def test_copy_of_what_autograd_saves_is_an_error_that_says_so():
    op = norm()
    x, weight = inputs()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        y = call(op, x, weight)
    with pytest.raises(RuntimeError, match=r"has copied what autograd saves.*own_backward"):
        y.sum().backward()


def test_gradient_of_a_gradient_is_an_error():
    op = norm()
    x, weight = inputs()
    (grad,) = torch.autograd.grad(call(op, x, weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of a gradient"):
        grad.sum().backward()


# --- what a kernel's backward may do --------------------------------------------------------------


def test_backward_may_write_into_what_it_receives():
    class Overwriting(torch.autograd.Function):
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
    op = lowered(layer(), hub_layer(lambda self, x: Overwriting.apply(x)), x, own=own)
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


def test_kernel_may_keep_tensors_where_no_hook_sees_them():
    class Hiding(torch.autograd.Function):
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
        layer(),
        hub_layer(lambda self, x: Hiding.apply(x)),
        x,
        own=own_backward((), (), (True,), True),
    )
    y = op()
    expected = y.detach().clone()
    y.detach().zero_()  # as a compiler may after the last use
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


def test_tensor_saved_beyond_those_of_the_trial_is_copied():
    op = norm(own=own_backward((), (), (True,)))
    x, weight = torch.randn(3, 4), torch.linspace(0.5, 1.5, 4)
    expected = torch.autograd.grad(Norm()(x.requires_grad_()).sum(), x, retain_graph=False)[0]
    given = x.detach().clone().requires_grad_()
    y = call(op, given, weight)
    given.data.zero_()
    y.data.zero_()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), given)[0], expected)


def test_gradients_are_contiguous_in_both_directions():
    class Raw(torch.autograd.Function):
        """Relies on a contiguous gradient."""

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
        layer(), hub_layer(lambda self, x: Raw.apply(x)), x, own=own_backward((), (), (True,))
    )
    (grad,) = torch.autograd.grad(op().sum(), x)
    assert grad.is_contiguous()
    assert torch.equal(grad, torch.full_like(x, 2.0))


def test_result_that_lost_its_gradient_is_an_error():
    def sometimes(self, x):
        y = x * self.weight + self.eps
        return y.detach() if not isinstance(x, FakeTensor) and lost else y

    lost = True
    op = norm(hub_layer(sometimes), own=own_backward((0, 1), (), (True,)))
    with pytest.raises(RuntimeError, match="result 0 has no gradient"):
        op()


# --- leaks ----------------------------------------------------------------------------------------


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(o, Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("toy", KERNELS)
def test_many_steps_leak_nothing(toy):
    """Some of the 10 000 steps run no backward, and some run two."""
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
    assert waiting(op) == 0
    assert live_tensors() <= before
    runs.clear()


def test_compiled_model_leaks_nothing():
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
    assert waiting(op) == 0
    assert live_tensors() <= before


@pytest.mark.parametrize("own", [OWN, None])
def test_ops_pass_opcheck(own):
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
        # The other checks pass copies, and a copy of a handle is no handle.
        check = "test_autograd_registration"
        torch.library.opcheck(backward.default, arguments, test_utils=check)
        real = backward(*arguments)
        with FakeTensorMode() as mode:
            fakes = pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
            fake = backward(*fakes)
        assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]
