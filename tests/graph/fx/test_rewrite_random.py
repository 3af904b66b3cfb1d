"""`kernelgraph.rewrite` over random graphs.

A graph is drawn as a list of steps, each of which takes earlier values; the same steps, run one
after the other with the kernels called directly, are the oracle.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from kernelgraph import Mode, rewrite, use_kernel_forward_from_hub
from tests.support.toys import only

SHAPE = (2, 4)


class Scale(nn.Module):
    kernel_layer_name = "Scale"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), factor))
        self.eps = factor / 2

    def forward(self, x: Tensor, n: int = 1, *, shift: Tensor | None = None) -> Tensor:
        y = x * self.weight * n + self.eps
        return y if shift is None else y - shift


class ScaleKernel(nn.Module):
    def forward(self, x, n=1, *, shift=None):
        y = x * self.weight * n + self.eps
        return (y if shift is None else y - shift) + 1


class Sum(nn.Module):
    """A layer that takes containers and returns a tensor that is not contiguous."""

    kernel_layer_name = "Sum"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, parts: list[Tensor], more: dict[str, tuple[Tensor, ...]]) -> Tensor:
        total = sum([*parts, *more["m"]]) * self.factor
        return total.t().contiguous().t()


class SumKernel(nn.Module):
    def forward(self, parts, more):
        total = sum([*parts, *more["m"]]) * self.factor
        return total.t().contiguous().t() + 2


class Split(nn.Module):
    kernel_layer_name = "Split"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("bias", torch.full((4,), factor))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"up": x + self.bias, "down": x - self.bias, "rest": x.sum()}


class SplitKernel(nn.Module):
    def forward(self, x):
        return {"up": x + self.bias + 3, "down": x - self.bias, "rest": x.sum()}


class Kept(nn.Module):
    """A layer without a kernel."""

    kernel_layer_name = "Kept"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + self.factor)


class Plain(Kept):
    """A layer that is not extensible."""

    kernel_layer_name = None

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() + self.factor


@use_kernel_forward_from_hub("Mean")
def mean(x: Tensor, y: Tensor) -> Tensor:
    return (x + y) / 2


class MeanKernel(nn.Module):
    def forward(self, x, y):
        return (x + y) / 2 + 5


KERNELS = {"Scale": ScaleKernel, "Sum": SumKernel, "Split": SplitKernel, "Mean": MeanKernel}
CLASSES = {"scale": Scale, "sum": Sum, "split": Split, "kept": Kept, "plain": Plain}


class Step(NamedTuple):
    kind: str
    instance: int
    sources: list[int]
    number: int
    flags: tuple[bool, bool]


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from([*CLASSES, "mean", "add"]),
        st.integers(0, 1),
        st.lists(st.integers(0, 30), min_size=3, max_size=3),
        st.integers(-2, 3),
        st.tuples(st.booleans(), st.booleans()),
    ),
    min_size=1,
    max_size=8,
)


def call_of(step: Step, values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a step, of nodes or of tensors."""
    a, b, c = (values[i % len(values)] for i in step.sources)
    first, second = step.flags
    if step.kind == "scale":
        shift = {"shift": b} if second else {}
        return ((a, step.number), shift) if first else ((), {"x": a, **shift})
    if step.kind == "sum":
        return ([a, b], {"m": (c,) if first else (a, c)}), {}
    return ((a, b) if step.kind in ("mean", "add") else (a,)), {}


def keys_of(step: Step) -> list[str]:
    """Return the keys of the results of a step that later steps use."""
    return [key for key, taken in zip(("up", "down"), step.flags, strict=True) if taken]


def graph_of(steps: list[Step], modules: nn.Module) -> fx.GraphModule:
    graph = fx.Graph()
    values = [graph.placeholder("x")]
    for step in steps:
        args, kwargs = call_of(step, values)
        if step.kind in CLASSES:
            made = graph.call_module(f"{step.kind}.{step.instance}", args, kwargs)
        else:
            function: Callable[..., Any] = mean if step.kind == "mean" else operator.add
            made = graph.call_function(function, args, kwargs)
        if step.kind == "split":
            values += [graph.call_function(operator.getitem, (made, k)) for k in keys_of(step)]
        else:
            values.append(made)
    graph.output((values[-1], values[len(values) // 2]))
    for node in graph.nodes:
        node.meta["mine"] = node.name
    return fx.GraphModule(modules, graph)


def run(steps: list[Step], modules: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the steps with the kernels, called directly."""
    values = [x]
    for step in steps:
        args, kwargs = call_of(step, values)
        if step.kind == "add":
            values.append(operator.add(*args))
            continue
        module: Any = mean
        if step.kind != "mean":
            module = modules.get_submodule(f"{step.kind}.{step.instance}")
        kernel: Any = KERNELS.get(step.kind.title(), type(module))
        made = kernel.forward(module, *args, **kwargs)
        values += [made[k] for k in keys_of(step)] if step.kind == "split" else [made]
    return values[-1], values[len(values) // 2]


def description(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, dict):
        return {key: description(part) for key, part in value.items()}
    return tuple(map(description, value)) if isinstance(value, (tuple, list)) else value


@settings(max_examples=60)
@given(STEPS)
def test_random_graph_computes_what_the_kernels_do(steps):
    """The rewritten graph computes what the kernels do; each node that was there is the node
    that it was; each has the value of a run on fakes; and a second pass finds nothing to do."""
    modules = nn.Module()
    for name, cls in CLASSES.items():
        modules.add_module(name, nn.ModuleList([cls(0.5), cls(1.5)]))
    graph_module = graph_of(steps, modules)
    before = {n: (n.op, n.target, dict(n.meta)) for n in graph_module.graph.nodes}
    x = torch.linspace(-1, 1, 8).reshape(SHAPE)
    with only(**KERNELS):
        rewrite(graph_module, mode=Mode.INFERENCE, example_inputs=(x,))
        code = graph_module.code
        rewrite(graph_module, mode=Mode.INFERENCE)
        assert graph_module.code == code
    graph_module.graph.lint()

    for ours, oracle in zip(graph_module(x), run(steps, modules, x), strict=True):
        torch.testing.assert_close(ours, oracle)

    left = {str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"}
    assert left == {f"{s.kind}.{s.instance}" for s in steps if s.kind in ("kept", "plain")}
    assert not graph_module.graph.find_nodes(op="call_function", target=mean)

    again = copy.deepcopy(graph_module)
    FakeTensorProp(again, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x)
    for node, other in zip(graph_module.graph.nodes, again.graph.nodes, strict=True):
        value = node.meta["val"]
        assert description(value) == description(other.meta["val"])
        if node in before:
            op, target, meta = before[node]
            assert (node.op, node.target, node.meta) == (op, target, {**meta, "val": value})
