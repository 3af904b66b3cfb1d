"""Sizes of results as data, against running the function itself on tensors of those sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernelgraph.graph.calls.trees import Leaf
from kernelgraph.graph.infer.output_specs import OutputSpec, TensorSpec, UnknownShape
from kernelgraph.programs.export_ops import record_sizes
from kernelgraph.programs.portable_sizes import Sizes


def source(function: Callable[..., Any]) -> Callable[[Sequence[Any]], OutputSpec]:
    """Return a source that runs ``function`` on the operands."""

    def infer(operands: Sequence[Any]) -> OutputSpec:
        results = function(*operands)
        results = [results] if isinstance(results, Tensor) else results
        specs = tuple(TensorSpec(tuple(t.shape), t.dtype, t.device) for t in results)
        return OutputSpec(specs, Leaf(0), (), "fake")

    return infer


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "norm": lambda x, w: x * w,
    "halves": lambda x, w: list(x.chunk(2, -1)),
    "joined": lambda x, w: torch.cat([x, x, x[:, :1]], dim=1),
    "flat": lambda x, w: x.reshape(-1),
    "grouped": lambda x, w: x.reshape(x.shape[0] * 2, -1) if x.shape[1] % 2 == 0 else x,
    "reduced": lambda x, w: [x.sum(-1), x.mean(0, keepdim=True).double()],
    "outer": lambda x, w: x[:, :, None] * w[None, None, :],
    "at most": lambda x, w: x[: w.shape[0]],
}


@pytest.mark.parametrize("name", FUNCTIONS)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), others=st.tuples(*[st.integers(1, 9)] * 2)
)
@settings(max_examples=10)
def test_recorded_sizes_are_those_of_the_function(name, rows, columns, others):
    """Whatever the sizes, the recorded ones are the function's own, or a condition is not met."""
    function = FUNCTIONS[name]
    sizes, _ = record_sizes(
        source(function), [torch.randn(rows, columns), torch.randn(columns)], everything=True
    )
    sizes = Sizes.from_json(json.loads(json.dumps(sizes.to_json())))
    for shape in ((rows, columns), others):
        operands = [torch.randn(shape), torch.randn(shape[1])]
        expected = source(function)(operands).results
        computed = refused = None
        try:
            computed = sizes(operands)
        except ValueError as error:
            refused = error
        if refused:
            assert shape != (rows, columns), refused
            continue
        # A size of 0 or 1 broadcasts, which shows when the op runs and not here.
        assert computed == expected or min(*shape, rows, columns) < 2


def test_static_sizes_are_conditions_where_only_symbolic_ones_may_vary():
    """A kernel that has to run for real, for example, is not tried at other sizes."""
    sizes, _ = record_sizes(
        source(lambda x, w: x * w), [torch.randn(3, 4), torch.randn(4)], everything=False
    )
    assert sizes([torch.randn(3, 4), torch.randn(4)])[0].shape == (3, 4)
    with pytest.raises(ValueError, match=r"only where operand 0's size 0 == 3, which is not so"):
        sizes([torch.randn(5, 4), torch.randn(4)])


def test_number_among_the_operands_is_a_condition():
    sizes, _ = record_sizes(source(lambda x, n: x[:n]), [torch.randn(7), 4], everything=True)
    assert sizes([torch.randn(9), 4])[0].shape == (4,)
    with pytest.raises(ValueError, match=r"where operand 1's size 0 == 4"):
        sizes([torch.randn(9), 5])


def test_size_that_is_no_expression_is_refused():
    def odd(x: Tensor) -> Tensor:
        return x.new_empty(torch.sym_int(x.shape[0] ** 0.5))

    with pytest.raises(UnknownShape, match="cannot be written as data"):
        record_sizes(source(odd), [torch.randn(9)], everything=True)


@pytest.mark.parametrize(
    "data",
    [
        {"results": [[[["system", 1]], "float32", "cpu"]], "conditions": []},
        {"results": [[["1"], "float32", "cpu"]], "conditions": []},
        {"results": [[[1], "load", "cpu"]], "conditions": []},
        {"results": [[[1], "float32", "nowhere"]], "conditions": []},
        {"results": [], "conditions": [["operand", -1, 0]]},
    ],
)
def test_malformed_sizes_are_refused(data: Any):
    with pytest.raises((ValueError, RuntimeError)):
        Sizes.from_json(data)
