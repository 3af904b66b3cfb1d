"""Python functions that are written for one form of call.

They hold no loop: Dynamo takes longer over one than over what it does, and so does a call.
"""

from __future__ import annotations

import builtins
import functools
import keyword
import math
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from kernelgraph.graph.calls.trees import Path, Template

Constant = Callable[[Any], str]
"""Gives an expression for a value that is to be at hand in a function."""


def write(parameters: Sequence[str], lines: Sequence[str], names: dict[str, Any]) -> Any:
    """A function with these lines as its body, which find ``names`` as globals."""
    body = "\n".join(f"    {line}" for line in lines)
    code = _code(f"def written({', '.join(parameters)}):\n{body}")
    return types.FunctionType(code, {"__builtins__": builtins, **names})


@functools.lru_cache(maxsize=4096)
def _code(text: str) -> types.CodeType:
    namespace: dict[str, Any] = {}
    exec(compile(text, "<kernelgraph>", "exec"), namespace)
    code: types.CodeType = namespace["written"].__code__
    return code


def expression(template: Template, leaves: Sequence[str], constant: Constant) -> str:
    """What `kernelgraph.graph.calls.trees.put_leaves` does, as an expression over ``leaves``."""
    kind, body = template[0], template[1]
    if kind == "leaf":
        return leaves[body]
    if kind == "const":
        return literal(body, constant)
    if kind in ("dict", "OrderedDict", "dataclass"):
        items = [(key, expression(part, leaves, constant)) for key, part in body]
        made = f"{{{', '.join(f'{key!r}: {value}' for key, value in items)}}}"
        if kind == "dict":
            return made
        cls = constant(OrderedDict if kind == "OrderedDict" else template[2])
        return f"{cls}({made})" if kind == "OrderedDict" else f"{cls}(**{made})"
    parts = [expression(part, leaves, constant) for part in body]
    if kind == "list":
        return f"[{', '.join(parts)}]"
    made = tuple_of(parts)
    if kind == "namedtuple":
        return f"tuple.__new__({constant(template[2])}, {made})"
    return made if kind == "tuple" else f"{constant(torch.Size)}({made})"


def literal(value: Any, constant: Constant) -> str:
    """``value`` as Python writes it, where it can."""
    if value is None or type(value) in (bool, int, str):
        return repr(value)
    return repr(value) if type(value) is float and math.isfinite(value) else constant(value)


def tuple_of(values: Iterable[str]) -> str:
    """The tuple of some expressions, or, on the left of an assignment, of names."""
    return f"({''.join(f'{value}, ' for value in values)})"


def access(start: str, path: Path) -> str:
    """What is at ``path`` of the value of an expression."""
    for step in path:
        if not isinstance(step, str):
            start = f"{start}[{step[0]!r}]"
        elif step.isidentifier() and not keyword.iskeyword(step):
            start = f"{start}.{step}"
        else:
            start = f"getattr({start}, {step!r})"
    return start
