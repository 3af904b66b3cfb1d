"""Generates Python functions for one call signature, and the expressions in them.

They have no loops: Dynamo traces a loop more slowly than its unrolled body, and Python runs it more
slowly.
"""

from __future__ import annotations

import builtins
import functools
import keyword
import linecache
import math
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from kernelgraph.fingerprint import digest
from kernelgraph.graph.calls.trees import Constant, Entries, Leaf, Parts, Path, Template

Bind = Callable[[object], str]
"""Makes a value available in a function that is written; returns the expression for it."""


def write_function(
    parameters: Sequence[str],
    lines: Sequence[str],
    names: dict[str, object],
    *,
    title: str,
) -> Any:
    """Return a generated function.

    Its source is in `linecache` under the file name ``<kernelgraph TITLE HASH>``, so tracebacks,
    debuggers and profilers show its lines. The name is the same in every process.

    Args:
        parameters: The names of its parameters.
        lines: The lines of its body.
        names: The globals that the lines use.
        title: What the function is for, such as ``call RMSNorm.forward``.
    """
    body = "\n".join(f"    {line}" for line in lines)
    code = _code(title, f"def generated({', '.join(parameters)}):\n{body}\n")
    return types.FunctionType(code, {"__builtins__": builtins, **names})


@functools.lru_cache(maxsize=4096)
def _code(title: str, source: str) -> types.CodeType:
    name = f"<kernelgraph {title} {digest(source)}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    namespace: dict[str, Any] = {}
    exec(compile(source, name, "exec"), namespace)
    code: types.CodeType = namespace["generated"].__code__
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


def literal(value: object, bind: Bind) -> str:
    """Return an expression for ``value``: a literal where Python has one, else a bound name."""
    if value is None or type(value) in (bool, int, str):
        return repr(value)
    return repr(value) if type(value) is float and math.isfinite(value) else bind(value)


def tuple_of(values: Iterable[str]) -> str:
    """Return an expression for a tuple, which may also be the target of an assignment."""
    return f"({''.join(f'{value}, ' for value in values)})"


def access(start: str, path: Path) -> str:
    """Return an expression for the part at ``path`` of the expression ``start``."""
    for step in path:
        if not isinstance(step, str):
            start = f"{start}[{step[0]!r}]"
        elif step.isidentifier() and not keyword.iskeyword(step):
            start = f"{start}.{step}"
        else:
            start = f"getattr({start}, {step!r})"
    return start
