"""The attributes of its first parameter that a function reads and sets, from its source code."""

from __future__ import annotations

import ast
import builtins
import dis
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import NamedTuple

Names = tuple[str, ...]
"""A chain of attribute names: ``("experts", "weight")`` for ``self.experts.weight``."""

CALL = "()"
"""The last element of a chain whose value is called."""
EVERYTHING: frozenset[Names] = frozenset({()})
"""The reads of a function whose source does not show how it uses ``self``."""


class Uses(NamedTuple):
    """The attribute chains of its first parameter that a function uses."""

    reads: frozenset[Names]
    """Chains that it reads, or `EVERYTHING`."""
    writes: frozenset[Names]
    """Chains that it sets or deletes, as far as its source shows."""
    updates: frozenset[Names] = frozenset()
    """Chains that an augmented assignment (``+=``) changes, which writes into a tensor in place."""


@functools.cache
def uses(function: Callable[..., object]) -> Uses:
    """Return the attribute chains of ``self`` that ``function`` uses.

    Every appearance of ``self`` must start a chain of attributes. Where it does not (it is passed
    to another function, for example), or there is no source, the function reads `EVERYTHING`.
    """
    unknown = Uses(EVERYTHING, frozenset())
    if hasattr(function, "__wrapped__"):  # inspect would return the source of the wrapped function
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
    # If the file has changed since it was imported, its source shows another function.
    if not parameters or tuple(parameters) != code.co_varnames[: code.co_argcount]:
        return unknown
    visitor = _Visitor(parameters[0])
    for statement in definition.body:
        visitor.visit(statement)
    reads = EVERYTHING if visitor.escapes else frozenset(visitor.reads)
    return Uses(reads, frozenset(visitor.writes), frozenset(visitor.updates))


@functools.cache
def takes_identity(function: Callable[..., object]) -> bool:
    """Whether ``function``, or one that it calls, asks for the ``id`` or ``hash`` of something.

    A kernel that does so keeps what it has made for a layer in a table. Functions of other modules
    are not looked at.
    """
    function = inspect.unwrap(function)
    pending, seen = [function], set()
    while pending:
        code = getattr(one := pending.pop(), "__code__", None)
        if code is None or code in seen or one.__globals__ is not function.__globals__:
            continue
        seen.add(code)
        names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        cells = [cell.cell_contents for cell in one.__closure__ or () if cell != types.CellType()]
        called = [one.__globals__.get(name, getattr(builtins, name, None)) for name in names]
        if any(value is id or value is hash for value in (*called, *cells)):
            return True
        pending += [value for value in (*called, *cells) if inspect.isfunction(value)]
    return False


class _Visitor(ast.NodeVisitor):
    """Collects the attribute chains that start at the name ``self_name``."""

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
        """Return the names of a chain that starts at ``self``, or ``()`` for any other chain."""
        names: list[str] = []
        value: ast.expr = node
        while isinstance(value, ast.Attribute):
            names.append(value.attr)
            value = value.value
        starts_here = isinstance(value, ast.Name) and value.id == self.self_name
        return tuple(reversed(names)) if starts_here else ()

    def _note(self, names: Names, where: set[Names]) -> None:
        where.add(names)
        # Python mangles private names with the name of the class around them.
        self.escapes |= any(n.startswith("__") and not n.endswith("__") for n in names)
