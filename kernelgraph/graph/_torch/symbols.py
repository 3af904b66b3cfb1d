"""Symbolic sizes: expressions, hints, guards and data-dependent sizes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._guards import detect_fake_mode
from torch._library.fake_impl import FakeImplCtx, set_ctx_getter
from torch._subclasses.fake_tensor import is_fake as is_fake
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols as free_unbacked_symbols


@contextlib.contextmanager
def forgetting_unbacked_symbols() -> Iterator[None]:
    """Let fake code make data-dependent sizes, which no node will bind.

    Whatever the user set for the rest of the graph: what a layer does inside is its own matter.
    Tried on 2.11, 2.13, 2.14.
    """
    mode: Any = detect_fake_mode()
    # What ``torch.library.get_ctx()`` gives to the fake of an op; its second argument is what it
    # raises where there can be no such size.
    context: Any = FakeImplCtx
    env = mode.shape_env
    with set_ctx_getter(lambda: context(mode, "new_dynamic_size() needs fakes with a ShapeEnv")):
        if env is None:
            yield
            return
        before = env.settings
        env.settings = dataclasses.replace(
            before, allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True
        )
        try:
            with env.ignore_fresh_unbacked_symbols():
                yield
        finally:
            env.settings = before


def bind_unbacked_symbols(made: Iterable[torch.Tensor], given: Iterable[Any]) -> None:
    """Have the node whose fake made these tensors bind the sizes that are in them for the first
    time, and not among the operands ``given``. Tried on 2.11, 2.13, 2.14."""
    known = {symbol for value in given for symbol in free_unbacked_symbols(value)}
    fresh = {symbol for tensor in made for symbol in free_unbacked_symbols(tensor)} - known
    if fresh:
        mode: Any = detect_fake_mode()
        env = mode.shape_env
        if not env._ignore_fresh_unbacked_symbols_tls():  # nor does torch then
            env.pending_fresh_unbacked_symbols += sorted(fresh, key=str)


Expression = sympy.Expr
"""A size in terms of the symbols of a graph."""
Relation = sympy.logic.boolalg.Boolean
"""What is so, or not, of such sizes."""


def expression(value: Any) -> Any:
    """What a symbolic int stands for; a constant, and any other value, as it is."""
    if not isinstance(value, torch.SymInt):
        return value
    expr = value.node.expr
    return int(expr) if expr.is_number else expr


def evaluate(value: Any, known: Mapping[sympy.Symbol, int]) -> Any:
    """What a symbolic int is where its symbols are as ``known``; any other value as it is."""
    expr = expression(value)
    return int(expr.xreplace(dict(known))) if isinstance(expr, Expression) else expr


def hints(values: Iterable[Any]) -> dict[sympy.Symbol, int | None]:
    """The symbols in ``values``, and what they are in the call that is traced: None where that
    depends on values of tensors. Tried on 2.11, 2.13, 2.14."""
    found: dict[sympy.Symbol, int | None] = {}
    for value in values:
        if isinstance(value, torch.SymInt) and not isinstance(expression(value), int):
            known = value.node.shape_env.backed_var_to_val
            for symbol in sorted(value.node.expr.free_symbols, key=str):
                found[symbol] = int(known[symbol]) if symbol in known else None
    return found


def guard_equal(value: torch.SymInt, symbol: sympy.Symbol, other: Any) -> None:
    """Trace anew when a symbol of the graph that ``value`` is of is not ``other`` any more."""
    value.node.shape_env.evaluate_expr(sympy.Eq(symbol, other))


def hint(value: Any) -> Any:
    """A number for a symbolic size: what it was where it was traced, or any."""
    if isinstance(value, torch.SymInt):
        return value.node.hint if value.node.has_hint() else 2
    return value


def guards_of(env: ShapeEnv) -> list[sympy.Expr]:
    """What was taken for granted of the symbols of ``env``. Tried on 2.11, 2.13, 2.14."""
    return [guard.expr for guard in env.guards]


def bounds(known: Any) -> tuple[int, int | None]:
    """The least and the greatest value in a range of ``torch.export``'s; None for no limit."""
    if known is None:
        return 2, None
    greatest = None if known.upper > 2**62 else int(known.upper)
    return int(known.lower), greatest
