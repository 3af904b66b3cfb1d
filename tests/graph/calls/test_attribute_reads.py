"""The attribute chains that a function reads and sets, from its source."""

from __future__ import annotations

import contextlib
import functools
import linecache
from typing import Any

import pytest
import torch
from torch import nn

from kernelgraph.graph.calls.attribute_reads import CALL, EVERYTHING, takes_identity, uses
from kernelgraph.graph.calls.state import State, UnsupportedState
from tests.support.layer_states import module_level, without_source


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
        (without_source, EVERYTHING),
        (torch.relu, EVERYTHING),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_uses_returns_the_reads_in_the_source(forward, reads):
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
def test_uses_returns_the_writes_in_the_source(forward, writes):
    assert uses(forward).writes == writes


def test_augmented_assignment_is_a_read_too():
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


TABLE: dict[int, int] = {}


def by_identity(self):
    return TABLE.get(id(self))


def by_helper(self):
    return by_identity(self)


def by_closure(identity=id):
    def forward(self):
        return identity(self)

    return forward


def of_another_meaning(self):
    return self.id, self.hash(self)


@pytest.mark.parametrize(
    ("forward", "takes"),
    [(by_identity, True), (by_helper, True), (by_closure(), True), (of_another_meaning, False)],
)
def test_identity_that_a_forward_asks_for_is_found(forward, takes):
    assert takes_identity(forward) == takes


def test_source_that_changed_after_the_import_is_ignored(tmp_path):
    file = tmp_path / "edited.py"
    file.write_text("def forward(self, x):\n    return self.before\n")
    module: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), module)
    file.write_text("def other(this):\n    return this.after\n")
    linecache.checkcache()
    assert uses(module["forward"]).reads == EVERYTHING
