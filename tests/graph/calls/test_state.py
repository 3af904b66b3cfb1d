"""What a forward reads of its layer, and the object that stands in for the layer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import functools
import linecache
import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from kernelgraph.graph.calls.attribute_reads import CALL, EVERYTHING, uses
from kernelgraph.graph.calls.constants import same
from kernelgraph.graph.calls.stand_in import new_stand_in
from kernelgraph.graph.calls.state import State, UnsupportedState, describe
from kernelgraph.graph.calls.trees import read


def module_level(x: Tensor) -> Tensor:
    return x + 1


# --- attribute_reads ----------------------------------------------------------------------------


def chains(self, x):
    return x * self.weight + self.config.inner.eps if self.training else self.proj.weight.shape[0]


def method(self, x):
    return self.helper(x) + self.scale


def nested(self, x):
    def inner(y):
        return y * self.a

    return inner(x) + (lambda y: y + self.b)(x) + sum(self.c for _ in range(2))


def nested_other_self(self, x):
    return (lambda self: self.a)(x)


def passed_on(self, x):
    return module_level(self)


def by_getattr(self, x):
    return getattr(self, "bias", None)


def by_a_computed_name(self, x):
    return getattr(self, x)


def by_super(self, x):
    return super().forward(x)  # type: ignore[misc]


def by_locals(self, x):
    return locals()["self"].weight


def posonly(this, /, x):
    return this.weight


def renamed(module, x, *, self=None):
    return module.weight + (self or 0)


def rebound(self, x):
    self = x
    return self.weight


def private(self, x):
    return self.__weight


def f_string(self, x):
    return f"{self.name}"


def subscripts(self, x):
    return self.table[self.index], x[..., : self.size]


def reads_nothing(self, x):
    return x


async def coroutine(self, x):
    return self.weight


def no_self(*args):
    return args[0].weight


def with_default(self, x, scale=None):
    return self.weight.sum().item() if scale is None else x


@torch.no_grad()
def decorated(self, x):
    return self.weight


def through_wraps(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return function(self, x) * self.hidden

    return wrapper


wrapped = through_wraps(reads_nothing)
in_a_lambda = lambda self, x: self.weight  # noqa: E731
partial = functools.partial(reads_nothing)
namespace: dict[str, Any] = {}
exec("def without_source(self, x):\n    return self.weight", namespace)


@pytest.mark.parametrize(
    ("forward", "reads"),
    [
        (
            chains,
            {("weight",), ("config", "inner", "eps"), ("training",), ("proj", "weight", "shape")},
        ),
        (method, {("helper", CALL), ("scale",)}),
        (nested, {("a",), ("b",), ("c",)}),
        (nested_other_self, {("a",)}),
        (passed_on, EVERYTHING),
        (by_getattr, {("bias",)}),
        (by_a_computed_name, EVERYTHING),
        (by_super, EVERYTHING),
        (by_locals, EVERYTHING),
        (posonly, {("weight",)}),
        (renamed, {("weight",)}),
        (rebound, EVERYTHING),
        (private, EVERYTHING),
        (f_string, {("name",)}),
        (subscripts, {("table",), ("index",), ("size",)}),
        (reads_nothing, set()),
        (coroutine, EVERYTHING),
        (no_self, EVERYTHING),
        (with_default, {("weight", "sum", CALL)}),
        (decorated, EVERYTHING),
        (wrapped, EVERYTHING),
        (in_a_lambda, EVERYTHING),
        (partial, EVERYTHING),
        (namespace["without_source"], EVERYTHING),
        (torch.relu, EVERYTHING),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_reads_are_told_from_the_source(forward, reads):
    assert uses(forward).reads == reads


def sets(self, x):
    self.last = x
    self.a.b = x


def deletes(self, x):
    del self.cache


def adds(self, x):
    self.count += 1
    return x


def unpacks(self, x):
    self.a, *self.b = x
    for self.c in x:
        pass
    with contextlib.nullcontext() as self.d:
        pass


@pytest.mark.parametrize(
    ("forward", "writes"),
    [
        (sets, {("last",), ("a", "b")}),
        (deletes, {("cache",)}),
        (adds, set()),
        (unpacks, {("a",), ("b",), ("c",), ("d",)}),
        (chains, set()),
        (passed_on, set()),
    ],
)
def test_writes_are_told_from_the_source(forward, writes):
    assert uses(forward).writes == writes


def test_what_is_added_to_is_read_too():
    assert uses(adds).updates == uses(adds).reads == {("count",)}
    with pytest.raises(UnsupportedState, match=r"adds sets self\.count, which a custom op cannot"):
        State.of(_with_count(1), [adds])
    with pytest.raises(UnsupportedState, match=r"adds sets self\.count"):
        State.of(_with_count(nn.Parameter(torch.ones(1))), [adds])
    assert State.of(_with_count(torch.ones(1)), [adds]).tensors == (("count",),)  # in place


def _with_count(count: Any) -> nn.Module:
    module = nn.Module()
    module.count = count
    return module


def test_source_that_changed_after_the_import_is_not_believed(tmp_path):
    file = tmp_path / "edited.py"
    file.write_text("def forward(self, x):\n    return self.before\n")
    module: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), module)
    file.write_text("def other(this):\n    return this.after\n")
    linecache.checkcache()
    assert uses(module["forward"]).reads == EVERYTHING


# --- State.of -----------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = "red"


class Point(NamedTuple):
    x: int
    y: float


@dataclasses.dataclass
class Config:
    scale: float
    sizes: list[int]
    mask: Tensor

    def total(self) -> float:
        return self.scale * len(self.sizes)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x))


TANH_GELU = functools.partial(functional.gelu, approximate="tanh")


class Everything(nn.Module):
    scale = 2.0
    classes: Any = (torch.float32, None)
    table = torch.arange(3.0)
    act = staticmethod(module_level)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_parameter("bias", None)
        self.register_buffer("running", torch.zeros(2))
        self.plain = torch.full((2,), 3.0)
        self.eps = 1e-5
        self.size = 2
        self.huge = 2**70
        self.flag = True
        self.name = "n"
        self.shape = (2, 3.5, "x")
        self.point = Point(1, 2.0)
        self.dtype = torch.bfloat16
        self.color = Color.RED
        self.function = functional.silu
        self.builtin = torch.relu
        self.partial = TANH_GELU
        self.cls = nn.Linear
        self.inner = Inner()
        self.blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])
        self.config = SimpleNamespace(
            inner=SimpleNamespace(eps=0.5), mask=torch.ones(2), items=[1], get=self.helper
        )
        self.listed = [1, 2]
        self.opaque = iter("")
        self.pair = (torch.ones(2), [torch.zeros(2), 3])

    @property
    def prop(self) -> Tensor:
        return self.weight

    def helper(self, x: Tensor) -> Tensor:
        return x * self.weight

    def hidden(self, x: Tensor) -> Tensor:
        return module_level(self)  # type: ignore[arg-type]

    def twice(self, x: Tensor) -> Tensor:
        return self.helper(self.inner(x)) if len(x) else self.twice(x)

    def counts(self, x: Tensor) -> Tensor:
        self.count = 1
        return x


def source(body: str) -> Callable[..., Any]:
    """A forward with ``body``, whose source Python can find."""
    text = f"def forward(self, x):\n    return {body}\n"
    name = f"<{body}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    found: dict[str, Any] = {}
    exec(compile(text, name, "exec"), {"torch": torch}, found)
    return found["forward"]


def state_of(body: str, module: nn.Module | None = None) -> State:
    return State.of(module if module is not None else Everything(), [source(body)])


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ("self.weight", "tensors", (("weight",),)),
        ("self.running", "tensors", (("running",),)),
        ("self.plain", "tensors", (("plain",),)),
        ("self.table", "tensors", (("table",),)),
        ("self.weight.shape[0]", "tensors", (("weight",),)),
        ("self.config.mask", "tensors", (("config", "mask"),)),
        ("self.inner.linear.weight", "tensors", (("inner", "linear", "weight"),)),
        ("self.eps", "numbers", ((("eps",), 1e-5),)),
        ("self.size", "numbers", ((("size",), 2),)),
        ("self.scale", "numbers", ((("scale",), 2.0),)),
        ("self.config.inner.eps", "numbers", ((("config", "inner", "eps"), 0.5),)),
        ("self.huge", "constants", ((("huge",), 2**70),)),
        ("self.bias", "constants", ((("bias",), None),)),
        ("self.flag", "constants", ((("flag",), True),)),
        ("self.training", "constants", ((("training",), True),)),
        ("self.name", "constants", ((("name",), "n"),)),
        ("self.shape", "constants", ((("shape",), (2, 3.5, "x")),)),
        ("self.point.x", "constants", ((("point",), Point(1, 2.0)),)),
        ("self.dtype", "constants", ((("dtype",), torch.bfloat16),)),
        ("self.color", "constants", ((("color",), Color.RED),)),
        ("self.function(x)", "constants", ((("function",), functional.silu),)),
        ("self.builtin(x)", "constants", ((("builtin",), torch.relu),)),
        ("self.partial(x)", "constants", ((("partial",), TANH_GELU),)),
        ("self.cls", "constants", ((("cls",), nn.Linear),)),
        ("self.classes", "constants", ((("classes",), (torch.float32, None)),)),
        ("self.inner.dropout.training", "constants", ((("inner", "dropout", "training"), True),)),
    ],
)
def test_a_value_is_an_operand_or_a_constant(body, field, value):
    state = state_of(body)
    assert getattr(state, field) == value
    others = {"tensors", "numbers", "constants"} - {field}
    assert not any(getattr(state, other) for other in others)


def test_what_needs_no_instance_reads_nothing_of_it():
    state = state_of("self.act(x)")
    assert (state.tensors, state.numbers, state.constants) == ((), (), ())


@pytest.mark.parametrize("body", ["self.inner(x)", "[m for m in self.inner.children()]"])
def test_a_submodule_is_read_whole(body):
    state = state_of(body)
    assert state.tensors == (("inner", "linear", "weight"),)
    assert dict(state.numbers)[("inner", "dropout", "p")] == 0.5
    assert dict(state.constants)[("inner", "linear", "bias")] is None
    assert dict(state.nodes)[("inner", "linear")] is nn.Linear


@pytest.mark.parametrize("body", ["self.hidden(x)", "self.named_parameters()", "torch.relu(self)"])
def test_members_that_may_read_anything_read_everything(body):
    state = state_of(body)
    assert {("weight",), ("running",), ("plain",), ("blocks", "11", "bias")} <= set(state.tensors)
    assert ("opaque",) in dict(state.untaken)
    assert dict(state.constants)[("listed",)] == [1, 2]
    assert dict(state.whole)[()] == tuple(
        k
        for k in [*vars(Everything()), "weight", "bias", "running", "inner", "blocks"]
        if k == "training" or not k.startswith("_")
    )


@pytest.mark.parametrize(
    ("body", "tensors"),
    [
        ("self.prop", {("weight",)}),
        ("self.helper(x)", {("weight",)}),
        ("self.inner(x)", {("inner", "linear", "weight")}),
        ("self.inner.forward(x)", {("inner", "linear", "weight")}),
        ("self.twice(x)", {("weight",), ("inner", "linear", "weight")}),
        ("getattr(self, 'weight')", {("weight",)}),
        ("self.pair[0]", {("pair", (0,)), ("pair", (1,), (0,))}),
    ],
)
def test_what_is_called_is_read_as_far_as_its_source_tells(body, tensors):
    assert set(state_of(body).tensors) == tensors


def test_objects_are_read_whole_where_they_are_used_whole():
    module = Everything()
    module.config = Config(0.5, [1], torch.ones(2))
    part, whole = state_of("self.config.scale", module), state_of("self.config.total()", module)
    assert (part.numbers, part.constants) == (((("config", "scale"), 0.5),), ())
    assert dict(part.nodes)[("config",)] is None
    assert dict(whole.nodes)[("config",)] is Config
    assert whole.tensors == (("config", "mask"),)
    assert dict(whole.constants) == {("config", "scale"): 0.5, ("config", "sizes"): [1]}


def test_an_object_without_a_dict_is_read_in_part_only():
    @dataclasses.dataclass(slots=True)
    class Slotted:
        scale: float = 0.5

        def total(self) -> float:
            return self.scale

    module = Everything()
    module.config = Slotted()
    assert state_of("self.config.scale", module).numbers == ((("config", "scale"), 0.5),)
    with pytest.raises(UnsupportedState, match=r"self\.config is a Slotted, which is neither"):
        state_of("self.config.total()", module)


def test_what_an_object_holds_counts_only_if_it_is_data():
    """A logger in a module that is read whole leads to every other in the process."""
    module = Everything()
    module.logger = logging.getLogger("toy")
    state = state_of("torch.relu(self)", module)
    assert dict(state.untaken)[("logger",)] == "Logger"


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        ("self.pair", "pair", (torch.ones(2), [torch.zeros(2), 4])),
        ("self.pair", "pair", (torch.ones(2), [torch.zeros(2)])),
        ("self.pair", "pair", [torch.ones(2), [torch.zeros(2), 3]]),
        ("self.listed", "listed", [1, 2.0]),
        ("self.listed", "listed", (1, 2)),
        ("self.gone", "gone", None),
        ("self.inner(x)", "inner", nn.Linear(2, 2)),
        ("torch.relu(self)", "added", 1),
        ("torch.relu(self)", "opaque", [1]),
        ("self.shape", "shape", (True, 2)),
    ],
)
def test_whatever_changes_is_guarded(body, name, value):
    """The guards of a state hold where it is that of the layer, and not otherwise."""
    module = Everything()
    module.shape = (1, 2)
    state = state_of(body, module)
    assert holds(state, module)
    assert holds(state, copy.deepcopy(module) if name != "opaque" else module)
    if isinstance(value, nn.Module):
        del module.inner
    setattr(module, name, value)
    assert not holds(state, module)


def holds(state: State, module: nn.Module) -> bool:
    then = Everything()
    then.shape = (1, 2)
    try:
        return (
            all(same(value, read(module, path)) for path, value in state.values)
            and all(type(read(module, p)) is type(read(then, p)) for p in state.types)
            and all(check(read(module, path)) for path, check in state.checks)
        )
    except (AttributeError, LookupError):  # so does a guard of Dynamo's
        return False


def test_several_forwards_read_together():
    state = State.of(Everything(), [source("self.weight"), source("self.eps + self.weight")])
    assert state.operands == (("weight",), ("eps",))
    assert state.values == ((("eps",), 1e-5),)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("self.opaque", "self.opaque is a str_"),
        ("self.config.get()", "self.config.get is a method, which is neither"),
        ("self.counts(x)", "Everything.counts sets self.count, which a custom op cannot"),
    ],
)
def test_what_cannot_be_carried_is_an_error(body, message):
    with pytest.raises(UnsupportedState, match=re.escape(message)):
        state_of(body)


def test_setting_an_attribute_is_an_error():
    def forward(self, x):
        self.last = x
        return x

    with pytest.raises(UnsupportedState, match=r"forward sets self\.last, which a custom op"):
        State.of(Everything(), [forward])


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def prehooked(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: None)


def patched(module: nn.Module) -> None:
    module.forward = lambda x: x + 1  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (hooked, "has forward hooks"),
        (prehooked, "has forward hooks"),
        (patched, "has a forward of its own"),
    ],
)
def test_a_submodule_that_computes_something_else_is_an_error(change, what):
    module = Everything()
    change(module.inner.linear)
    with pytest.raises(UnsupportedState, match=rf"^self\.inner\.linear {what}$"):
        state_of("self.inner(x)", module)
    change(module)
    assert state_of("self.weight", module).tensors == (("weight",),)  # its own are not the op's


@pytest.mark.parametrize("hold", [lambda module: module, lambda module: (module,)])
def test_a_module_above_is_not_state(hold):
    """However it is reached, as a child's reference to its parent say."""
    module = Everything()
    module.inner.__dict__["parent"] = hold(module)
    state = state_of("self.inner(x), torch.relu(self.inner)", module)
    assert ("inner", "parent") in dict(state.untaken)
    assert state.tensors == (("inner", "linear", "weight"),)


def test_an_absent_attribute_is_noted():
    assert state_of("self.gone.too + self.weight").absent == (("gone",),)
    assert state_of("self.inner.gone").absent == (("inner", "gone"),)
    assert state_of("self.weight").absent == ()


def make(factor):
    return lambda x: x * factor


@pytest.mark.parametrize(
    "function",
    [
        make(torch.ones(1)),  # state of its own
        make([1]),
        torch.ones(1).add,
        [].append,
        type("Local", (), {}),
        functools.partial(torch.add, torch.ones(1)),
        functools.partial(functional.gelu, approximate=["tanh"]),
    ],
    ids=[
        "closure-tensor",
        "closure-list",
        "bound-builtin",
        "bound-append",
        "class",
        "partial-tensor",
        "partial-list",
    ],
)
def test_a_callable_with_state_is_no_constant(function):
    module = Everything()
    module.function = function
    with pytest.raises(UnsupportedState, match=r"self\.function is a .* which is neither"):
        state_of("self.function(x)", module)


# --- describe -----------------------------------------------------------------------------------


def described(body: str, **attributes: Any) -> str:
    module = Everything()
    for name, value in attributes.items():
        setattr(module, name, value)
    return describe(state_of(body, module))


@pytest.mark.parametrize(
    ("body", "one", "other"),
    [
        ("self.function(x)", make(1), make(2)),
        ("self.function(x)", lambda x: x, lambda x: -x),
        ("self.function(x)", functional.silu, functional.gelu),
        ("self.function(x)", torch.relu, torch.tanh),
        ("self.function(x)", functools.partial(functional.gelu), functional.gelu),
        ("self.function(x)", TANH_GELU, functools.partial(functional.gelu, approximate="none")),
        ("self.function(x)", functools.partial(torch.add, 1), functools.partial(torch.add, 2)),
        ("self.flag", True, False),
        ("self.flag", 1j, True),
        ("self.shape", (1, 2), (1.0, 2)),
        ("self.shape", (True, 2), (1, 2)),
        ("self.point", Point(1, 2), (1, 2)),
        ("self.dtype", torch.float32, torch.float64),
        ("self.name", "a", "b"),
        ("self.name", "None", None),
        ("self.inner(x)", nn.Linear(2, 2), nn.Linear(2, 2, bias=False)),
        ("self.inner(x)", nn.SiLU(), nn.GELU()),
    ],
)
def test_other_constants_are_described_otherwise(body, one, other):
    name = re.search(r"self\.(\w+)", body)[1]
    assert described(body, **{name: one}) == described(body, **{name: one})
    assert described(body, **{name: one}) != described(body, **{name: other})


def test_classes_of_one_name_with_other_code_are_described_otherwise():
    def of(sign):
        class Block(nn.Module):
            if sign > 0:

                def forward(self, x):
                    return x
            else:

                def forward(self, x):
                    return -x

        return described("self.inner(x)", inner=Block())

    assert of(1) == of(1)
    assert of(1) != of(-1)


def test_numbers_are_operands_and_not_described():
    assert described("self.eps", eps=1.0) == described("self.eps", eps=2.0)


# --- new_stand_in ----------------------------------------------------------------------------------


def fill(state: State, module: nn.Module) -> Any:
    shell = new_stand_in(state)
    assert not tensors_of(shell.module)
    for (container, key), path in zip(shell.slots, state.operands, strict=True):
        container[key] = read(module, path)
    return shell.module


def tensors_of(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Every tensor that hangs on a shell."""
    seen = seen if seen is not None else set()
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v, seen)]
    if isinstance(value, (nn.Module, SimpleNamespace)):
        return tensors_of(vars(value), seen)
    return []


def test_a_shell_is_an_instance_of_its_class():
    module = Everything().eval()
    shell = fill(state_of("torch.relu(self)", module), module)
    assert type(shell) is Everything
    assert type(shell.inner) is Inner
    assert torch.equal(shell.prop, module.weight)
    assert shell.prop is module.weight
    assert not shell.inner.dropout.training


def test_a_shell_has_the_parameters_of_its_module_in_their_order():
    module = Everything()
    shell = fill(state_of("sum(p.sum() for p in self.parameters())", module), module)
    assert [n for n, _ in shell.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert [n for n, _ in shell.named_buffers()] == [n for n, _ in module.named_buffers()]
    assert [n for n, _ in shell.named_modules()] == [n for n, _ in module.named_modules()]
    assert all(a is b for a, b in zip(shell.parameters(), module.parameters(), strict=True))
    assert shell.plain is module.plain


def test_a_list_of_more_than_ten_modules_keeps_its_order():
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(12)])
    for i, block in enumerate(module.blocks):
        block.weight.data.fill_(i)
    for body in ("self.blocks", "self.blocks[0].weight, self.blocks", "self"):
        shell = fill(state_of(body, module), module)
        assert [block.weight.item() for block in shell.blocks] == list(range(12))


def test_a_module_that_is_read_in_part_and_whole_keeps_its_order():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(1, 1)
            self.a_second = nn.Linear(1, 1)

        def helper(self):
            return list(self.children())

    module = nn.Module()
    module.two = Two()
    shell = fill(state_of("self.two.a_second.weight, self.two.helper()", module), module)
    assert [name for name, _ in shell.two.named_children()] == ["first", "a_second"]


def test_parametrized_weights():
    class Doubled(nn.Module):
        def forward(self, x):
            return x * 2

    linear = nn.Linear(2, 2)
    parametrize.register_parametrization(linear, "weight", Doubled())
    module = nn.Module()
    module.inner = linear
    shell = fill(state_of("self.inner(x)", module), module)
    x = torch.randn(3, 2)
    assert torch.equal(shell.inner(x), linear(x))


def leaf_modules():
    return st.one_of(
        st.builds(nn.Linear, st.just(4), st.just(4), bias=st.booleans()),
        st.builds(nn.LayerNorm, st.just(4), elementwise_affine=st.booleans()),
        st.builds(nn.RMSNorm, st.just(4)),
        st.builds(nn.BatchNorm1d, st.just(4), track_running_stats=st.booleans()),
        st.builds(nn.Dropout, st.just(0.0)),
        st.sampled_from([nn.SiLU(), nn.GELU(), nn.Softmax(-1), nn.PReLU()]),
        st.builds(lambda: nn.Embedding(4, 4)).map(Looked),
    )


class Looked(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table
        self.offset = 1

    def forward(self, x):
        return x + self.table(torch.arange(self.offset, 4)).sum(0)


class Residual(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.factor = 0.5

    def forward(self, x):
        for part in self.inside:
            x = x + part(x) * self.factor
        return x


modules = st.recursive(
    leaf_modules(),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map(lambda ms: nn.Sequential(*ms)),
        st.lists(inner, min_size=1, max_size=13).map(lambda ms: Residual(nn.ModuleList(ms))),
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(modules, st.booleans())
def test_a_forward_gives_the_same_on_the_shell(module, whole):
    module.eval()
    forwards = [namespace["without_source"] if whole else type(module).forward]
    state = State.of(module, forwards)
    shell = fill(state, module)
    x = torch.randn(3, 4)
    assert torch.equal(type(module).forward(shell, x), module(x))
    assert describe(State.of(module, forwards)) == describe(state)
