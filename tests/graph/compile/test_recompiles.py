"""A compiled model is compiled anew if a value that it depends on has changed, and only then."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import use_kernel_forward_from_hub, use_kernel_mapping
from tests.support.compiled_models import Counter, decisions, ours, plain
from tests.support.toy_models import on_cpu


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    name: str = "a"
    inner: Any = dataclasses.field(default_factory=lambda: SimpleNamespace(flag=True))


class Sub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.scale = 1.0
        self.steps = 1
        self.act: nn.Module = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = x * self.weight * self.scale
        return self.act(x)


@use_kernel_forward_from_hub("Layer")
class Layer(nn.Module):
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.register_buffer("shift", torch.linspace(-1, 1, 4))
        self.eps, self.steps, self.negate, self.power = 0.25, 1, False, "linear"
        self.factors: list[Any] = [1.0, 2.0]
        self.table: dict[str, Any] = {"a": 1.0, "b": [1, 2]}
        self.pieces: list[Any] = [torch.ones(4), nn.Linear(4, 4)]
        self.config, self.whole = Config(), Config()
        self.sub = Sub()

    def forward(self, x: Tensor, factor: float = 1.0, times: int = 1) -> Tensor:
        y = x * self.weight + self.shift + self.eps
        for _ in range(self.steps):
            y = y + sum(self.factors) * self.table["a"] + len(self.table["b"])
        if self.power == "square":
            y = y * y
        y = self.sub(y) * self.config.scale + summed(self.whole)
        for piece in self.pieces:
            y = piece(y) if isinstance(piece, nn.Module) else y + piece
        y = y * factor + times + hasattr(self, "extra") + len(list(self.sub.parameters()))
        if not self.training:
            y = y + 5
        return -y if self.negate else y


def summed(config: Config) -> float:
    return config.scale + len(config.name) + (1 if config.inner.flag else 2)


class HubLayer(nn.Module):
    """`Layer` and 10, where Dynamo cannot see it."""

    def forward(self, x: Tensor, factor: float = 1.0, times: int = 1) -> Tensor:
        return eagerly(self, x, factor, times)


reference = getattr(Layer.forward, "__kernelgraph_reference__", Layer.forward)


def eagerly(layer: Any, x: Tensor, factor: float = 1.0, times: int = 1) -> Tensor:
    x.detach().float().cpu().numpy()  # which a fake tensor does not have
    return reference(layer, x, factor, times) + 10


@pytest.fixture(autouse=True)
def mapping() -> Iterator[None]:
    with use_kernel_mapping(on_cpu(Layer=HubLayer), inherit_mapping=False), torch.no_grad():
        yield


def compiled(model: Any, counter: Counter, **kwargs: Any) -> Any:
    return torch.compile(
        model, backend="hubkernels", fullgraph=True, options={"inner": counter}, **kwargs
    )


def assert_all_kernels() -> None:
    assert [d.detail for d in decisions() if not d.op] == []


# --- values that are read of the layer ------------------------------------------------------

CHANGES: dict[str, Callable[[Layer], None]] = {
    "float": lambda layer: setattr(layer, "eps", 0.5),
    "int": lambda layer: setattr(layer, "steps", 2),
    "int to float": lambda layer: setattr(layer.sub, "scale", 1),
    "bool": lambda layer: setattr(layer, "negate", True),
    "string": lambda layer: setattr(layer, "power", "square"),
    "in a list": lambda layer: layer.factors.__setitem__(1, 3.0),
    "a longer list": lambda layer: layer.factors.append(3.0),
    "another list": lambda layer: setattr(layer, "factors", [3.0]),
    "in a dict": lambda layer: layer.table.__setitem__("a", 3.0),
    "in a list in a dict": lambda layer: layer.table["b"].append(3),
    "a float of a submodule": lambda layer: setattr(layer.sub, "scale", 2.0),
    "an int of a submodule": lambda layer: setattr(layer.sub, "steps", 2),
    "a submodule of another class": lambda layer: setattr(layer.sub, "act", nn.Tanh()),
    "a parameter more": lambda layer: layer.sub.register_parameter(
        "more", nn.Parameter(torch.ones(4))
    ),
    "a config's value": lambda layer: setattr(layer.config, "scale", 2.0),
    "another config": lambda layer: setattr(layer, "config", Config(2.0)),
    "a whole config's value": lambda layer: setattr(layer.whole, "name", "abc"),
    "deep in a whole config": lambda layer: setattr(layer.whole.inner, "flag", False),
    "an attribute more": lambda layer: setattr(layer, "extra", 1),
    "a tensor more": lambda layer: layer.pieces.append(torch.ones(4)),
    "a module for a tensor": lambda layer: layer.pieces.__setitem__(0, nn.Linear(4, 4)),
    "eval": lambda layer: layer.eval() and None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_value_compiles_once_more(change: Callable[[Layer], None]) -> None:
    """The results are right with both values, and the old value uses the first graph again."""
    torch.manual_seed(0)
    model, counter, x = nn.Sequential(Layer()), Counter(), torch.randn(3, 4)
    f = compiled(model, counter)
    before = model[0]
    torch.testing.assert_close(f(x), eagerly(before, x))
    assert_all_kernels()
    for _ in range(2):
        assert torch.equal(f(x), eagerly(before, x))
    assert counter.graphs == 1
    after = model[0] = copy.deepcopy(before)
    assert torch.equal(f(x), eagerly(after, x)), "a copy is the same to a graph"
    assert counter.graphs == 1
    change(after)
    for _ in range(2):
        torch.testing.assert_close(f(x), eagerly(after, x))
    assert_all_kernels()
    assert counter.graphs == 2
    model[0] = before
    torch.testing.assert_close(f(x), eagerly(before, x))
    assert counter.graphs == 2


@pytest.mark.parametrize("nested", [{"a": [1.0]}, {"a": {"b": 1.0}}], ids=["list", "dict"])
def test_value_deep_in_the_only_attribute_that_is_read_is_guarded(nested: dict[str, Any]) -> None:
    """Dynamo skips the guards of a module whose attributes are the same objects as before."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nested = nested

    @use_kernel_forward_from_hub("Layer")
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return x * (sum(self.inner.nested["a"]) if "b" not in self.inner.nested["a"] else 2)

    class HubNested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside = self.inner.nested["a"]
            return x.detach() * (inside["b"] if isinstance(inside, dict) else sum(inside))

    counter, layer, x = Counter(), Nested(), torch.ones(3)
    with use_kernel_mapping(on_cpu(Layer=HubNested), inherit_mapping=False):
        f = compiled(nn.Sequential(layer), counter)
        for value in (1.0, 5.0):
            inside = layer.inner.nested["a"]
            inside["b" if isinstance(inside, dict) else 0] = value
            for _ in range(3):
                assert f(x).tolist() == [value] * 3
    assert_all_kernels()
    assert counter.graphs == 2


WEIGHTS: dict[str, Callable[[Layer], object]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "a buffer in place": lambda layer: layer.shift.add_(2),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(torch.full((4,), 3.0))),
    "a submodule's": lambda layer: setattr(layer.sub, "weight", nn.Parameter(torch.zeros(4))),
    "in a list": lambda layer: layer.pieces.__setitem__(0, torch.full((4,), 9.0)),
    "of a module in a list": lambda layer: layer.pieces[1].weight.mul_(2),
    "loaded": lambda layer: layer.load_state_dict(
        {name: value * 2 for name, value in layer.state_dict().items()}
    ),
    "data": lambda layer: setattr(layer.weight, "data", torch.full((4,), 3.0)),
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
def test_other_weights_compile_nothing(change: Callable[[Layer], object]) -> None:
    layer, counter, x = Layer(), Counter(), torch.randn(3, 4)
    f = compiled(nn.Sequential(layer), counter)
    f(x)
    change(layer)
    torch.testing.assert_close(f(x), eagerly(layer, x))
    assert counter.graphs == 1


def test_frozen_weights_are_followed() -> None:
    layer, counter, x = Layer(), Counter(), torch.randn(3, 4)
    f = compiled(nn.Sequential(layer), counter)
    with torch.enable_grad():
        assert f(x).requires_grad
        layer.requires_grad_(False)
        layer.pieces[1].requires_grad_(False)
        assert not f(x).requires_grad
    torch.testing.assert_close(f(x), eagerly(layer, x))
    assert_all_kernels()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_compiles_once_more(dtype: torch.dtype) -> None:
    layer, counter, x = Layer(), Counter(), torch.randn(3, 4)
    layer.pieces.clear()
    f = compiled(nn.Sequential(layer), counter)
    f(x)
    layer.to(dtype)
    for _ in range(2):
        torch.testing.assert_close(f(x.to(dtype)), eagerly(layer, x.to(dtype)))
    assert_all_kernels()
    assert counter.graphs == 2
    layer.float()
    torch.testing.assert_close(f(x), eagerly(layer, x), rtol=0.1, atol=0.1)
    assert counter.graphs == 2


@pytest.mark.cuda
def test_another_device_compiles_once_more() -> None:
    mapping = {"Layer": {d: on_cpu(Layer=HubLayer)["Layer"]["cpu"] for d in ("cpu", "cuda")}}
    layer, counter, x = Layer(), Counter(), torch.randn(3, 4)
    layer.pieces.clear()
    with use_kernel_mapping(mapping, inherit_mapping=False):
        f = compiled(nn.Sequential(layer), counter)
        f(x)
        layer.to("cuda")
        for _ in range(2):
            torch.testing.assert_close(f(x.cuda()), eagerly(layer, x.cuda()))
        assert_all_kernels()
        layer.to("cpu")
        torch.testing.assert_close(f(x), eagerly(layer, x))
    assert counter.graphs == 2


def test_graph_is_used_under_mappings_that_decide_alike() -> None:
    class Other(nn.Module):
        def forward(self, x, factor=1.0, times=1):
            return eagerly(self, x, factor, times) + 10

    layer, counter, x = Layer(), Counter(), torch.randn(3, 4)
    f = compiled(nn.Sequential(layer), counter)
    f(x)
    for number in range(20):  # registered for a layer that is not in the graph
        with use_kernel_mapping({f"Other {number}": {"cpu": on_cpu(Layer=Other)["Layer"]["cpu"]}}):
            torch.testing.assert_close(f(x), eagerly(layer, x))
    assert counter.graphs == 1
    mapping = on_cpu(Layer=Other)
    for _ in range(3):
        with use_kernel_mapping(mapping):
            torch.testing.assert_close(f(x), eagerly(layer, x) + 10)
        torch.testing.assert_close(f(x), eagerly(layer, x))
    assert counter.graphs == 2


# --- shapes and arguments -------------------------------------------------------------------


class Plain(nn.Module):
    """`Layer` as a plain module, which torch.compile compiles without kernelgraph."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return reference(self.layer, x, *args)


def compiles(
    model: Any, backend: Any, calls: list[tuple[Any, ...]], prepare: Any, **kwargs: Any
) -> list[int]:
    """The number of compiles after each of ``calls``."""
    torch.compiler.reset()
    counter, counts = Counter(), []
    f = torch.compile(model, fullgraph=True, **backend(counter), **kwargs)
    for arguments in calls:
        prepare(arguments[0])
        f(*arguments)
        counts.append(counter.graphs)
    return counts


def sized(*lengths: int) -> list[tuple[Any, ...]]:
    return [(torch.randn(length, 4),) for length in lengths]


def nothing(x: Tensor) -> None:
    pass


@pytest.mark.parametrize(
    ("calls", "prepare", "kwargs"),
    [
        (sized(3, 5, 6, 7, 1, 9), nothing, {}),
        (sized(3, 5, 6, 7, 1, 9), nothing, {"dynamic": True}),
        (sized(3, 5, 3, 6), nothing, {"dynamic": False}),
        (sized(3, 5, 6, 7), lambda x: torch._dynamo.mark_dynamic(x, 0), {}),
        (sized(3, 5, 6, 7), lambda x: torch._dynamo.maybe_mark_dynamic(x, 0), {}),
        ([(torch.ones(3, 4), 1.0, n) for n in (2, 3, 4, 5)], nothing, {}),
        ([(torch.ones(3, 4), 1.0, n) for n in (2, 3, 4, 5)], nothing, {"dynamic": True}),
        ([(x, 2.5) for (x,) in sized(3, 5, 6)], nothing, {}),
    ],
    ids=["auto", "dynamic", "static", "marked", "maybe", "ints", "dynamic ints", "one float"],
)
def test_shapes_and_numbers_compile_as_often_as_without_kernels(
    calls: list[tuple[Any, ...]], prepare: Any, kwargs: Any
) -> None:
    """After each call there were as many compiles as torch.compile needs for the plain model."""
    layer = Layer()
    model = nn.Sequential(layer) if len(calls[0]) == 1 else layer
    made = compiles(model, ours, calls, prepare, **kwargs)
    assert_all_kernels()
    without = compiles(Plain(layer), plain, calls, prepare, **kwargs)
    assert made == without


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("kwargs", [{}, {"dynamic": True}])
def test_dynamic_calls_are_right(inner: str, kwargs: Any) -> None:
    layer = Layer()
    f = torch.compile(
        layer, fullgraph=True, backend="hubkernels", options={"inner": inner}, **kwargs
    )
    for n, factor in ((3, 1.5), (5, 2.5), (6, 3.5), (7, 4.5)):
        x = torch.randn(n, 4)
        torch.testing.assert_close(f(x, factor, n), eagerly(layer, x, factor, n))
        assert_all_kernels()


def test_each_float_argument_compiles_once() -> None:
    """An op takes no symbol for a float: as under Inductor, each value has its own graph."""
    layer, counter, x = Layer(), Counter(), torch.randn(3, 4)
    f = compiled(layer, counter)
    for _ in range(2):
        for factor in (1.5, 2.5, 3.5):
            torch.testing.assert_close(f(x, factor), eagerly(layer, x, factor))
            assert_all_kernels()
    assert counter.graphs == 3


def test_float_computed_from_one_that_varies_compiles_once() -> None:
    layer, counter, x = Layer(), Counter(), torch.randn(3, 4)

    def model(x: Tensor, factor: float) -> Tensor:
        return layer(x, factor * 2) + factor

    f = compiled(model, counter)
    for factor in (1.5, 2.5, 3.5):
        torch.testing.assert_close(f(x, factor), eagerly(layer, x, factor * 2) + factor)
        assert_all_kernels()
    assert counter.graphs == 3


@use_kernel_forward_from_hub("PlusOne")
class PlusOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Lists(nn.Module):
    """Looks at sizes before it fails on fake tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(x.tolist()) + 10


@pytest.mark.parametrize("how", ["dynamic", "marked"])
def test_kernel_that_runs_on_no_fake_guards_no_sizes(how: str) -> None:
    counter = Counter()
    run = compiled(nn.Sequential(PlusOne()), counter, dynamic=True if how == "dynamic" else None)
    with use_kernel_mapping(on_cpu(PlusOne=Lists)):
        for length in (3, 5, 8):
            x = torch.ones(length, 2)
            if how == "marked":
                torch._dynamo.mark_dynamic(x, 0)
            assert torch.equal(run(x), x + 10)
    assert counter.graphs == 1
