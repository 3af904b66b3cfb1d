"""Compiled models inside of autocast regions and of inference mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernelgraph import replace_kernel_forward_from_hub, use_kernel_mapping
from tests.support.compiled_models import by_hand, compiled
from tests.support.toy_models import Chain, OpaqueScale, on_cpu

INNER = ["eager", "aot_eager"]


class Project(nn.Module):
    """Returns a product, whose dtype autocast decides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class HubProject(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight) + 10


replace_kernel_forward_from_hub(Project, "Project")


def half_in_autocast(layer: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    outside = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
        with torch.autocast("cpu", enabled=False):
            island = layer(x)
    return [outside, inside, island]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("training", [False, True])
def test_kernels_follow_the_autocast_regions_of_a_graph(inner: str, training: bool) -> None:
    layer, x = Project(), torch.randn(3, 4, requires_grad=training)
    with (
        use_kernel_mapping(on_cpu(Project=HubProject), inherit_mapping=False),
        torch.set_grad_enabled(training),
    ):
        made = compiled(lambda x: half_in_autocast(layer, x), inner)(x)
    expected = half_in_autocast(lambda x: HubProject.forward(layer, x), x)  # type: ignore[arg-type]
    assert [t.dtype for t in made] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(made, expected)
    if training:
        grads = [
            torch.autograd.grad(sum(t.float().sum() for t in ts), x) for ts in (made, expected)
        ]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("around", ["the compile", "the first call", "a later call"])
def test_results_in_inference_mode_are_those_of_the_kernels(inner: str, around: str) -> None:
    """Wherever inference mode begins, the results inside it are inference tensors."""
    with use_kernel_mapping(on_cpu(Scale=OpaqueScale), inherit_mapping=False):
        with torch.inference_mode(around == "the compile"):
            model = Chain()
            f = compiled(model, inner)
        x = torch.randn(3, 4)
        if around == "a later call":
            with torch.no_grad():
                f(x)
        with torch.inference_mode():
            made = f(x)
            assert made.is_inference()
            torch.testing.assert_close(made, by_hand(model, x))
