"""Random models that call their kernels eagerly, as the oracle for compiled and exported ones."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kernelgraph import last_report, use_kernel_mapping
from tests.support.random_layers import Layer, Model, classes
from tests.support.toy_models import on_cpu


def examples(count: int) -> Any:
    """Return settings for this many examples."""
    return settings(
        max_examples=count,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )


# --- the oracle: each kernel called eagerly -----------------------------------------------------


class _Value(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, reference: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad


def copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def once(layer: nn.Module, forward: Any, target: str | None, args: Any, kwargs: Any) -> Any:
    """Call ``forward`` on copies; return its result and the copy of ``target`` after the call."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    offset = getattr(layer, "offset", None)
    try:
        if offset is not None:
            layer.offset = offset.clone()
        result = pytree.tree_map_only(Tensor, copied, forward(layer, *args, **kwargs))
        return result, target and find(layer, forward, target, args, kwargs)
    finally:
        if offset is not None:
            layer.offset = offset


def find(layer: nn.Module, forward: Any, target: str, args: Any, kwargs: Any) -> Tensor:
    if target == "offset":
        return layer.offset
    return inspect.signature(forward).bind(layer, *args, **kwargs).arguments[target]


def eager_call(layer: nn.Module, spec: Layer, *args: Any, **kwargs: Any) -> Any:
    """A call with the kernel: what it returns is its own, and what it writes into is seen by
    nobody, unless the reference writes there too. The gradient is the reference's."""
    cls, kernel, _ = classes(spec)
    reference = inspect.unwrap(cls.forward)
    with torch.no_grad():
        result, written = once(layer, kernel.forward, spec.written, args, kwargs)
    if torch.is_grad_enabled():
        expected, expected_written = once(layer, reference, spec.written, args, kwargs)
        result, written = pytree.tree_map(
            lambda v, r: _Value.apply(v, r) if isinstance(r, Tensor) and r.requires_grad else v,
            (result, written),
            (expected, expected_written),
        )
    if "reference" in spec.writers:
        find(layer, reference, spec.written, args, kwargs).copy_(written)
    return result


def eager(spec: Model, model: nn.Module) -> nn.Module:
    """Return a copy of the model that calls its kernels."""
    twin = copy.deepcopy(model)
    for layer, drawn in zip(twin.layers, spec.layers, strict=True):
        layer.forward = functools.partial(eager_call, layer, drawn)
    return twin


# --- checks -------------------------------------------------------------------------------------


def mapping(specs: Any) -> Any:
    """Use a mapping with the kernels of these layers alone."""
    found = [classes(spec) for spec in specs]
    return use_kernel_mapping(on_cpu(**{name: kernel for _, kernel, name in found}), False)


def assert_same(made: Any, expected: Any, **tolerance: float) -> None:
    """Check that two values are close, nan and nan too."""
    torch.testing.assert_close(made, expected, equal_nan=True, **tolerance)


def assert_kernels(spec: Model) -> None:
    """Check that each layer that is called uses its kernel."""
    report = last_report()
    assert report is not None
    called = {f"layers.{made.layer}" for made in spec.calls}
    assert {d.path for d in report.decisions} == called
    assert report.kernels == report.decisions, str(report)
