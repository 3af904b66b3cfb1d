"""Helpers for tests of compiled models: backends that count or record graphs, and compile calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils import _pytree as pytree

from kernelgraph import (
    Mode,
    kernelize,
    last_report,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)
from kernelgraph.report import Decision
from tests.support.toy_models import Chain, on_cpu

COMPILED_INFERENCE = Mode.INFERENCE | Mode.TORCH_COMPILE
COMPILED_TRAINING = Mode.TRAINING | Mode.TORCH_COMPILE


# --- backends -----------------------------------------------------------------------------------


class Counter:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph_module.forward


class CountingAot(Counter):
    """A backend that counts graphs and gives them to AOTAutograd."""

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        super().__call__(graph_module, inputs)
        run: Callable[..., Any] = lookup_backend("aot_eager")(graph_module, inputs)
        return run


class Recorder:
    """A backend that keeps graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph_module)
        return graph_module.forward

    @property
    def ops(self) -> list[str]:
        """The names of the kernel ops in the graphs."""
        return [
            str(node.target).split(".")[1]
            for graph in self.graphs
            for node in graph.graph.nodes
            if str(node.target).startswith("hubkernels.")
        ]


# --- compiling ----------------------------------------------------------------------------------


def ours(inner: Any) -> dict[str, Any]:
    """Arguments of torch.compile for hubkernels, with ``inner`` as its inner compiler."""
    # The toys add 10, which a kernel that is verified before it trains anything may not.
    return {"backend": "hubkernels", "options": {"inner": inner, "verify_gradients": False}}


def plain(inner: Any) -> dict[str, Any]:
    """Arguments of torch.compile for ``inner`` itself as the backend."""
    return {"backend": inner}


def compiled(model: Any, inner: Any = "eager", **options: Any) -> Any:
    """A model compiled by hubkernels as one graph, with gradients of kernels not verified."""
    options = {"inner": inner, "verify_gradients": False, **options}
    return torch.compile(model, backend="hubkernels", fullgraph=True, options=options)


# --- expected results ---------------------------------------------------------------------------


def by_hand(model: Chain, x: Tensor, extra: float = 10) -> Tensor:
    """The output of a `Chain` whose scales run a kernel that adds ``extra``."""
    first, linear, last = model.layers
    return last(linear(first(x) + extra)) + extra


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def decisions() -> tuple[Decision, ...]:
    """The decisions of the last report."""
    report = last_report()
    assert report is not None
    return report.decisions


def kept_reasons() -> list[str]:
    """For each layer of the last compile, why it keeps its reference; empty for a kernel."""
    return ["" if d.op else f"{d.reason.name} {d.detail}" for d in decisions()]


def assert_alike(one: Any, other: Any) -> None:
    """Assert that two outputs have the same structure, types and values."""
    ours, our_spec = pytree.tree_flatten(one)
    theirs, their_spec = pytree.tree_flatten(other)
    assert our_spec == their_spec
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b)
        elif dataclasses.is_dataclass(a):
            assert_alike(vars(a), vars(b))
        else:
            assert a == b


def check(
    layer: nn.Module,
    hub_layer: type[nn.Module],
    *args: Any,
    inner: str = "eager",
    kernel_runs: bool = True,
    **kwargs: Any,
) -> None:
    """Assert that a compiled layer does what the eager one does once it is kernelized."""
    replace_kernel_forward_from_hub(type(layer), "Layer")
    with use_kernel_mapping(on_cpu(Layer=hub_layer), inherit_mapping=False), torch.no_grad():
        made = compiled(layer, inner)(*args, **kwargs)
        assert kept_reasons() == [""], kept_reasons()
        kernelize(layer, mode=Mode.INFERENCE, device="cpu")
        assert "forward" in vars(layer)
        assert_alike(made, layer(*args, **kwargs))
        del layer.forward
        reference = layer(*args, **kwargs)
        if kernel_runs:
            with pytest.raises(AssertionError):
                assert_alike(made, reference)


def hub_layer_of(forward: Callable[..., Any]) -> type[nn.Module]:
    """A hub layer with ``forward``."""
    return type(f"Hub_{forward.__name__}", (nn.Module,), {"forward": forward})
