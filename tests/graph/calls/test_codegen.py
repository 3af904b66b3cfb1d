"""Python that is written for one form of call."""

from __future__ import annotations

import math
import re
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraph.graph.calls.codegen import access, expression, literal, write_function
from kernelgraph.graph.calls.trees import Path, flatten, read
from tests.graph.calls.test_call import VALUES, same


def evaluated(text: str, names: dict[str, Any]) -> Any:
    return write_function([], [f"return {text}"], names, title="test")()


class Constants(dict[str, Any]):
    """Names for the values that an expression asks for."""

    def __call__(self, value: Any) -> str:
        self[f"c{len(self)}"] = value
        return f"c{len(self) - 1}"


@settings(max_examples=150)
@given(VALUES)
def test_expression_evaluates_to_the_unflattened_value(value: Any) -> None:
    """What an expression evaluates to is what `Template.unflatten` makes."""
    leaves, template = flatten(value)
    constants = Constants()
    text = expression(template, [f"a{i}" for i in range(len(leaves))], bind=constants)
    made = evaluated(text, {**constants, **{f"a{i}": leaf for i, leaf in enumerate(leaves)}})
    assert same(made, template.unflatten(leaves))
    assert same(made, value)


@given(st.one_of(st.floats(), st.integers(), st.booleans(), st.none(), st.text()))
def test_literal_evaluates_to_the_value(value: Any) -> None:
    constants = Constants()
    made = evaluated(literal(value, constants), constants)
    assert type(made) is type(value)
    assert made == value or (math.isnan(made) and math.isnan(value))
    if isinstance(value, float):
        assert math.copysign(1, made) == math.copysign(1, value)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), "x"),
        (("a", "b"), "x.a.b"),
        (("a", (0,), ("k'",)), """x.a[0]["k'"]"""),
        (("a", "0", "class"), "getattr(getattr(x.a, '0'), 'class')"),
    ],
)
def test_access_evaluates_to_what_read_returns(path: Path, text: str) -> None:
    assert access("x", path) == text
    inner = SimpleNamespace(b=1, **{"0": SimpleNamespace(**{"class": 2})})
    value = SimpleNamespace(a=[{"k'": 3}] if (0,) in path else inner)
    assert evaluated(text, {"x": value}) is read(value, path)


def test_generated_function_shows_its_source_in_a_traceback() -> None:
    function = write_function(["x"], ["return 1 / x"], {}, title="divide Toy")
    with pytest.raises(ZeroDivisionError) as caught:
        function(0)
    *_, frame = traceback.extract_tb(caught.value.__traceback__)
    assert frame.line == "return 1 / x"
    assert re.fullmatch(r"<kernelgraph divide Toy [0-9a-f]{8}>", frame.filename)
