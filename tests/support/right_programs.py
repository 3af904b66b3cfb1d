"""Programs that kernels must not change: a layer, a right kernel for it, and code that calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.utils import _pytree as pytree

from kernelgraph import replace_kernel_forward_from_hub, use_kernel_mapping
from tests.support.compiled_models import kept_reasons
from tests.support.toy_models import on_cpu


@dataclass
class Program:
    """A program that calls one layer."""

    layer: Callable[[], nn.Module]
    kernel: Callable[..., Any]
    """The forward of a kernel that computes the same by other means."""
    run: Callable[..., Any]
    """Takes the layer and the inputs."""
    inputs: Callable[[], Sequence[Any]]
    keeps: str = ""
    """A part of the reason why the layer keeps its reference; empty where its kernel is used."""


@dataclass
class Outcome:
    """All that a run of a program leaves behind."""

    output: Any
    inputs: Sequence[Any]
    state: dict[str, Any]
    gradients: list[Tensor | None]
    drawn: Tensor


def outcome(
    program: Program, compiled: Callable[[Any], Any], *, grad: bool = False, calls: int = 2
) -> Outcome:
    """Run a program with the same layer several times, each time with new inputs.

    Args:
        program: The program.
        compiled: Compiles its code.
        grad: Whether gradients are wanted of the floats among the inputs.
        calls: The number of calls. A later call of an op is checked less than the first.
    """
    torch.manual_seed(0)
    layer, run = program.layer(), compiled(program.run)
    for _ in range(calls):
        inputs = program.inputs()
        leaves = [v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)]
        leaves = [v.requires_grad_() for v in leaves if grad and v.is_floating_point()]
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            output = run(layer, *inputs)
        results = [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)]
        if roots := [v for v in results if v.requires_grad]:
            ones = [torch.arange(v.numel(), dtype=v.dtype).view(v.shape) for v in roots]
            torch.autograd.backward(roots, ones)
    state = {k: v for k, v in vars(layer).items() if not k.startswith("_")}
    state |= {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    gradients = [v.grad for v in (*leaves, *layer.parameters())]
    return Outcome(output, inputs, copy.deepcopy(state), gradients, torch.rand(3))


def assert_changes_nothing(
    program: Program, inner: str, *, grad: bool = False, calls: int = 2
) -> None:
    """Assert that a compiled program does with its kernel what it does in eager use without."""
    torch.compiler.reset()
    expected = outcome(program, lambda run: run, grad=grad, calls=calls)
    layer = type(program.layer())
    replace_kernel_forward_from_hub(layer, "Layer")
    kernel = type("Right", (nn.Module,), {"forward": program.kernel})
    with use_kernel_mapping(on_cpu(Layer=kernel), inherit_mapping=False):
        made = outcome(
            program,
            lambda run: torch.compile(run, backend="hubkernels", options={"inner": inner}),
            grad=grad,
            calls=calls,
        )
        reasons = kept_reasons()
    assert_same_outcome(made, expected)
    assert reasons
    for reason in reasons:
        assert program.keeps in reason if program.keeps else not reason, reason


def assert_same_outcome(made: Outcome, expected: Outcome) -> None:
    for field in vars(expected):
        try:
            _assert_same(getattr(made, field), getattr(expected, field))
        except AssertionError as error:
            raise AssertionError(f"{field}: {error}") from error


def _assert_same(made: Any, expected: Any) -> None:
    ours, our_spec = pytree.tree_flatten(made)
    theirs, their_spec = pytree.tree_flatten(expected)
    assert our_spec == their_spec
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other)
            if is_non_overlapping_and_dense_or_false(other):  # an op returns no gaps
                assert one.stride() == other.stride()
        elif hasattr(other, "__dict__"):
            _assert_same(vars(one), vars(other))
        else:
            assert one == other
