"""Whatever a kernel or layer does, it does with ``fullgraph=True`` too."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from kernelgraph import (
    Mode,
    kernelize,
    last_report,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
    use_kernelized_func,
)
from tests.support.toy_models import on_cpu

try:
    import triton
    from triton import language
except ImportError:
    triton = None

INNER = ["eager", "aot_eager"]


def compiled(model: Any, inner: Any = "eager", **options: Any) -> Any:
    # The toys add 10, which a kernel that is verified before it trains anything may not.
    options = {"inner": inner, "verify_gradients": False, **options}
    return torch.compile(model, backend="hubkernels", fullgraph=True, options=options)


def reasons() -> list[str]:
    """Of the last compile, why each layer keeps its reference; nothing for one with a kernel."""
    report = last_report()
    assert report is not None
    return ["" if d.op else f"{d.reason.name} {d.detail}" for d in report.decisions]


def assert_alike(one: Any, other: Any) -> None:
    """Two outputs have the same structure, types and values."""
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
    """The compiled layer does what the eager one does once it is kernelized."""
    replace_kernel_forward_from_hub(type(layer), "Layer")
    with use_kernel_mapping(on_cpu(Layer=hub_layer), inherit_mapping=False), torch.no_grad():
        made = compiled(layer, inner)(*args, **kwargs)
        assert reasons() == [""], reasons()
        kernelize(layer, mode=Mode.INFERENCE, device="cpu")
        assert "forward" in vars(layer)
        assert_alike(made, layer(*args, **kwargs))
        del layer.forward
        reference = layer(*args, **kwargs)
        if kernel_runs:
            with pytest.raises(AssertionError):
                assert_alike(made, reference)


# --- kernels that Dynamo could not trace --------------------------------------------------------


class Affine(nn.Module):
    """Doubles, and adds its weight; the kernels below add 10 to that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + self.weight


class InNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.add(2 * x.numpy(), self.weight.detach().numpy()) + 10)


class InCtypes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = (2 * x + self.weight).contiguous()
        values = (ctypes.c_float * out.numel()).from_address(out.data_ptr())
        for i in range(out.numel()):
            values[i] += 10.0
        return out


class InThreads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)

        def work(i: int) -> None:
            with torch.no_grad():  # a thread begins with gradients on, and they share `out`
                out[i] = 2 * x[i] + self.weight + 10

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(x))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out


class WithLogging(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        print("a kernel that prints")
        logging.getLogger("toy").warning("a kernel that logs %s", tuple(x.shape))
        return 2 * x + self.weight + 10


class WithItem(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        most = x.abs().max().item()
        rows = [[2 * v for v in row] for row in x.tolist()]
        return torch.tensor(rows) + self.weight + (10 if most >= 0 else 0)


class DoubleFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class WithAutogradFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return DoubleFunction.apply(x) + self.weight + 10


@torch.compile(backend="eager")
def doubled_and_broken(x: Tensor) -> Tensor:
    x = x * 2
    torch._dynamo.graph_break()
    return x + 10


class WithNestedCompile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return doubled_and_broken(x) + self.weight


class WithState:
    """Module-level state of a kernel's own."""

    calls = 0


class WithGlobals(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        WithState.calls += 1
        return torch.from_numpy(2 * x.numpy()) + self.weight + 10


class WithContextManagers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            noise = torch.rand(4)
        return 2 * x + self.weight + noise + 10


class WithTry(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return x.view(-1, 5)
        except RuntimeError:
            return 2 * x + self.weight + 10


KERNELS = [
    InNumpy,
    InCtypes,
    InThreads,
    WithLogging,
    WithItem,
    WithAutogradFunction,
    WithNestedCompile,
    WithGlobals,
    WithContextManagers,
    WithTry,
]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_of_any_kind(kernel: type[nn.Module], inner: str) -> None:
    check(Affine(), kernel, torch.randn(3, 4), inner=inner)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_of_any_kind_in_training(kernel: type[nn.Module]) -> None:
    layer, x = Affine(), torch.randn(3, 4, requires_grad=True)
    replace_kernel_forward_from_hub(Affine, "Layer")
    with use_kernel_mapping(on_cpu(Layer=kernel), inherit_mapping=False):
        # One returns what only looks like a function of its input.
        own = kernel is not WithItem
        compiled(layer, "aot_eager", own_backward=own)(x).sum().backward()
    assert reasons() == [""]
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert torch.equal(x.grad, torch.full((3, 4), 2.0))
    assert torch.equal(layer.weight.grad, torch.full((4,), 3.0))


if triton is not None:

    @triton.jit
    def double(x_ptr, out_ptr, n, block: language.constexpr):
        at = language.program_id(0) * block + language.arange(0, block)
        inside = at < n
        language.store(out_ptr + at, 2 * language.load(x_ptr + at, mask=inside), mask=inside)


class InTriton(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        with torch.cuda.device(x.device), torch.cuda.stream(torch.cuda.current_stream()):
            double[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), block=64)
        return out + self.weight + 10


@pytest.mark.cuda
@pytest.mark.parametrize("inner", [*INNER, "inductor"])
@pytest.mark.parametrize("kernel", [InTriton, WithNestedCompile, WithTry])
def test_kernels_on_a_device(kernel: type[nn.Module], inner: str) -> None:
    layer, x = Affine().cuda(), torch.randn(3, 4, device="cuda")
    replace_kernel_forward_from_hub(Affine, "Layer")
    mapping = {"Layer": {d: on_cpu(Layer=kernel)["Layer"]["cpu"] for d in ("cpu", "cuda")}}
    with use_kernel_mapping(mapping, inherit_mapping=False), torch.no_grad():
        torch.testing.assert_close(compiled(layer, inner)(x), layer(x) + 10)
    assert reasons() == [""]


# --- state ----------------------------------------------------------------------------------


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


def kernel(forward: Callable[..., Any]) -> type[nn.Module]:
    """A hub layer with ``forward``."""
    return type(f"Hub_{forward.__name__}", (nn.Module,), {"forward": forward})


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
def test_state_of_any_kind(forward: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    check(Layer(), kernel(forward), torch.randn(3, 4))


@pytest.mark.parametrize("forward", STATE)
def test_state_of_any_kind_under_the_layers_own_compile(forward: Callable[..., Any]) -> None:
    """The layer inside a model, whose other parts are compiled with it."""
    torch.manual_seed(0)
    layer = Layer().eval()
    replace_kernel_forward_from_hub(Layer, "Layer")
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4))
    x = torch.randn(3, 4)
    with use_kernel_mapping(on_cpu(Layer=kernel(forward))), torch.no_grad():
        made = compiled(model, "aot_eager")(x)
        assert reasons() == [""], reasons()
        torch.testing.assert_close(made, model[2](forward(layer, model[0](x))))


# --- arguments and outputs ----------------------------------------------------------------------


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
    return x + 1, [x * 2, {"a": x * 3, "b": (None, x)}]


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
    return Frozen(x + 1, (x, x * 2))


def named_tuple_out(self, x):
    return Pair(x + 1)


def ordered_dict_out(self, x):
    return OrderedDict(b=x + 1, a=x * 2)


def dataclasses_out(self, x):
    return [Batch(x + 1), {"p": Pair(x, x * 2)}]


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

    return type("Layer", (nn.Module,), {"forward": reference}), kernel(forward)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("reference", "make_args", "kwargs"), [*ARGUMENTS, *OUTPUTS])
def test_arguments_and_outputs_of_any_kind(
    reference: Callable[..., Any], make_args: Callable[[], Any], kwargs: Any, inner: str
) -> None:
    layer, hub_layer = layer_and_kernel(reference)
    check(layer(), hub_layer, *make_args(), inner=inner, **kwargs)


@pytest.mark.parametrize(("reference", "make_args", "kwargs"), [*ARGUMENTS, *OUTPUTS])
def test_arguments_that_are_made_in_the_graph(
    reference: Callable[..., Any], make_args: Callable[[], Any], kwargs: Any
) -> None:
    """As in most models: a dataclass comes from, and goes to, code that is compiled too."""
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
        assert reasons() == [""], reasons()
        kernelize(layer, mode=Mode.INFERENCE, device="cpu")
        assert_alike(made, model(x_()))


def test_a_dataclass_that_changes_what_it_is_given_keeps_the_reference() -> None:
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
    assert "Doubling is passed or returned" in reasons()[0]


def test_functions_of_any_kind() -> None:
    @use_kernel_forward_from_hub("rotate")
    def rotate(q: Tensor, k: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> Any:
        return q * scale, k if mask is None else k * mask

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
        assert reasons() == ["", ""]
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
        assert_alike(made, model(x_()))


# --- what keeps its reference -------------------------------------------------------------------


def kept(
    layer: nn.Module, hub_layer: type[nn.Module], *args: Any, **options: Any
) -> tuple[Any, str]:
    """The result of a compiled layer that keeps its reference, and why it does."""
    replace_kernel_forward_from_hub(type(layer), "Layer")
    with use_kernel_mapping(on_cpu(Layer=hub_layer), inherit_mapping=False):
        made = torch.compile(
            layer, backend="hubkernels", fullgraph=True, options={"inner": "eager"}, **options
        )(*args)
    (reason,) = reasons()
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
        (sets_by_name, "sets_by_name sets last of the layer"),
        (appends, "appends sets history of the layer"),
        (locks, "self.opaque is a lock, which is neither a tensor, a module, a constant nor made"),
    ],
)
def test_a_kernel_that_no_op_can_be_is_not_used(forward: Callable[..., Any], why: str) -> None:
    layer = Remembers()
    made, reason = kept(layer, kernel(forward), torch.ones(3))
    assert made.tolist() == [2, 2, 2]
    assert why in reason
    assert (layer.last, layer.history) == (None, [])


def test_a_number_that_is_no_constant_of_the_call() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x + 1, x.shape[0]

    class HubLayer(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x + 10, x.shape[0]

    (made, size), reason = kept(Layer(), HubLayer, torch.ones(3), dynamic=True)
    assert (made.tolist(), size) == ([2, 2, 2], 3)
    assert "a SymInt is passed or returned" in reason


def test_gradients_of_tensors_that_are_no_parameters() -> None:
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


# --- transformers' own ----------------------------------------------------------------------


def test_the_configs_and_outputs_of_transformers() -> None:
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
