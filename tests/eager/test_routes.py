"""Routes of eager training calls: the kernel, the recomputed gradient, or the reference."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import kernelize, last_report, use_kernel_forward_from_hub
from kernelgraph.report import Reason
from tests.support.toys import Plus10, Scale, only
from tests.support.training_kernels import (
    TRAINING,
    WIDTH,
    Correct,
    Detached,
    Gate,
    Numpy,
    Plain,
    Zero,
    assert_trains_like_the_reference,
    by_name,
    calls,
    gradients,
    inputs,
    kernel_of,
    kernelize_on_cpu,
    kernelized,
    square,
)

# --- a kernel whose backward is right ------------------------------------------------------------


class TestCorrectBackward:
    def test_kernel_runs_once_forward_and_once_backward(self) -> None:
        layer, (x, y) = kernelized(kernel_of(Correct)), inputs()
        gradients(layer, x, y)
        calls.clear()
        for _ in range(3):
            gradients(layer, x, y)
        assert calls == ["forward", "backward"] * 3

    def test_kernel_is_called_as_it_is(self) -> None:
        layer, (x, y) = kernelized(kernel_of(Correct)), inputs()
        for _ in range(2):
            assert type(layer(x, y).grad_fn).__name__ == "CorrectBackward"
        assert type(kernelized(Plain)(x, y).grad_fn).__name__ == "AddBackward0"

    def test_nothing_is_warned_of(self, warnings: Callable[[], list[str]]) -> None:
        gradients(kernelized(kernel_of(Correct)), *inputs())
        assert warnings() == []
        assert last_report().decisions[0].gradient == "kernel"
        assert last_report().decisions[0].uses_kernel


# --- a kernel whose gradient or output is wrong --------------------------------------------------


@use_kernel_forward_from_hub("Gate")
class Counted(Gate):
    """A layer that counts its own forwards."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        counts["reference"] += 1
        return torch.tanh(x) * self.weight + y


counts: Any = {"reference": 0, "kernel": 0}


class CountedZero(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        counts["kernel"] += 1
        return Zero.apply(x, self.weight, y)


class TestWrongGradient:
    def counted(self, **options: Any) -> dict[str, int]:
        layer, (x, y) = kernelized(CountedZero, Counted(), **options), inputs()
        gradients(layer, x, y)
        global counts
        plain, counts = counts, UserDict(reference=0, kernel=0)  # a dict would be set back
        try:
            gradients(layer, x, y)
            return dict(counts)
        finally:
            counts = plain

    def test_recompute_runs_the_kernel_and_for_the_gradient_the_reference(self) -> None:
        assert self.counted() == {"reference": 1, "kernel": 1}

    def test_reference_runs_no_kernel(self) -> None:
        assert self.counted(wrong_gradient="reference") == {"reference": 1, "kernel": 0}

    def test_a_wrong_gradient_is_used_where_gradients_are_not_verified(self) -> None:
        assert self.counted(verify_gradients=False) == {"reference": 0, "kernel": 1}
        made = gradients(kernelized(CountedZero, verify_gradients=False), *inputs())
        assert all(not gradient.any() for gradient in made)

    @by_name("kernel", [Detached, Numpy])
    def test_a_missing_gradient_is_replaced_even_where_gradients_are_not_verified(
        self, kernel: Any
    ) -> None:
        assert_trains_like_the_reference(kernel, *inputs(), verify_gradients=False)

    def test_a_double_backward_is_that_of_the_reference(self) -> None:
        layer = kernelized(Detached)
        x, y = (v.detach().double().requires_grad_() for v in inputs())
        layer.double()
        assert torch.autograd.gradcheck(layer, (x, y))
        assert torch.autograd.gradgradcheck(layer, (x, y))
        assert torch.autograd.gradgradcheck(lambda x: layer(x, x * x), (x,))

    def test_results_without_a_gradient_in_the_reference_have_none(self) -> None:
        @use_kernel_forward_from_hub("Gate")
        class Still(Gate):
            def forward(self, x: Tensor, y: Tensor) -> Any:
                return torch.tanh(x) * self.weight + y, x.argmax(-1), y.detach()

        class Kernel(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Any:
                return Detached.forward(self, x, y), x.argmax(-1), y.detach()

        layer, (x, y) = kernelized(Kernel, Still()), inputs()
        for _ in range(2):
            first, indices, last = layer(x, y)
            assert (first.requires_grad, indices.requires_grad, last.requires_grad) == (
                True,
                False,
                False,
            )
            assert indices.dtype == torch.int64

    def test_a_kernel_that_returns_its_input_gives_a_tensor_of_its_own(self) -> None:
        @use_kernel_forward_from_hub("Gate")
        class Same(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return x * 1

        class Kernel(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return x.detach()

        x, y = inputs()
        layer = kernelize_on_cpu(Kernel, Same())
        used = x * 1
        for _ in range(2):
            output = layer(used, y)
            output.mul_(2)
            assert not torch.equal(output, used)
        assert torch.equal(torch.autograd.grad(output.sum(), x)[0], torch.full_like(x, 2))


class TestWrongOutput:
    def test_a_kernel_with_a_wrong_output_does_not_train(
        self, warnings: Callable[[], list[str]]
    ) -> None:
        with only(Scale=Plus10):
            layer = kernelize(Scale(2.0), mode=TRAINING)
        x = torch.ones((), requires_grad=True)
        for _ in range(2):
            assert layer(x) == 2
        with torch.no_grad():
            assert layer(x) == 12
        with torch.inference_mode():
            assert layer(torch.ones(())) == 12
        layer.requires_grad_(False)
        assert layer(x.detach()) == 12
        (decision,) = last_report().decisions
        assert (decision.reason, decision.kernel, decision.gradient) == (Reason.WRONG, "", "")
        assert decision.detail.startswith("tests@")
        assert ": Plus10: it is off by" in decision.detail
        (message,) = warnings()
        assert message.endswith("; where a gradient is wanted, the layer runs on its own forward")

    def test_a_wrong_output_is_used_where_gradients_are_not_verified(self) -> None:
        with only(Scale=Plus10):
            layer = kernelize(Scale(2.0), mode=TRAINING, verify_gradients=False)
        assert layer(torch.ones((), requires_grad=True)) == 12


# --- calls of every kind -------------------------------------------------------------------------


@dataclasses.dataclass
class Both:
    first: Tensor
    second: Any = None


@use_kernel_forward_from_hub("Gate")
class Nested(nn.Module):
    """Takes and returns tensors in containers, and has some in submodules and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.more = [torch.ones(WIDTH, requires_grad=True)]
        self.scale = 2.0

    def forward(self, parts: Any, *, both: Any = None, index: Any = None, add: float = 0.0) -> Any:
        first = self.inner(parts["x"][0]) * self.more[0] * self.scale + add
        if both is not None:
            first = first + both.first
        if index is not None:
            first = first[index]
        return Both(first, {"square": [first * first, None], "count": 3})


class NestedDetached(nn.Module):
    def forward(self, parts: Any, *, both: Any = None, index: Any = None, add: float = 0.0) -> Any:
        x, weight = parts["x"][0].detach(), self.inner.weight.detach()
        first = (x @ weight.t() + self.inner.bias.detach()) * self.more[0].detach()
        first = first * self.scale + add
        if both is not None:
            first = first + both.first.detach()
        if index is not None:
            first = first[index]
        return Both(first, {"square": [first * first, None], "count": 3})


class TestCallsOfEveryKind:
    def gradients(self, layer: Any, **kwargs: Any) -> list[Any]:
        x = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH).requires_grad_()
        output = layer({"x": (x, None)}, **kwargs)
        assert type(output) is Both
        assert output.second["count"] == 3
        square, nothing = output.second["square"]
        assert nothing is None
        loss = output.first.sum() + square.sum()
        held = [x, layer.more[0], *layer.parameters()]
        held += [v.first for v in kwargs.values() if type(v) is Both]
        return list(torch.autograd.grad(loss, held, allow_unused=True))

    def test_calls_with_containers(self) -> None:
        reference = Nested()
        layer = kernelized(NestedDetached, copy.deepcopy(reference))
        index = torch.tensor([2, 0])
        for kwargs in [
            {},
            {"add": 1.5},
            {"add": 2},
            {"both": Both(torch.ones(3, WIDTH, requires_grad=True))},
            {"index": index},
            {"index": index, "add": 1.5},
        ]:
            for _ in range(2):
                made, wanted = (self.gradients(one, **kwargs) for one in (layer, reference))
                torch.testing.assert_close(made, wanted)
        assert last_report().decisions[0].gradient.startswith("reference: it has no backward")

    def test_calls_after_the_layer_has_changed(self) -> None:
        reference = Nested()
        layer = kernelized(NestedDetached, copy.deepcopy(reference))
        for change in [
            lambda one: setattr(one, "scale", 3.0),
            lambda one: one.inner.weight.requires_grad_(False),
            lambda one: one.inner.weight.requires_grad_(True),
            lambda one: setattr(one, "more", [torch.full((WIDTH,), 2.0, requires_grad=True)]),
            lambda one: one.inner.weight.data.mul_(2),
            lambda one: setattr(one.inner, "weight", nn.Parameter(torch.ones(WIDTH, WIDTH))),
            lambda one: one.eval(),
            lambda one: one.double(),
            lambda one: one.float(),
        ]:
            self.gradients_or_none(layer)
            for one in (layer, reference):
                change(one)
            made, wanted = self.gradients_or_none(layer), self.gradients_or_none(reference)
            torch.testing.assert_close(made, wanted)

    def gradients_or_none(self, layer: Any) -> list[Any]:
        x = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH).to(layer.inner.bias.dtype)
        x.requires_grad_()
        output = layer({"x": (x, None)})
        held = [v for v in (x, layer.more[0], *layer.parameters()) if v.requires_grad]
        return list(torch.autograd.grad(output.first.square().sum(), held))

    def test_calls_of_layers_with_other_attributes(self) -> None:
        # Its kernel is right with one attribute, and wrong with another.
        @use_kernel_forward_from_hub("Gate")
        class Turned(nn.Module):
            def __init__(self, by: str, factor: float) -> None:
                super().__init__()
                self.by, self.factor = by, factor
                self.weight = nn.Parameter(torch.ones(WIDTH)) if by == "weight" else None

            def forward(self, x: Tensor) -> Tensor:
                made = x * self.factor if self.by == "factor" else x.sin()
                return made if self.weight is None else made * self.weight

        class Kernel(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                made = x * self.factor if self.by == "factor" else x.sin()
                if self.weight is not None:
                    return (made * self.weight).detach()
                return made if self.by == "factor" else made.detach()

        pairs = [("factor", 2.0), ("sin", 2.0), ("weight", 3.0), ("factor", 5.0), ("sin", 3.0)]
        model = nn.ModuleList(Turned(*pair) for pair in pairs)
        with only(Gate=Kernel):
            kernelize(model, mode=TRAINING)
        x = torch.randn(3, WIDTH, requires_grad=True)
        for layer in [*model, *model]:
            made = torch.autograd.grad(layer(x).sum(), x)
            torch.testing.assert_close(made, torch.autograd.grad(Turned.forward(layer, x).sum(), x))
        sources = [d.gradient.partition(":")[0] for d in last_report().decisions]
        assert sources == ["kernel", "reference", "reference", "kernel", "reference"]

    def test_calls_without_gradients_go_to_the_kernel(self) -> None:
        layer, (x, y) = kernelized(CountedZero, Counted()), inputs()
        for name in counts:
            counts[name] = 0
        with torch.no_grad():
            layer(x, y)
        with torch.inference_mode():
            layer(x, y)
        layer.requires_grad_(False)
        layer(x.detach(), y.detach())
        assert counts == {"reference": 0, "kernel": 3}
        assert last_report().decisions[0].gradient == ""

    def test_calls_in_transforms_of_torch_func_go_to_the_reference(self) -> None:
        layer, (x, y) = kernelized(Detached), inputs()
        wanted = gradients(Gate(), x, y)
        made = torch.func.grad(lambda x: square(layer(x, y)))(x)
        torch.testing.assert_close(made, wanted[0])
        for one in (layer, Gate()):
            _, tangent = torch.func.jvp(lambda x, one=one: one(x, y), (x,), (torch.ones_like(x),))
            torch.testing.assert_close(tangent, (1 - x.tanh() ** 2) * one.weight)
        weights = dict(layer.named_parameters())
        made = torch.func.grad(
            lambda weights: square(torch.func.functional_call(layer, weights, (x, y)))
        )(weights)
        torch.testing.assert_close(made["weight"], wanted[2])

    def test_calls_with_weights_from_elsewhere(self) -> None:
        layer, (x, y) = kernelized(Detached), inputs()
        for _ in range(2):
            weight = torch.full((WIDTH,), 3.0, requires_grad=True)
            output = torch.func.functional_call(layer, {"weight": weight}, (x, y))
            torch.testing.assert_close(output, torch.tanh(x) * 3 + y)
            (made,) = torch.autograd.grad(output.sum(), weight)
            torch.testing.assert_close(made, torch.tanh(x).sum(0))

    def test_calls_with_one_tensor_twice(self) -> None:
        layer, (x, _) = kernelized(Detached), inputs()
        for _ in range(2):
            made = torch.autograd.grad(square(layer(x, x)), x)
            torch.testing.assert_close(made, torch.autograd.grad(square(Gate()(x, x)), x))


# --- calls that cannot be verified ---------------------------------------------------------------


class Odd:
    """Holds a tensor where it cannot be an operand."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@use_kernel_forward_from_hub("Gate")
class TakesOdd(nn.Module):
    def forward(self, odd: Any) -> Tensor:
        return odd.tensor.sin()


class OddDetached(nn.Module):
    def forward(self, odd: Any) -> Tensor:
        return odd.tensor.detach().sin()


@use_kernel_forward_from_hub("Gate")
class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.steps = nn.Parameter(torch.ones(WIDTH)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x * self.weight


class CountsDetached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return (x * self.weight).detach()


@use_kernel_forward_from_hub("Gate")
class Averages(nn.Module):
    """Writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return x * self.weight


class AveragesDetached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return (x * self.weight).detach()


@use_kernel_forward_from_hub("Gate")
class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


class DropsDetached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.detach(), 0.5, self.training)


class TestUnverifiableCalls:
    @pytest.mark.parametrize(
        ("layer", "kernel", "words"),
        [
            (TakesOdd, OddDetached, "its gradient cannot be verified: a Odd is passed"),
            (
                Counts,
                CountsDetached,
                "its gradient cannot be verified: Counts.forward sets self.st",
            ),
            (Averages, AveragesDetached, "the layer changes self.mean"),
            (Drops, DropsDetached, "the layer draws random numbers"),
        ],
    )
    def test_an_unverifiable_call_keeps_the_reference(
        self, layer: Any, kernel: Any, words: str, warnings: Callable[[], list[str]]
    ) -> None:
        made, reference = kernelize_on_cpu(kernel, layer()), layer()
        for _ in range(3):
            found = []
            for one in (made, reference):
                torch.manual_seed(1)
                x = torch.randn(3, WIDTH, requires_grad=True)
                output = one(Odd(x) if layer is TakesOdd else x)
                found.append([output, *torch.autograd.grad(square(output), x)])
            torch.testing.assert_close(*found)
        torch.testing.assert_close(made.state_dict(), reference.state_dict())
        assert vars(made).get("steps") == vars(reference).get("steps")
        (decision,) = last_report().decisions
        assert decision.reason is Reason.UNSUITED
        (message,) = warnings()
        assert words in decision.detail
        assert words in message
        assert message.endswith("; where a gradient is wanted, the layer runs on its own forward")

    def test_an_unverifiable_call_without_gradients_runs_the_kernel(self) -> None:
        made = kernelize_on_cpu(CountsDetached, Counts())
        made.requires_grad_(False)
        assert made(torch.ones(WIDTH)).grad_fn is None
        assert last_report().decisions[0].uses_kernel


# --- errors --------------------------------------------------------------------------------------


class Fails(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if failing["forward"]:
            raise ArithmeticError("the kernel fails")
        return Detached.forward(self, x, y)


class FailsBackward(Correct):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if failing["backward"]:
            raise ArithmeticError("the backward fails")
        return Correct.backward(ctx, grad)


failing = {"forward": False, "backward": False}


class TestErrors:
    @pytest.mark.parametrize("where", ["forward", "backward"])
    def test_an_error_does_not_break_later_calls(
        self, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer = kernelized(Fails if where == "forward" else kernel_of(FailsBackward))
        x, y = inputs()
        gradients(layer, x, y)
        for _ in range(2):
            with monkeypatch.context() as patched:
                patched.setitem(failing, where, True)
                with pytest.raises(ArithmeticError, match=r"^the (kernel|backward) fails$"):
                    gradients(layer, x, y)
            torch.testing.assert_close(gradients(layer, x, y), gradients(Gate(), x, y))

    def test_an_error_of_the_first_call_is_raised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class First(Fails):
            pass

        layer, (x, y) = kernelized(First), inputs()
        with monkeypatch.context() as patched:
            patched.setitem(failing, "forward", True)
            with pytest.raises(ArithmeticError, match="the kernel fails"):
                gradients(layer, x, y)

    def test_a_kernel_that_returns_another_number_of_tensors_is_not_used(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Any:
                made = Detached.forward(self, x, y)
                return made, made

        layer, (x, y) = kernelized(Two, verify_gradients=False), inputs()
        for _ in range(2):
            torch.testing.assert_close(layer(x, y), Gate()(x, y))
        assert "the kernel returns a tuple, and the layer a" in last_report().decisions[0].detail

    def test_a_kernel_that_writes_into_its_operands_unexpectedly_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Writes(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                if failing["forward"]:
                    y.mul_(2)
                return Detached.forward(self, x, y)

        layer, (x, y) = kernelized(Writes), inputs()
        gradients(layer, x, y)
        monkeypatch.setitem(failing, "forward", True)
        message = r"Writes wrote into its operands, which it did not do in its trial run$"
        with pytest.raises(RuntimeError, match=message):
            layer(x, y)
