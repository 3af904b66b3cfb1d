"""Calls that cannot become an op keep their reference, and the report says why."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import replace_kernel_forward_from_hub, use_kernel_mapping
from tests.support.compiled_models import hub_layer_of, kept_reasons
from tests.support.toy_models import on_cpu


def kept(
    layer: nn.Module, hub_layer: type[nn.Module], *args: Any, **options: Any
) -> tuple[Any, str]:
    """The result of a compiled layer that keeps its reference, and why it does."""
    replace_kernel_forward_from_hub(type(layer), "Layer")
    with use_kernel_mapping(on_cpu(Layer=hub_layer), inherit_mapping=False):
        made = torch.compile(
            layer, backend="hubkernels", fullgraph=True, options={"inner": "eager"}, **options
        )(*args)
    (reason,) = kept_reasons()
    return made, reason


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None
        self.history: list[int] = []
        self.opaque = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return x + 1

    def remember(self, x: Tensor) -> Tensor:
        self.last = x
        return x


def sets(self, x):
    self.last = x
    return x + 10


def sets_in_a_method(self, x):
    return self.remember(x) + 10


def sets_by_name(self, x):
    setattr(self, "last", 3)  # noqa: B010
    return x + 10


def appends(self, x):
    self.history.append(len(x))
    return x + 10


def locks(self, x):
    with self.opaque:
        return x + 10


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (sets, "sets sets self.last, which a custom op cannot"),
        (sets_in_a_method, "Remembers.remember sets self.last, which a custom op cannot"),
        (locks, "self.opaque is a lock, which is neither a tensor, a module, a constant nor made"),
    ],
)
def test_kernel_that_cannot_be_an_op_is_not_used(forward: Callable[..., Any], why: str) -> None:
    layer = Remembers()
    made, reason = kept(layer, hub_layer_of(forward), torch.ones(3))
    assert made.tolist() == [2, 2, 2]
    assert why in reason
    assert (layer.last, layer.history) == (None, [])


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (sets_by_name, "sets_by_name sets last of the layer"),
        (appends, "appends sets history of the layer"),
    ],
)
def test_kernel_that_sets_an_attribute_when_it_runs_gives_way_to_the_reference(
    forward: Callable[..., Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = Remembers()
    replace_kernel_forward_from_hub(Remembers, "Layer")
    f = torch.compile(layer, backend="hubkernels", fullgraph=True, options={"inner": "eager"})
    with use_kernel_mapping(on_cpu(Layer=hub_layer_of(forward)), inherit_mapping=False):
        for _ in range(2):
            assert f(torch.ones(3)).tolist() == [2, 2, 2]
    assert (layer.last, layer.history) == (None, [])
    assert why in caplog.text


def test_dynamic_number_as_a_result_keeps_the_reference() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x + 1, x.shape[0]

    class HubLayer(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x + 10, x.shape[0]

    (made, size), reason = kept(Layer(), HubLayer, torch.ones(3), dynamic=True)
    assert (made.tolist(), size) == ([2, 2, 2], 3)
    assert "a SymInt is passed or returned" in reason
