"""Shape functions found by running a kernel for real."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from kernelgraph.graph.calls.runner import Runner
from kernelgraph.graph.calls.trees import UnsupportedValue
from kernelgraph.graph.infer.output_specs import OutputSpec, UnknownShape
from kernelgraph.graph.infer.probe import Formula, Probe, explain
from tests.support.op_calls import call_of


def layer(forward: Any, **attributes: Any) -> nn.Module:
    module = type("Layer", (nn.Module,), {"forward": forward, "__module__": __name__})()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Probed:
    """A probe for ``forward``, and fakes to ask it with."""

    def __init__(self, forward: Any, *args: Any, **attributes: Any) -> None:
        self.runs: list[list[tuple[int, ...]]] = []
        seen = self.runs

        def observed(self, *args):
            seen.append([tuple(a.shape) for a in args if isinstance(a, Tensor)])
            return forward(self, *args)

        self.module = layer(observed, **attributes)
        self.call, self.operands = call_of(self.module, *args)
        self.probe = Probe(Runner(observed, self.call), "probe of the kernel")
        self.env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.env)

    def fakes(self, *dynamic: tuple[int, int]) -> list[Any]:
        """The operands as fakes; ``dynamic`` names the operand and dimension of what is."""
        made: list[Any] = []
        for i, value in enumerate(self.operands):
            if isinstance(value, Tensor):
                dims = [
                    DimDynamic.DYNAMIC if (i, d) in dynamic else DimDynamic.STATIC
                    for d in range(value.dim())
                ]
                made.append(
                    self.mode.from_tensor(
                        value.detach(),
                        symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims),
                        source=ConstantSource(f"operand_{i}"),
                    )
                )
            else:
                made.append(value)
        return made

    def __call__(self, *dynamic: tuple[int, int]) -> OutputSpec:
        fakes = self.fakes(*dynamic)
        with self.mode:
            return self.probe(fakes)

    def at(self, *shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes told for arguments of ``shapes``, without a run of the kernel."""
        count = len(self.runs)
        rest = self.operands[len(shapes) :]
        told = self.probe([*map(torch.empty, shapes), *rest])
        assert len(self.runs) == count
        return [tuple(r.shape) for r in told.results]


# --- explanations -------------------------------------------------------------------------------


@st.composite
def explicable(draw: Any) -> tuple[str, tuple[int, ...], int, int]:
    """A formula's kind, terms and constant, and of how many sizes."""
    count = draw(st.integers(0, 4))
    terms = tuple(sorted(draw(st.sets(st.sampled_from(range(count)) if count else st.nothing()))))
    kind = draw(st.sampled_from(["product", "sum"]))
    constant = draw(st.integers(1, 6) if kind == "product" else st.integers(0, 40))
    return kind, terms, constant, count


@given(explicable(), st.lists(st.integers(1, 200), min_size=4, max_size=4))
@example(("product", (0, 1), 1, 2), [9, 12, 1, 1])
def test_probe_infers_the_shape_at_any_sizes(formula, sizes):
    """Whatever the kernel's shape is made of, dims, constants, products and sums, the probe tells
    at every size the shape that the kernel then has."""
    kind, terms, constant, count = formula
    combine = math.prod if kind == "product" else sum

    def native(self, *xs):
        size = combine([constant, *(xs[i].numpy().shape[0] for i in terms)])
        return torch.ones(1).expand(size, 2)

    probed = Probed(native, *(torch.ones(20 + i) for i in range(count)), torch.ones(8))
    probed(*((i, 0) for i in range(count)))
    shapes = [(n,) for n in sizes[:count]]
    real = native(None, *(torch.ones(shape) for shape in shapes))
    assert probed.at(*shapes) == [tuple(real.shape)]


POOL = {
    "half": lambda a, b: a // 2,
    "square": lambda a, b: a * a,
    "padded": lambda a, b: -(-a // 16) * 16,
    "larger": max,
    "quadratic": lambda a, b: a * b + a + b,
    "remainder": lambda a, b: a % 5,
}


@pytest.mark.parametrize("name", POOL)
def test_probe_refuses_a_size_without_a_formula(name):
    def native(self, x, y):
        return torch.from_numpy(np.zeros(POOL[name](len(x.numpy()), len(y.numpy()))))

    probed = Probed(native, torch.ones(20), torch.ones(30))
    with pytest.raises(
        UnknownShape, match=r"dimension 0 of result 0 was [\d, ]+ in 5 runs, which the"
    ):
        probed((0, 0), (1, 0))


@given(st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=2), min_size=1), st.data())
def test_explain_finds_the_simplest_formula_of_all_runs(runs, data):
    """`explain` gives no formula that one of its runs contradicts, and the shortest there is."""
    values = data.draw(st.lists(st.integers(0, 99), min_size=len(runs), max_size=len(runs)))
    formula = explain(values, runs, [0, 1])
    possible = [
        Formula(kind, terms, constant)
        for terms in ((), (0,), (1,), (0, 1))
        for kind in ("product", "sum")
        for constant in range(-100, 100)
        if all(
            Formula(kind, terms, constant)(run) == v for run, v in zip(runs, values, strict=True)
        )
    ]
    if formula is None:
        # Of nothing at all a product may be any; the constant is read off the first run.
        assert all(
            f.kind == "product" and not math.prod(runs[0][i] for i in f.terms) for f in possible
        )
    else:
        assert all(formula(run) == v for run, v in zip(runs, values, strict=True))
        assert len(formula.terms) == min(len(f.terms) for f in possible)


# --- which sizes a kernel is run at -------------------------------------------------------------


def native_scale(self, x):
    return torch.from_numpy(x.numpy() * self.weight.detach().numpy())


WEIGHT = {"weight": nn.Parameter(torch.ones(16))}


def test_probe_runs_a_static_call_at_its_own_sizes():
    probed = Probed(native_scale, torch.ones(6, 16), **WEIGHT)
    (result,) = probed().results
    assert (result.shape, result.dtype) == ((6, 16), torch.float32)
    assert probed.runs == [[(6, 16)], [(6, 16)]]
    assert probed.at((6, 16)) == [(6, 16)]


def test_probe_varies_each_dynamic_size_alone_and_then_all():
    probed = Probed(lambda self, x, y: x + y[0], torch.ones(6, 7, 16), torch.ones(9, 16))
    (result,) = probed((0, 0), (0, 1), (1, 0)).results
    assert [str(n) for n in result.shape][2:] == ["16"]
    first, again, *alone, together = [[*x[:2], y[0]] for x, y in probed.runs]
    assert first == again
    assert [[a != b for a, b in zip(run, first, strict=True)] for run in alone] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    assert all(a != b for a, b in zip(together, first, strict=True))


def test_probe_keeps_a_size_that_equals_one_of_a_weight():
    """A native kernel given another would read beyond the weight."""
    probed = Probed(native_scale, torch.ones(6, 16), **WEIGHT)
    (result,) = probed((0, 0), (0, 1)).results
    assert {x[1] for (x,) in probed.runs} == {16}
    assert result.shape[1] == 16
    assert type(result.shape[1]) is int
    assert len(probed.env.guards) == 1


def test_probe_keeps_equal_sizes_equal():
    probed = Probed(
        lambda self, x, y: torch.from_numpy(x.numpy() + y.numpy()), *[torch.ones(6)] * 2
    )
    probed((0, 0), (1, 0))
    assert all(x == y for x, y in probed.runs)
    assert len(probed.env.guards) == 1
    assert probed.at((8,), (8,)) == [(8,)]


def test_probe_varies_expressions_with_their_symbols():
    def doubled(self, x, y):
        return torch.from_numpy(np.add(x.numpy().repeat(2), y.numpy()))

    probed = Probed(doubled, torch.ones(6), torch.ones(12))
    (x, _) = probed.fakes((0, 0))
    with probed.mode:
        told = probed.probe([x, torch.cat([x, x])])
        assert all(y == (2 * n,) for (n,), y in probed.runs)
        assert told.results[0].shape[0].node.expr == 2 * x.shape[0].node.expr
    assert probed.at((5,), (10,)) == [(10,)]


def test_probe_runs_again_for_other_relations_of_sizes():
    def longer(self, x, y):
        return torch.from_numpy(np.zeros(len(y.numpy()) - len(x.numpy())))

    probed = Probed(longer, torch.ones(6), torch.ones(12))
    (x, _) = probed.fakes((0, 0))
    with probed.mode:
        probed.probe([x, torch.cat([x, x])])
    count = len(probed.runs)
    told = probed.probe([torch.empty(5), torch.empty(11)])
    assert told.results[0].shape == (6,)
    assert len(probed.runs) == count + 2


def test_probe_tries_multiples_of_own_sizes_where_small_ones_raise():
    def blocks(self, x):
        if x.shape[0] % 16:
            raise ValueError("not a multiple of 16")
        return torch.from_numpy(x.numpy())

    probed = Probed(blocks, torch.ones(48, 2))
    probed((0, 0))
    assert [x[0] for (x,) in probed.runs] == [3, 48, 48, 96, 192]
    assert probed.at((64, 2)) == [(64, 2)]


def test_probe_varies_numbers_like_sizes():
    def repeats(self, x, n):
        return torch.from_numpy(np.zeros((n, len(x.numpy()))))

    probed = Probed(repeats, torch.ones(6), 3)
    assert probed((0, 0)).results[0].shape[0] == 3
    assert probed.at((9,)) == [(3, 9)]
    count = len(probed.runs)
    assert probed.probe([torch.empty(9), 4]).results[0].shape == (4, 9)
    assert len(probed.runs) > count


# --- what is run, and what is left of it --------------------------------------------------------


def test_probe_inputs_are_like_the_operands():
    seen: list[Any] = []

    def looks(self, *xs):
        xs[0].numpy()
        seen.append([(x.dtype, x.stride(), x.is_contiguous(), x.requires_grad) for x in xs])
        seen.append([not x.to(torch.complex64).any() for x in xs])
        return xs[0] + 1

    args = (
        torch.randn(3, 4, requires_grad=True).t(),
        torch.randn(1, 4).bfloat16().expand(3, 4),
        torch.randn(4, 8, dtype=torch.complex64)[:, ::2],
        torch.ones(5, dtype=torch.int32),
        torch.ones(5, dtype=torch.bool),
        torch.randn(4).to(torch.float8_e4m3fn),
        torch.ones(()),
        torch.ones(0, 4),
    )
    probed = Probed(lambda self, *xs: looks(self, *(x.detach() for x in xs)), *args)
    probed.probe(probed.operands)
    forms, zeros = seen[:2]
    assert forms == [(a.dtype, a.stride(), a.is_contiguous(), False) for a in args]
    assert zeros == [False, False, False, True, True, False, False, True]


def test_probe_inputs_differ_between_runs():
    def branch(self, x):
        return torch.from_numpy(x.numpy()[x.numpy() > 0])

    with pytest.raises(UnknownShape, match="dimension 0 of result 0 was"):
        Probed(branch, torch.ones(64))()


def test_probe_leaves_no_trace():
    x, seen = torch.ones(4), []

    def draws(self, x):
        x.numpy()
        torch.rand(3)
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), type(x)))
        return torch.rand_like(x)

    probed = Probed(draws, x)
    state = torch.get_rng_state()
    with torch.inference_mode():
        probed()
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [(False, False, Tensor)] * 2
    assert x.eq(1).all()
    with probed.mode:
        assert isinstance(torch.empty(1), FakeTensor)


def test_probe_finds_the_operands_that_a_kernel_writes_into():
    def writes(self, x, y):
        y.numpy()
        y.add_(1)
        return x + 1

    assert Probed(writes, torch.ones(4), torch.ones(4))().written == (1,)


def test_probe_allows_a_kernel_to_compile_something():
    inner = torch.compile(lambda x: x * 2, backend="eager")

    def nested(self, x):
        return torch.from_numpy(inner(x).numpy())

    assert Probed(nested, torch.ones(4))().results[0].shape == (4,)
    torch.compiler.reset()


def test_probe_raises_the_error_of_the_kernel():
    def fails(self, x):
        raise ValueError(f"no {tuple(x.shape)}")

    with pytest.raises(ValueError, match=r"no \(6, 2\)"):
        Probed(fails, torch.ones(6, 2))((0, 0))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: len(x.numpy()), "returns no tensor"),
        (lambda self, x: x.numpy(), "a ndarray is passed or returned"),
        (lambda self, x: setattr(self, "y", x.numpy()) or x, "sets y of the layer"),
    ],
)
def test_probe_refuses_what_no_op_can_do(forward, message):
    with pytest.raises(UnsupportedValue, match=message):
        Probed(forward, torch.ones(4))()


def test_probe_refuses_a_structure_that_depends_on_inputs():
    def ranks(self, x):
        return torch.from_numpy(x.numpy() if len(x) > 10 else x.numpy()[None])

    with pytest.raises(UnknownShape, match="another structure, dtype or number of dimensions"):
        Probed(ranks, torch.ones(20))((0, 0))


@pytest.mark.parametrize("kind", ["sparse", "subclass"])
def test_probe_refuses_a_tensor_without_sample_values(kind):
    class Special(Tensor):
        pass

    x = torch.eye(3).to_sparse() if kind == "sparse" else torch.eye(3).as_subclass(Special)
    probed = Probed(lambda self, x: x, torch.ones(3, 3))
    with pytest.raises(TypeError, match=r"no values can be made up for a (sparse_coo|strided) "):
        probed.probe([x])


def test_probe_refuses_more_than_eight_dynamic_sizes():
    shape = tuple(range(2, 11))
    probed = Probed(
        lambda self, x: torch.from_numpy(x.numpy()),
        torch.ones(shape[:3]),
        *(torch.ones(n) for n in shape[3:]),
    )
    dynamic = [(0, 0), (0, 1), (0, 2), *((i, 0) for i in range(1, 7))]
    with pytest.raises(UnknownShape, match="9 sizes are dynamic, and at most 8 can be probed"):
        probed(*dynamic)
