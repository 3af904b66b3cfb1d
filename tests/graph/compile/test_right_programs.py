"""A compiled program with right kernels does what it does in eager use without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.support.right_programs import Program, assert_changes_nothing

INNER = ["eager", "aot_eager", "inductor"]


class Layer(nn.Module):
    """Has state of several kinds, of which a forward reads some."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = 1.0
        self.config = [1.0, {"shift": 2.0}]
        self.calls = 0
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))


def layer(forward: Any) -> Any:
    """A class of layers with this forward."""
    return type("Made", (Layer,), {"forward": forward})


def program(
    forward: Any, kernel: Any, run: Any = None, inputs: Any = None, keeps: str = ""
) -> Program:
    return Program(
        layer(forward),
        kernel,
        run or (lambda m, *args: m(*args)),
        inputs or (lambda: [torch.arange(6.0).view(2, 3) + 1]),
        keeps,
    )


# --- state that is set in the graph --------------------------------------------------------------


def scaled(self, x):
    return x * self.scale


def scaled_otherwise(self, x):
    return torch.mul(self.scale, x)


def sets_a_number(m, x):
    before = m(x)
    m.scale = 5.0
    return before, m(x)


def by_config(self, x):
    return x * self.config[0] + self.config[1]["shift"]


def by_config_otherwise(self, x):
    return torch.add(self.config[1]["shift"], x * self.config[0])


def sets_an_item(m, x):
    m.config[0] = 7.0
    return m(x)


def sets_a_nested_item(m, x):
    m.config[1]["shift"] = 7.0
    return m(x)


def by_mode(self, x):
    return x * 2 if self.training else x * 3


def by_mode_otherwise(self, x):
    return x + x if self.training else x + x + x


def switches_to_eval(m, x):
    m.eval()
    return m(x)


class Switched:
    """A context manager that switches something off, as adapters are."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.module.scale = 0.0

    def __exit__(self, *_: object) -> None:
        self.module.scale = 1.0


def switches_for_one_call(m, x):
    with Switched(m):
        first = m(x)
    return first, m(x)


def deletes(m, x):
    del m.scale
    return m(x)


def scaled_if_there(self, x):
    return x * self.scale if hasattr(self, "scale") else x * 9


def sets_a_tensor(m, x):
    m.mean = m.mean + 4
    return m(x)


def shifted(self, x):
    return x + self.mean


def shifted_otherwise(self, x):
    return torch.add(self.mean, x)


SET = "is set in the graph"
PENDING = {
    "a list item": program(by_config, by_config_otherwise, sets_an_item, keeps=SET),
    "a nested item": program(by_config, by_config_otherwise, sets_a_nested_item, keeps=SET),
    "eval": program(by_mode, by_mode_otherwise, switches_to_eval, keeps=SET),
    "a tensor": program(shifted, shifted_otherwise, sets_a_tensor),
}


@pytest.mark.parametrize("name", PENDING)
@pytest.mark.parametrize("inner", INNER)
def test_state_that_the_graph_sets_before_a_call_counts(name, inner):
    assert_changes_nothing(PENDING[name], inner)


@pytest.mark.parametrize("run", [sets_a_number, switches_for_one_call])
def test_calls_before_and_after_a_change_are_told_apart(run):
    made = program(scaled, scaled_otherwise, run, lambda: [torch.ones(2, 3)])
    with pytest.raises(AssertionError, match="scale is set in the graph"):
        assert_changes_nothing(made, "eager")  # all the rest was found to be the same


def test_attribute_that_the_graph_deletes_is_missing():
    made = program(scaled_if_there, scaled_if_there, deletes, keeps=SET)
    assert_changes_nothing(made, "eager", calls=1)


# --- writes --------------------------------------------------------------------------------------


def normalized(self, x):
    return F.batch_norm(x, self.mean, self.var, self.weight, training=self.training)


def normalized_otherwise(self, x):
    mean, var = x.mean(0), x.var(0, unbiased=False)
    with torch.no_grad():
        self.mean.mul_(0.9).add_(mean * 0.1)
        self.var.mul_(0.9).add_(x.var(0) * 0.1)
    return (x - mean) / (var + 1e-5).sqrt() * self.weight


def doubled(self, x):
    return x * 2


def doubled_in_place(self, x):
    array = x.detach().numpy()
    array *= 2
    return x.detach() * 1


def used_again(m, x):
    y = x * 1
    return m(y), y + 1, m(y)


def of_heads(m, x):
    """Calls the layer with heads that are a transposed view, as rotary embeddings are."""
    q = (x * 1).view(2, 3, 1).transpose(0, 1)
    return m(q), q + 1, m(q)


def doubled_in_place_if_transposed(self, x):
    if x.is_contiguous():
        return x + x
    return doubled_in_place(self, x)


def negates(self, x):
    x.neg_()


def negates_otherwise(self, x):
    x.mul_(-1)


def twice_in_place(m, x):
    y = x * 1
    return m(y), m(y), y


WRITES = {
    "batch norm": program(normalized, normalized_otherwise),
    "a kernel that writes into its argument": program(doubled, doubled_in_place, used_again),
    "a kernel that writes into views": program(doubled, doubled_in_place_if_transposed, of_heads),
    "a layer that returns nothing": program(negates, negates_otherwise, twice_in_place),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("grad", [False, True])
def test_writes_are_those_of_the_layer(name, inner, grad):
    if name == "a kernel that writes into views" and grad:
        pytest.skip("numpy cannot write into what requires a gradient")
    assert_changes_nothing(WRITES[name], inner, grad=grad)


def writes_one(self, x, y):
    x.mul_(2)
    return y * 1


def writes_one_otherwise(self, x, y):
    x.add_(x.clone())
    return 1 * y


def of_one_memory(m, base):
    return m(base[:1], base[:]), m(base[1:], base)


@pytest.mark.parametrize("inner", INNER)
def test_write_into_one_of_two_arguments_shows_in_the_other(inner):
    assert_changes_nothing(program(writes_one, writes_one_otherwise, of_one_memory), inner)


@pytest.mark.parametrize("inner", INNER)
def test_arguments_may_come_to_share_memory_in_a_later_call(inner):
    def inputs():
        count.append(1)
        base = torch.arange(9.0)
        return [base[:6], base[3:]] if len(count) % 2 == 0 else [base[:6], torch.ones(6)]

    count: list[int] = []
    assert_changes_nothing(program(writes_one, writes_one_otherwise, None, inputs), inner)


# --- containers ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Cache:
    key: Tensor | None = None


def fills_a_dict(self, x, cache):
    cache["k"] = x * 2
    return x + 1


def fills_a_list(self, x, cache):
    cache[0].append(x * 2)
    return x + 1


def fills_a_field(self, x, cache):
    cache.key = x * 2
    return x + 1


CONTAINERS = {
    "a dict": (fills_a_dict, dict),
    "a nested list": (fills_a_list, lambda: [[]]),
    "a field": (fills_a_field, Cache),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("grad", [False, True])
def test_containers_that_are_arguments_are_filled(name, inner, grad):
    forward, make = CONTAINERS[name]
    inputs = lambda: [torch.ones(2, 3), make()]  # noqa: E731
    keeps = "changes a container that is an argument"
    assert_changes_nothing(program(forward, forward, None, inputs, keeps), inner, grad=grad)


# --- memory and layout of results ----------------------------------------------------------------


def passes_on(self, x, y):
    return x * 2, y


def passes_on_a_copy(self, x, y):
    return x + x, y * 1


def writes_into_the_result(m, x, y):
    y = y * 1
    first, second = m(x, y)
    second.add_(1)
    return first, second, y


def as_a_view(self, x, y):
    return x * 2, y[0]


def two_views(self, x, y):
    both = torch.cat([x, y]) * 2
    return both[:2], both[1:]


def two_views_otherwise(self, x, y):
    return two_views(self, x, y)


def halves(self, x, y):
    return (torch.cat([x, y], 1) * 2).chunk(2, 1)


def halves_otherwise(self, x, y):
    return x + x, y + y


def writes_into_the_first(m, x, y):
    first, second = m(x, y)
    first.add_(1)
    return first, second


def two():
    return [torch.ones(2, 3), torch.arange(6.0).view(2, 3)]


RESULTS = {
    "an argument": program(passes_on, passes_on_a_copy, writes_into_the_result, two),
    "a view": program(as_a_view, as_a_view, writes_into_the_result, two, "returns a view of y"),
    "views of one memory": program(
        two_views, two_views_otherwise, writes_into_the_first, two, "tensors that share memory"
    ),
    "halves of one memory": program(halves, halves_otherwise, writes_into_the_first, two),
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("grad", [False, True])
def test_results_share_the_memory_that_the_layer_shares(name, inner, grad):
    if grad and name in ("a view", "views of one memory", "halves of one memory"):
        grad = False  # autograd forbids writes into some of these views
    assert_changes_nothing(RESULTS[name], inner, grad=grad)


def turned(self, x):
    return (x.transpose(1, 2) * 2).contiguous().transpose(1, 2)


def doubled_as_it_lies(self, x):
    return x.contiguous() * 2


def viewed(m, x):
    return m(x).transpose(1, 2).view(2, 12)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("grad", [False, True])
def test_results_have_the_strides_of_the_layer(inner, grad):
    inputs = lambda: [torch.arange(24.0).view(2, 3, 4)]  # noqa: E731
    made = program(turned, doubled_as_it_lies, viewed, inputs)
    assert_changes_nothing(made, inner, grad=grad)


@pytest.mark.parametrize("inner", INNER)
def test_result_of_one_element_has_the_stride_of_the_layer(inner):
    made = program(
        lambda self, x: x.sum().reshape(1),
        lambda self, x: (x.sum() * torch.ones(1, 5))[:, 0],
        lambda m, x: m(x).view(torch.int32),
    )
    assert_changes_nothing(made, inner)


# --- random numbers ------------------------------------------------------------------------------


def drops(self, x):
    return F.dropout(x, 0.5, self.training) * 2


def drops_otherwise(self, x):
    return 2 * F.dropout(x, 0.5, self.training)


def draws(self, x):
    torch.rand(3)
    return x + x


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_random_stream_is_that_of_the_layer(inner, grad):
    twice = lambda m, x: (m(x), m(x))  # noqa: E731
    made = program(drops, drops_otherwise, twice, keeps="draws random numbers")
    assert_changes_nothing(made, inner, grad=grad)
    quiet = program(drops, drops_otherwise, twice)
    training, quiet.layer = quiet.layer, lambda: training().eval()
    assert_changes_nothing(quiet, inner, grad=grad)


def test_kernel_that_draws_gives_way_to_the_layer(caplog):
    made, why = program(doubled, draws), "it draws random numbers, and the layer does not"
    assert_changes_nothing(made, "inductor")
    assert why in caplog.text
    made.keeps = why  # the next compile knows it
    assert_changes_nothing(made, "eager")


# --- changes of shape in place -------------------------------------------------------------------


def turns_in_place(self, x):
    x.t_()
    return x * 2


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_shape_that_the_layer_changes_in_place_is_changed(inner):
    keeps = "changes the shape or strides of x in place"
    assert_changes_nothing(program(turns_in_place, turns_in_place, keeps=keeps), inner)
