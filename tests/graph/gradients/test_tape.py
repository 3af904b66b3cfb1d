"""Runs of a forward, kept for the kernel's own backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph.graph.calls.runner import Runner
from kernelgraph.graph.gradients.function_calls import (
    PRIVATE,
    FunctionCallSpec,
    describe_function_call,
)
from kernelgraph.graph.gradients.gradient import Source, SourceKind
from kernelgraph.graph.gradients.tape import NoGradient, Tape, Tapes
from tests.support.op_calls import call_of

X, WEIGHT = Source(SourceKind.OPERAND, 0), Source(SourceKind.OPERAND, 1)
RESULT = Source(SourceKind.RESULT, 0)


class Product(torch.autograd.Function):
    """Saves an operand, a part of another, a result and a private tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        result = x * weight
        ctx.save_for_backward(x, weight[1:], result, weight * 1)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, _, _, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def by_function(self: Layer, x: Tensor) -> Tensor:
    return Product.apply(x, self.weight)


def by_operations(self: Layer, x: Tensor) -> Tensor:
    return (x * 1) * self.weight


def detached(self: Layer, x: Tensor) -> Tensor:
    return (x * self.weight).detach()


def recorded(
    forward: Callable[..., Tensor], sources: frozenset[Source] | None = None, **options: Any
) -> tuple[Tape, list[Any], Tensor]:
    """A closed tape of a call, its operands and its result."""
    x = torch.randn(3, 4)
    call, operands = call_of(Layer(), x, forward=forward)
    tape = Tape(call, operands, (True, True), sources, **options)
    result = tape.run(Runner(forward, call))
    made = result.detach().clone() if options else result.detach()
    tape.close([result], [made], (True,))
    return tape, operands, made


@pytest.mark.parametrize("forward", [by_function, by_operations])
@pytest.mark.parametrize("hidden_saves", [False, True])
def test_gradients_are_those_of_the_forward(forward: Any, hidden_saves: bool) -> None:
    tape, (x, weight), made = recorded(forward, hidden_saves=hidden_saves)
    given = {X: x.clone(), WEIGHT: weight.detach().clone(), RESULT: made.clone()}
    grad = torch.randn(3, 4)
    of_x, of_weight = tape.gradients([grad], given, [True, True])
    torch.testing.assert_close(of_x, grad * weight)
    torch.testing.assert_close(of_weight, (grad * x).sum(0))


def test_gradients_are_only_those_that_are_needed() -> None:
    tape, (x, weight), made = recorded(by_function)
    given = {X: x, WEIGHT: weight.detach(), RESULT: made}
    (of_weight,) = tape.gradients([torch.ones(3, 4)], given, [False, True])
    torch.testing.assert_close(of_weight, x.sum(0))
    assert tape.gradients([None], given, [True, True]) == [None, None]


def test_saved_tensors_are_told_from_private_ones_by_their_memory() -> None:
    tape, _, _ = recorded(by_function)
    assert tape.seen == {X, WEIGHT, RESULT}
    assert len(tape.kept) == 1


def test_saved_tensors_of_other_sources_are_copied() -> None:
    tape, (x, weight), _ = recorded(by_function, frozenset({WEIGHT}))
    assert len(tape.kept) == 3
    before = x.clone()
    x.zero_()
    _, of_weight = tape.gradients([torch.ones(3, 4)], {WEIGHT: weight.detach()}, [True, True])
    torch.testing.assert_close(of_weight, before.sum(0))


def test_sources_may_come_back_with_other_strides() -> None:
    tape, (x, weight), made = recorded(by_function)
    given = {X: x.t().contiguous().t(), WEIGHT: weight.detach(), RESULT: made}
    _, of_weight = tape.gradients([torch.ones(3, 4)], given, [True, True])
    torch.testing.assert_close(of_weight, x.sum(0))


def test_a_result_without_a_gradient_is_an_error() -> None:
    with pytest.raises(NoGradient, match=r"^result 0 has no gradient$"):
        recorded(detached)


def test_a_tape_is_freed_with_its_handle() -> None:
    tapes = Tapes()
    handle = tapes.keep("tape")
    assert tapes.get(handle) == "tape"
    assert tapes.get(handle.clone()) is None
    same_memory = handle.detach()
    del handle
    assert tapes.get(same_memory) == "tape"
    del same_memory
    assert len(tapes) == 0


# --- a call of one function as data ---------------------------------------------------------------


def described(forward: Callable[..., Tensor]) -> FunctionCallSpec | None:
    tape, operands, made = recorded(forward)
    return describe_function_call(tape, operands, [made], sorted(tape.seen))


def test_a_call_of_one_function_is_described() -> None:
    spec = described(by_function)
    assert spec is not None
    assert spec.function is Product
    assert spec.needs_input_grad == (True, True)
    assert [(a.argument, a.operand, a.shape) for a in spec.arguments] == [
        (0, 0, (3, 4)),
        (1, 1, (4,)),
    ]
    assert [result.shape for result in spec.results] == [(3, 4)]
    assert spec.spans == (48, 16)
    assert spec.sources == (X, WEIGHT, RESULT)
    assert spec.source_strides == ((4, 1), (1,), (4, 1))
    assert [saved.source for saved in spec.saved] == [0, 1, 2, PRIVATE]
    views = [saved.view for saved in spec.saved]
    assert [view is None for view in views] == [True, False, True, True]
    assert views[1] is not None
    assert (views[1].shape, views[1].stride, views[1].offset) == ((3,), (1,), 1)
    assert not spec.has_setup_context
    assert not spec.is_registered_op


def test_a_call_of_other_operations_is_not_described() -> None:
    assert described(by_operations) is None
    assert described(lambda self, x: by_function(self, x) * 2) is None


def test_a_call_with_an_argument_that_is_no_operand_is_not_described() -> None:
    assert described(lambda self, x: Product.apply(x * 1, self.weight)) is None
