"""Models kernelized with ``TORCH_COMPILE`` have their kernels under any backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernelgraph import Mode, kernelize, last_report, use_kernel_mapping
from tests.support.compiled_models import (
    COMPILED_INFERENCE,
    Recorder,
    assert_same,
    by_hand,
    compiled,
)
from tests.support.toy_models import Chain, OpaqueScale, Scale, TraceableScale, on_cpu


@pytest.fixture(autouse=True)
def mapping() -> Iterator[None]:
    with use_kernel_mapping(on_cpu(Scale=OpaqueScale), inherit_mapping=False):
        yield


@torch.no_grad()
def test_kernelized_model_has_the_same_ops_under_any_backend() -> None:
    model, x = Chain(), torch.randn(3, 4)
    ours, other = Recorder(), Recorder()
    compiled(model, ours)(x)
    expected = by_hand(model, x)
    kernelize(model, mode=COMPILED_INFERENCE)
    assert_same(torch.compile(model, backend=other, fullgraph=True)(x), expected)
    assert other.ops == ours.ops
    assert other.graphs[0].code == ours.graphs[0].code


@torch.no_grad()
def test_kernelized_model_runs_its_kernel_eagerly_too() -> None:
    model, x = Chain(), torch.randn(3, 4)
    expected = by_hand(model, x)
    kernelize(model, mode=COMPILED_INFERENCE)
    assert_same(model(x), expected)
    kernelize(model, mode=Mode.INFERENCE)
    assert_same(model(x), expected)


@torch.no_grad()
def test_kernelized_model_keeps_its_kernels_under_another_mapping() -> None:
    model, x = Chain(), torch.randn(3, 4)
    expected = by_hand(model, x)
    kernelize(model, mode=COMPILED_INFERENCE)
    with use_kernel_mapping(on_cpu(Scale=TraceableScale)):
        assert_same(compiled(model)(x), expected)


@torch.no_grad()
def test_kernelized_model_under_another_backend_reports_nothing() -> None:
    layer = Scale()
    kernelize(layer, mode=COMPILED_INFERENCE)
    report = last_report()
    y = torch.compile(layer.to("meta"), backend="eager")(torch.empty(3, 4, device="meta"))
    assert y.is_meta  # the layer's own forward, since no kernel is for such a device
    assert last_report() is report


def test_kernelized_model_has_gradients_in_inference_mode_too() -> None:
    model, x = Chain(), torch.randn(3, 4)
    by_hand(model, x).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    kernelize(model, mode=COMPILED_INFERENCE, verify_gradients=False)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert grad is not None
        assert_same(p.grad, grad)
