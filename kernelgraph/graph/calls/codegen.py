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

from kernelgraph.graph.calls.trees import Constant, Entries, Leaf, Parts, Path, Template

Bind = Callable[[Any], str]
"""Makes a value available in a function that is written; returns the expression for it."""


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


def expression(template: Template, leaves: Sequence[str], bind: Bind) -> str:
    """Return an expression over ``leaves`` for what `Template.unflatten` makes."""
    match template:
        case Leaf(index):
            return leaves[index]
        case Constant(value):
            return literal(value, bind)
        case Entries(cls, items):
            inside = [f"{key!r}: {expression(part, leaves, bind)}" for key, part in items]
            made = f"{{{', '.join(inside)}}}"
            if cls is dict:
                return made
            return f"{bind(cls)}({'' if cls is OrderedDict else '**'}{made})"
        case Parts(cls, parts):
            values = [expression(part, leaves, bind) for part in parts]
            if cls is list:
                return f"[{', '.join(values)}]"
            if cls is tuple:
                return tuple_of(values)
            if cls is torch.Size:
                return f"{bind(cls)}({tuple_of(values)})"
            return f"tuple.__new__({bind(cls)}, {tuple_of(values)})"
    raise AssertionError(template)


def literal(value: Any, bind: Bind) -> str:
    """``value`` as Python writes it, where it can."""
    if value is None or type(value) in (bool, int, str):
        return repr(value)
    return repr(value) if type(value) is float and math.isfinite(value) else bind(value)


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
