"""Kernels may read any state of a layer that eager kernels may read."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernelgraph import replace_kernel_forward_from_hub, use_kernel_mapping
from tests.support.compiled_models import check, compiled, hub_layer_of, kept_reasons
from tests.support.toy_models import on_cpu


class Kind(enum.Enum):
    PLAIN = "plain"
    SQUARE = "square"


class Sizes(NamedTuple):
    heads: int
    ratio: float


@dataclasses.dataclass
class Settings:
    scale: float = 2.0
    kind: Kind = Kind.PLAIN
    sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    inner: Any = None

    def total(self) -> float:
        return self.scale + sum(self.sizes)

    @property
    def halved(self) -> float:
        return self.scale / 2


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.top_k = 2

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.top_k


class Factor:
    def __init__(self) -> None:
        self.factor = 3.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


class Base(nn.Module):
    """A layer with every kind of state."""

    class_number = 3
    class_list = (1, 2.5)
    class_table = torch.arange(4.0)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
        self.register_buffer("running", torch.full((4,), 0.5))
        self.register_buffer("scratch", torch.ones(4), persistent=False)
        self.down_proj = nn.Linear(4, 4)
        self.router = Router()
        self.norm = nn.LayerNorm(4)
        self.act_fn = nn.SiLU()
        self.act = functional.gelu
        self.partial = functools.partial(functional.gelu, approximate="tanh")
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.named = nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.params = nn.ParameterList([nn.Parameter(torch.ones(4) * i) for i in range(3)])
        self.param_dict = nn.ParameterDict({"a": nn.Parameter(torch.ones(4))})
        self.eps, self.size, self.name, self.flag = 0.25, 2, "plain", True
        self.dtype, self.kind, self.sizes = torch.float32, Kind.SQUARE, Sizes(2, 0.5)
        self.ints, self.table = [1, 2, 3], {"a": 1.0, "b": [2, 3], 4: None}
        self.names = {"x", "y"}
        self.tensors = [torch.ones(4), torch.ones(4) * 2]
        self.tensor_pair = (torch.ones(4) * 3, torch.ones(4) * 4)
        self.tensor_dict = {"k": torch.ones(4) * 5, "n": {"m": (torch.ones(4) * 6, 7)}}
        self.module_list = [nn.Linear(4, 4), nn.Linear(4, 4, bias=False)]
        self.config = Settings(inner=SimpleNamespace(eps=0.125, shape=[4, 4]))
        self.callable = Factor()
        self.parent = (nn.Sequential(nn.Identity()),)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight

    def _norm(self, x: Tensor) -> Tensor:
        return x / (x.square().mean() + self.eps)

    def _norm_twice(self, x: Tensor) -> Tensor:
        return self._norm(self._norm(x)) * self.doubled

    @property
    def doubled(self) -> Tensor:
        return self.weight * 2

    @staticmethod
    def _flip(x: Tensor) -> Tensor:
        return x.flip(-1)


class Layer(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def calls_a_submodule(self, x):
    return self.down_proj(x)


def reads_a_submodules_weight(self, x):
    return functional.linear(x, self.router.layer.weight) * self.router.top_k


def calls_a_nested_submodule(self, x):
    return self.router.layer(x) + self.router(x)


def calls_forward(self, x):
    return self.router.forward(x)


def parameters(self, x):
    return x + sum(p.sum() for p in self.parameters()) + len(list(self.buffers()))


def named_parameters(self, x):
    names = [n for n, _ in self.named_parameters()]
    return x + names.index("router.layer.bias") + dict(self.named_buffers())["running"]


def state_dict(self, x):
    state = self.state_dict()
    return x + len(state) + state["mlp.2.bias"] + ("scratch" in state) * 1000


def children(self, x):
    for _, child in self.named_children():
        if isinstance(child, nn.Linear):
            x = child(x)
    return x + sum(1 for _ in self.modules())


def module_list(self, x):
    for block in self.blocks:
        x = block(x)
    return x + self.blocks[1].weight[0] + len(self.blocks)


def module_dict(self, x):
    return self.named["down"](self.named["up"](x)) + len(self.named)


def sequential(self, x):
    return self.mlp(x) + self.mlp[2].bias


def parameter_list(self, x):
    return x + sum(self.params) + len(self.params) + self.params[2]


def parameter_dict(self, x):
    return x + self.param_dict["a"]


def python_values(self, x):
    assert self.name == "plain"
    assert self.flag
    assert self.kind is Kind.SQUARE
    assert self.bias is None
    return (x * self.eps + self.size).to(self.dtype) * self.sizes.ratio + self.sizes[0]


def lists(self, x):
    return x * self.ints[1] + len(self.ints) + sum(self.ints[1:])


def dicts(self, x):
    return x * self.table["a"] + self.table["b"][1] + (self.table[4] is None)


def sets(self, x):
    return x + ("x" in self.names) + len(self.names)


def tensors_in_a_list(self, x):
    return x + self.tensors[0] + sum(self.tensors)


def tensors_in_a_tuple(self, x):
    first, second = self.tensor_pair
    return x * first + second


def tensors_in_a_dict(self, x):
    tensor, number = self.tensor_dict["n"]["m"]
    return x + self.tensor_dict["k"] + tensor * number + list(self.tensor_dict).index("n")


def modules_in_a_list(self, x):
    return self.module_list[1](self.module_list[0](x))


def config_values(self, x):
    return x * self.config.scale + self.config.inner.eps + self.config.sizes[1]


def config_whole(self, x):
    config = self.config
    return x * config.scale + config.inner.eps + config.inner.shape[0] + config.total()


def config_methods(self, x):
    return x * self.config.total() + self.config.halved + (self.config.kind is Kind.PLAIN)


def training(self, x):
    return x + (100 if self.training else 200)


def functions(self, x):
    return self.act_fn(x) + self.act(x) + self.partial(x)


def methods(self, x):
    return self._norm(x) + self._flip(x)


def methods_in_methods(self, x):
    return self._norm_twice(x)


def properties(self, x):
    return x * self.doubled


def class_attributes(self, x):
    return x * self.class_number + self.class_list[1] + self.class_table


def a_callable_object(self, x):
    return self.callable(x)


def itself(self, x):
    def inside(module):
        return module.weight * module.eps + module.config.scale

    return x + inside(self)


def by_name(self, x):
    y = getattr(self, "absent", None)
    assert y is None
    assert not hasattr(self, "nor_this")
    return x * getattr(self, "eps") + getattr(self, "weight")  # noqa: B009


def by_computed_names(self, x):
    for name in ("weight", "running"):
        x = x * getattr(self, name)
    return x + vars(self)["size"] + self.__dict__["eps"]


def private_dicts(self, x):
    return x + self._parameters["weight"] + self._buffers["running"] + len(self._modules)


def the_class(self, x):
    return x + len(self.__class__.__name__) + isinstance(self, Base) + type(self).class_number


STATE = [
    calls_a_submodule,
    reads_a_submodules_weight,
    calls_a_nested_submodule,
    calls_forward,
    parameters,
    named_parameters,
    state_dict,
    children,
    module_list,
    module_dict,
    sequential,
    parameter_list,
    parameter_dict,
    python_values,
    lists,
    dicts,
    sets,
    tensors_in_a_list,
    tensors_in_a_tuple,
    tensors_in_a_dict,
    modules_in_a_list,
    config_values,
    config_whole,
    config_methods,
    training,
    functions,
    methods,
    methods_in_methods,
    properties,
    class_attributes,
    a_callable_object,
    itself,
    by_name,
    by_computed_names,
    private_dicts,
    the_class,
]


@pytest.mark.parametrize("forward", STATE)
def test_any_state_is_read_as_in_eager_mode(forward: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    check(Layer(), hub_layer_of(forward), torch.randn(3, 4))


@pytest.mark.parametrize("forward", STATE)
def test_any_state_is_read_inside_a_compiled_model(forward: Callable[..., Any]) -> None:
    """The other parts of the model are compiled with the layer."""
    torch.manual_seed(0)
    layer = Layer().eval()
    replace_kernel_forward_from_hub(Layer, "Layer")
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4))
    x = torch.randn(3, 4)
    with use_kernel_mapping(on_cpu(Layer=hub_layer_of(forward))), torch.no_grad():
        made = compiled(model, "aot_eager")(x)
        assert kept_reasons() == [""], kept_reasons()
        torch.testing.assert_close(made, model[2](forward(layer, model[0](x))))


def test_tensor_that_is_no_parameter_gets_its_gradient() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = [torch.ones(3, requires_grad=True)]

        def forward(self, x: Tensor) -> Tensor:
            return x * self.held[0]

    class HubLayer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.held[0] + 10

    replace_kernel_forward_from_hub(Layer, "Layer")
    layer, x = Layer(), torch.full((3,), 2.0)
    with use_kernel_mapping(on_cpu(Layer=HubLayer), inherit_mapping=False):
        made = compiled(layer, "aot_eager")(x)
    made.sum().backward()
    assert made.tolist() == [12, 12, 12]
    assert layer.held[0].grad is not None
    assert layer.held[0].grad.tolist() == [2, 2, 2]
