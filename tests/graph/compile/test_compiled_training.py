"""Training of compiled models: gradients, modes and optimizers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from kernelgraph import Mode, last_report, use_kernel_mapping
from kernelgraph.report import Reason
from tests.support.compiled_models import (
    COMPILED_INFERENCE,
    COMPILED_TRAINING,
    assert_same,
    by_hand,
    compiled,
)
from tests.support.toy_models import Chain, ForwardOnlyScale, OpaqueScale, Repository, on_cpu

INNER = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def mapping() -> Iterator[None]:
    with use_kernel_mapping(on_cpu(Scale=OpaqueScale), inherit_mapping=False):
        yield


@pytest.mark.parametrize("inner", INNER)
def test_gradients_are_those_of_the_reference(inner: str) -> None:
    model = Chain()
    x, y = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        y.copy_(x)
    upstream = torch.randn(3, 4)
    compiled(model, inner)(x).backward(upstream)
    made = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    # The 10 that the first kernel adds changes the input of later layers, but no formula.
    by_hand(model, y).backward(upstream)
    for actual, p in zip(made, model.parameters(), strict=True):
        assert actual is not None
        assert p.grad is not None
        assert_same(actual, p.grad)
    assert x.grad is not None
    assert y.grad is not None
    assert_same(x.grad, y.grad)
    report = last_report()
    assert report is not None
    assert {d.mode for d in report.kernels} == {str(COMPILED_TRAINING)}
    assert all(d.op.endswith("_training") for d in report.kernels)


def test_mode_is_decided_for_each_call() -> None:
    """A layer through which no gradient can flow is for inference, in any graph."""
    model = Chain()
    model.layers[0].requires_grad_(False)
    compiled(model)(torch.randn(3, 4)).sum().backward()
    report = last_report()
    assert report is not None
    assert [d.mode for d in report.kernels] == [str(COMPILED_INFERENCE), str(COMPILED_TRAINING)]


def test_one_model_trains_and_infers_in_turn() -> None:
    model, x = Chain(), torch.randn(3, 4)
    f = compiled(model, "aot_eager")
    for _ in range(2):
        f(x).sum().backward()
        with torch.no_grad():
            assert_same(f(x), by_hand(model, x))
        with torch.inference_mode():
            assert_same(f(x).clone(), by_hand(model, x))


def test_optimizer_steps_are_those_by_hand() -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(8, 4)
    twin = copy.deepcopy(model)
    f = compiled(model, "aot_eager")
    for net, call in ((model, f), (twin, lambda x: by_hand(twin, x))):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            call(x).pow(2).mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(a, b)


def test_kernel_without_backward_is_not_used_in_training() -> None:
    model, x = Chain(), torch.randn(3, 4)
    with use_kernel_mapping(on_cpu(Scale=ForwardOnlyScale)):
        f = compiled(model)
        assert_same(f(x), model(x))
        report = last_report()
        assert report is not None
        assert {d.reason for d in report.decisions} == {Reason.NO_BACKWARD}
        with torch.no_grad():
            assert_same(f(x), by_hand(model, x, 30))


def test_kernel_mode_option_overrules_the_mode_of_the_call() -> None:
    """The kernel for inference has right gradients in a training graph too."""
    mapping = {
        "Scale": {
            "cpu": {
                COMPILED_INFERENCE: Repository(ForwardOnlyScale),
                COMPILED_TRAINING: Repository(OpaqueScale),
            }
        }
    }
    model, x = Chain(), torch.randn(3, 4)
    with use_kernel_mapping(mapping):
        assert_same(compiled(model)(x), by_hand(model, x))
        torch.compiler.reset()
        out = compiled(model, kernel_mode=Mode.INFERENCE)(x)
        assert_same(out, by_hand(model, x, 30))
        out.sum().backward()
        grad = model.layers[0].weight.grad
        model.zero_grad(set_to_none=True)
        by_hand(model, x, 30).sum().backward()
        assert_same(grad, model.layers[0].weight.grad)
