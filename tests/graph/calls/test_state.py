"""The state of a layer that a forward reads."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from kernelgraph.graph.calls.constants import same
from kernelgraph.graph.calls.state import State, UnsupportedState, describe
from kernelgraph.graph.calls.trees import read
from tests.support.layer_states import TANH_GELU, Color, Config, Everything, Point, source, state_of


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
def test_value_is_an_operand_or_a_constant(body, field, value):
    state = state_of(body)
    assert getattr(state, field) == value
    others = {"tensors", "numbers", "constants"} - {field}
    assert not any(getattr(state, other) for other in others)


def test_class_members_read_nothing_of_the_instance():
    state = state_of("self.act(x)")
    assert (state.tensors, state.numbers, state.constants) == ((), (), ())


@pytest.mark.parametrize("body", ["self.inner(x)", "[m for m in self.inner.children()]"])
def test_submodule_is_read_whole(body):
    state = state_of(body)
    assert state.tensors == (("inner", "linear", "weight"),)
    assert dict(state.numbers)[("inner", "dropout", "p")] == 0.5
    assert dict(state.constants)[("inner", "linear", "bias")] is None
    assert dict(state.nodes)[("inner", "linear")] is nn.Linear


@pytest.mark.parametrize("body", ["self.hidden(x)", "self.named_parameters()", "torch.relu(self)"])
def test_members_of_nn_module_read_everything(body):
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
def test_called_submodule_is_read_as_far_as_its_source_shows(body, tensors):
    assert set(state_of(body).tensors) == tensors


def test_object_is_read_whole_where_it_is_used_whole():
    module = Everything()
    module.config = Config(0.5, [1], torch.ones(2))
    part, whole = state_of("self.config.scale", module), state_of("self.config.total()", module)
    assert (part.numbers, part.constants) == (((("config", "scale"), 0.5),), ())
    assert dict(part.nodes)[("config",)] is None
    assert dict(whole.nodes)[("config",)] is Config
    assert whole.tensors == (("config", "mask"),)
    assert dict(whole.constants) == {("config", "scale"): 0.5, ("config", "sizes"): [1]}


def test_object_without_a_dict_is_read_only_in_part():
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


def test_object_parts_count_only_if_they_are_data():
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
def test_state_guards_every_change(body, name, value):
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


def test_state_covers_several_forwards():
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
def test_value_that_cannot_be_copied_is_an_error(body, message):
    with pytest.raises(UnsupportedState, match=re.escape(message)):
        state_of(body)


def test_forward_that_sets_an_attribute_is_an_error():
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
def test_submodule_with_hooks_or_own_forward_is_an_error(change, what):
    module = Everything()
    change(module.inner.linear)
    with pytest.raises(UnsupportedState, match=rf"^self\.inner\.linear {what}$"):
        state_of("self.inner(x)", module)
    change(module)
    assert state_of("self.weight", module).tensors == (("weight",),)  # its own are not the op's


@pytest.mark.parametrize("hold", [lambda module: module, lambda module: (module,)])
def test_module_above_is_not_state(hold):
    """However it is reached, as a child's reference to its parent say."""
    module = Everything()
    module.inner.__dict__["parent"] = hold(module)
    state = state_of("self.inner(x), torch.relu(self.inner)", module)
    assert ("inner", "parent") in dict(state.untaken)
    assert state.tensors == (("inner", "linear", "weight"),)


def test_absent_attribute_is_recorded():
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
def test_callable_with_state_is_no_constant(function):
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
def test_describe_differs_for_other_constants(body, one, other):
    name = re.search(r"self\.(\w+)", body)[1]
    assert described(body, **{name: one}) == described(body, **{name: one})
    assert described(body, **{name: one}) != described(body, **{name: other})


def test_describe_differs_for_classes_of_one_name_with_other_code():
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


def test_describe_excludes_numbers():
    assert described("self.eps", eps=1.0) == described("self.eps", eps=2.0)
