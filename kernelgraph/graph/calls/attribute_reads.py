"""What a function reads and sets of its first parameter, told from its source."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

Names = tuple[str, ...]
"""Attribute names in a row: ``("experts", "weight")`` for self.experts.weight."""

CALL = "()"
"""Ends names whose value is called."""
EVERYTHING: frozenset[Names] = frozenset({()})
"""The reads of a function whose use of ``self`` cannot be told from its source."""


class Uses(NamedTuple):
    """What a function does with its first parameter."""

    reads: frozenset[Names]
    """The attribute chains that it reads, or `EVERYTHING`."""
    writes: frozenset[Names]
    """The attribute chains that it sets or deletes, as far as its source tells."""
    updates: frozenset[Names] = frozenset()
    """Those of an augmented assignment, which leaves a tensor in its place."""


@functools.cache
def uses(function: Callable[..., Any]) -> Uses:
    """What ``function`` does with ``self``.

    Every appearance of ``self`` must be the start of a chain of attributes; where it is anything
    else (it is handed to another function, say), or there is no source, it reads `EVERYTHING`.
    """
    unknown = Uses(EVERYTHING, frozenset())
    if hasattr(function, "__wrapped__"):  # the source would be that of the function inside
        return unknown
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        code = function.__code__
    except (OSError, TypeError, SyntaxError, AttributeError):
        return unknown
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return unknown
    parameters = [p.arg for p in (*definition.args.posonlyargs, *definition.args.args)]
    # A file that has changed since it was imported shows another function.
    if not parameters or tuple(parameters) != code.co_varnames[: code.co_argcount]:
        return unknown
    visitor = _Visitor(parameters[0])
    for statement in definition.body:
        visitor.visit(statement)
    reads = EVERYTHING if visitor.escapes else frozenset(visitor.reads)
    return Uses(reads, frozenset(visitor.writes), frozenset(visitor.updates))


class _Visitor(ast.NodeVisitor):
    def __init__(self, self_name: str) -> None:
        self.self_name = self_name
        self.reads: set[Names] = set()
        self.writes: set[Names] = set()
        self.updates: set[Names] = set()
        self.escapes = False

    def visit_Call(self, node: ast.Call) -> None:
        match node.func, node.args:
            case ast.Attribute(), _ if names := self._chain(node.func):
                self._note((*names, CALL), self.reads)
                inside = node.args
            case (
                ast.Name("getattr" | "hasattr"),
                [ast.Name(instance), ast.Constant(str(name)), *inside],
            ) if instance == self.self_name:
                self._note((name,), self.reads)
            case _:
                self.generic_visit(node)
                return
        for part in (*inside, *node.keywords):
            self.visit(part)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        names = self._chain(node)
        if names:
            self._note(names, self.reads if isinstance(node.ctx, ast.Load) else self.writes)
        else:
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Attribute) and (names := self._chain(node.target)):
            self._note(names, self.updates)
            self._note(names, self.reads)
            self.visit(node.value)
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        # ``super`` needs the instance without naming it.
        if node.id in (self.self_name, "super", "__class__", "locals"):
            self.escapes = True

    def _chain(self, node: ast.Attribute) -> Names:
        """The names of a chain that starts at ``self``; none of another."""
        names: list[str] = []
        value: ast.expr = node
        while isinstance(value, ast.Attribute):
            names.append(value.attr)
            value = value.value
        starts_here = isinstance(value, ast.Name) and value.id == self.self_name
        return tuple(reversed(names)) if starts_here else ()

    def _note(self, names: Names, where: set[Names]) -> None:
        where.add(names)
        # A private name has another one at run time, which depends on the class around it.
        self.escapes |= any(n.startswith("__") and not n.endswith("__") for n in names)
