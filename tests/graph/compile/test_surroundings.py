"""What a compiled model may not notice: other threads that compile, and the regions around it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernelgraph import replace_kernel_forward_from_hub, use_kernel_mapping
from tests.support.toy_models import Chain, OpaqueScale, on_cpu

INNER = ["eager", "aot_eager"]


def compiled(model: Any, inner: str) -> Any:
    # The toys add 10, which a kernel that is verified before it trains anything may not.
    options = {"inner": inner, "verify_gradients": False}
    return torch.compile(model, backend="hubkernels", fullgraph=True, options=options)


def by_hand(model: Chain, x: Tensor) -> Tensor:
    first, linear, last = model.layers
    return last(linear(first(x) + 10)) + 10


@pytest.mark.parametrize("inner", INNER)
def test_threads_that_compile_at_once(inner: str) -> None:
    """Each compiles a model of its own, with sizes of its own, under its own mapping."""
    start = threading.Barrier(4)

    models = [Chain(2 + i) for i in range(4)]
    # Here and not in the threads: torch (2.13) looks a backend up in a way that is not for several.
    functions = [compiled(model, inner) for model in models]

    def work(i: int) -> list[tuple[Tensor, Tensor]]:
        model, f = models[i], functions[i]
        pairs = []
        with use_kernel_mapping(on_cpu(Scale=OpaqueScale), inherit_mapping=False):
            start.wait(timeout=60)
            for rows in (3, 5):
                x = torch.randn(rows, 2 + i)
                with torch.no_grad():
                    pairs.append((f(x), by_hand(model, x)))
        return pairs

    with ThreadPoolExecutor(4) as pool:
        for pairs in pool.map(work, range(4)):
            for made, expected in pairs:
                torch.testing.assert_close(made, expected)


class Project(nn.Module):
    """Gives what autocast decides on, and whether it is decided."""

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
def test_autocast_regions_of_a_graph(inner: str, training: bool) -> None:
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
def test_inference_mode(inner: str, around: str) -> None:
    """Wherever it begins, the results are the kernels', and tensors of inference mode inside it."""
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
