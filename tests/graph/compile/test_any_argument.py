"""Arguments and outputs of any structure pass through an op, inside one graph."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernelgraph import (
    Mode,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
    use_kernelized_func,
)
from tests.support.compiled_models import assert_alike, check, compiled, hub_layer_of, kept_reasons
from tests.support.toy_models import on_cpu

INNER = ["eager", "aot_eager"]


class Kind(enum.Enum):
    PLAIN = "plain"
    SQUARE = "square"


@dataclasses.dataclass
class Batch:
    hidden: Tensor
    mask: Tensor | None = None
    scale: float = 1.0
    kind: Kind = Kind.PLAIN


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    parts: tuple[Tensor, ...] = ()


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None = None


@dataclasses.dataclass
class Doubling:
    hidden: Tensor

    def __post_init__(self) -> None:
        self.hidden = self.hidden * 2


def case(reference: Callable[..., Any], make_args: Callable[[], Any], **kwargs: Any) -> Any:
    return pytest.param(reference, make_args, kwargs, id=reference.__name__)


def x_() -> Tensor:
    return torch.arange(12.0).view(3, 4) / 12


def optional_given(self, x, mask=None):
    return x + 1 if mask is None else x * mask


def optional_missing(self, x, mask=None):
    return x + 1 if mask is None else x * mask


def optional_none(self, x, mask=None):
    return x + 1 if mask is None else x * mask


def keyword_only(self, x, *, scale=2.0, shift):
    return x * scale + shift


def defaults(self, x, scale=2.0, kind=Kind.SQUARE, shape=(1, 2), name="n"):
    return x * scale + len(shape) + len(name) + (kind is Kind.SQUARE)


def variadic(self, x, *rest, **more):
    return sum(rest, x) * more["scale"] + more["others"][0]


def positional_only(self, x, y, /):
    return x + y


def list_of_tensors(self, xs):
    return sum(xs)


def dict_of_tensors(self, xs):
    return xs["a"] * xs["b"]["c"] + xs["n"]


def number(self, x, n, p):
    return x * n + p


def enumerated(self, x, kind):
    return x * x if kind is Kind.SQUARE else x


def dtype_and_device(self, x, dtype, device):
    return x.to(dtype).to(device)


def function(self, x, act):
    return act(x)


def dataclass_in(self, batch):
    y = batch.hidden * batch.scale
    return y if batch.mask is None else y * batch.mask


def frozen_in(self, batch):
    return batch.hidden + sum(batch.parts)


def named_tuple_in(self, pair):
    return pair.first if pair.second is None else pair.first + pair.second


def ordered_dict_in(self, xs):
    return xs["a"] + list(xs).index("b")


def nested_in(self, xs):
    return xs["a"][0].hidden + xs["a"][1].first


ARGUMENTS = [
    case(optional_given, lambda: (x_(), x_())),
    case(optional_missing, lambda: (x_(),)),
    case(optional_none, lambda: (x_(), None)),
    case(keyword_only, lambda: (x_(),), shift=1),
    case(defaults, lambda: (x_(), 3.0), name="nm"),
    case(variadic, lambda: (x_(), x_(), x_()), scale=2.0, others=[torch.ones(4)]),
    case(positional_only, lambda: (x_(), x_())),
    case(list_of_tensors, lambda: ([x_(), x_()],)),
    case(dict_of_tensors, lambda: ({"a": x_(), "b": {"c": x_()}, "n": 3},)),
    case(number, lambda: (x_(), 3, 0.5)),
    case(enumerated, lambda: (x_(), Kind.SQUARE)),
    case(dtype_and_device, lambda: (x_(), torch.float64, torch.device("cpu"))),
    case(function, lambda: (x_(), functional.silu)),
    case(dataclass_in, lambda: (Batch(x_(), x_(), 2.0),)),
    case(frozen_in, lambda: (Frozen(x_(), (x_(), x_())),)),
    case(named_tuple_in, lambda: (Pair(x_(), x_()),)),
    case(ordered_dict_in, lambda: (OrderedDict(a=x_(), b=x_()),)),
    case(nested_in, lambda: ({"a": [Batch(x_()), Pair(x_())]},)),
]


def tuple_out(self, x):
    return x + 1, x * 2


def nested_out(self, x):
    return x + 1, [x * 2, {"a": x * 3, "b": (None, -x)}]


def none_inside(self, x):
    return x + 1, None


def constants_out(self, x):
    return x + 1, 3, 2.5, "text", True, torch.float32, Kind.SQUARE


def sizes_out(self, x):
    return x + 1, x.shape[0], x.shape


def dict_out(self, x):
    return {"a": x + 1, "b": None, "n": 3}


def dataclass_out(self, x):
    return Batch(x + 1, mask=x * 2, kind=Kind.SQUARE)


def frozen_out(self, x):
    return Frozen(x + 1, (-x, x * 2))


def named_tuple_out(self, x):
    return Pair(x + 1)


def ordered_dict_out(self, x):
    return OrderedDict(b=x + 1, a=x * 2)


def dataclasses_out(self, x):
    return [Batch(x + 1), {"p": Pair(-x, x * 2)}]


OUTPUTS = [
    case(function_, lambda: (x_(),))
    for function_ in (
        tuple_out,
        nested_out,
        none_inside,
        constants_out,
        sizes_out,
        dict_out,
        dataclass_out,
        frozen_out,
        named_tuple_out,
        ordered_dict_out,
        dataclasses_out,
    )
]


def layer_and_kernel(reference: Callable[..., Any]) -> tuple[type[nn.Module], type[nn.Module]]:
    """A layer with ``reference``, and a kernel that adds 10 to each of its tensors, in numpy."""

    @functools.wraps(reference)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return each(reference(self, *args, **kwargs))

    def each(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy(value.numpy() + 10)
        if dataclasses.is_dataclass(value):
            fields = {f.name: each(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return type(value)(**fields)
        if isinstance(value, dict):
            return type(value)((k, each(v)) for k, v in value.items())
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            parts = map(each, value)
            return type(value)(*parts) if hasattr(value, "_make") else type(value)(parts)
        return value

    return type("Layer", (nn.Module,), {"forward": reference}), hub_layer_of(forward)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("reference", "make_args", "kwargs"), [*ARGUMENTS, *OUTPUTS])
def test_any_arguments_and_outputs_pass_through_an_op(
    reference: Callable[..., Any], make_args: Callable[[], Any], kwargs: Any, inner: str
) -> None:
    layer, hub_layer = layer_and_kernel(reference)
    check(layer(), hub_layer, *make_args(), inner=inner, **kwargs)


@pytest.mark.parametrize(("reference", "make_args", "kwargs"), [*ARGUMENTS, *OUTPUTS])
def test_any_arguments_may_be_made_in_the_graph(
    reference: Callable[..., Any], make_args: Callable[[], Any], kwargs: Any
) -> None:
    """Most models make and use a dataclass in code that is compiled too."""
    cls, hub_layer = layer_and_kernel(reference)
    layer = cls()

    def model(x: Tensor) -> Any:
        if reference is nested_in:
            return layer({"a": [Batch(x * 2), Pair(x)]})
        if reference is dataclass_in:
            return layer(Batch(x * 2, scale=3.0))
        if reference is frozen_in:
            return layer(Frozen(x * 2, (x, x + 1)))
        if reference is named_tuple_in:
            return layer(Pair(x * 2, x))
        if reference is ordered_dict_in:
            return layer(OrderedDict(a=x * 2, b=x))
        return layer(*make_args(), **kwargs)

    replace_kernel_forward_from_hub(cls, "Layer")
    with use_kernel_mapping(on_cpu(Layer=hub_layer), inherit_mapping=False), torch.no_grad():
        made = compiled(model)(x_())
        assert kept_reasons() == [""], kept_reasons()
        kernelize(layer, mode=Mode.INFERENCE, device="cpu")
        assert_alike(made, model(x_()))


def test_dataclass_that_changes_its_fields_keeps_the_reference() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Doubling(x)

    class HubLayer(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Doubling(x + 10)

    replace_kernel_forward_from_hub(Layer, "Layer")
    with use_kernel_mapping(on_cpu(Layer=HubLayer), inherit_mapping=False):
        made = compiled(Layer())(x_())
    torch.testing.assert_close(made.hidden, x_() * 2)
    assert "Doubling is passed or returned" in kept_reasons()[0]


def test_functions_with_any_arguments_become_ops() -> None:
    @use_kernel_forward_from_hub("rotate")
    def rotate(q: Tensor, k: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> Any:
        return q * scale, k * (1 if mask is None else mask)

    class Rotate(nn.Module):
        def forward(self, q, k, *, scale=1.0, mask=None):
            q, k = q.numpy() * scale + 10, (k if mask is None else k * mask).numpy() + 10
            return torch.from_numpy(q), torch.from_numpy(k)

    @use_kernelized_func(rotate)
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return rotate(x, k=x, mask=x), rotate(x, x, scale=2.0)

    model = Model()
    with use_kernel_mapping(on_cpu(rotate=Rotate), inherit_mapping=False), torch.no_grad():
        made = compiled(model)(x_())
        assert kept_reasons() == ["", ""]
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
        assert_alike(made, model(x_()))


def test_configs_and_outputs_of_transformers_pass_through_an_op() -> None:
    transformers = pytest.importorskip("transformers")
    output = transformers.modeling_outputs.BaseModelOutputWithPooling

    class Layer(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return output(self.proj(x.last_hidden_state) + head_size(self.config))

    def head_size(config: Any) -> int:
        return config.hidden_size // config.num_attention_heads

    class HubLayer(nn.Module):
        def forward(self, x: Any) -> Any:
            y = torch.from_numpy(self.proj(x.last_hidden_state).detach().numpy() + 10)
            return output(y + head_size(self.config))

    for config in (transformers.LlamaConfig(hidden_size=64), transformers.GPT2Config(n_head=4)):
        layer = Layer(config)
        given = output(torch.randn(3, 4), pooler_output=torch.ones(2))
        check(layer, HubLayer, given)
        made = compiled(lambda x, layer=layer: layer(output(x * 2)).last_hidden_state)
        assert made(torch.ones(3, 4)).shape == (3, 4)
