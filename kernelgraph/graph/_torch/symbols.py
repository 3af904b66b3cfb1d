"""Symbolic sizes: expressions, hints, guards, and sizes that depend on values."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._guards import detect_fake_mode
from torch._library.fake_impl import FakeImplCtx, set_ctx_getter
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols as free_unbacked_symbols


@contextlib.contextmanager
def forgetting_unbacked_symbols() -> Iterator[None]:
    """Allow code on fakes to create data-dependent sizes that no node will bind.

    This ignores the user's settings, which are about the graph and not about the inside of a
    layer. Tried on 2.11, 2.13, 2.14.
    """
    mode: Any = detect_fake_mode()
    # ``torch.library.get_ctx()`` returns this to the fake of an op. The second argument is the
    # error where no such size can be created.
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
    """Make the current node bind the data-dependent sizes that its fake has created.

    Args:
        made: The tensors that the fake returned.
        given: The operands of the node, whose sizes other nodes have bound.

    Tried on 2.11, 2.13, 2.14.
    """
    known = {symbol for value in given for symbol in free_unbacked_symbols(value)}
    fresh = {symbol for tensor in made for symbol in free_unbacked_symbols(tensor)} - known
    if fresh:
        mode: Any = detect_fake_mode()
        env = mode.shape_env
        if not env._ignore_fresh_unbacked_symbols_tls():  # in that state torch binds none either
            env.pending_fresh_unbacked_symbols += sorted(fresh, key=str)


Expression = sympy.Expr
"""A size as an expression over the symbols of a graph."""
Relation = sympy.logic.boolalg.Boolean
"""A condition on such sizes."""


def expression(value: Any) -> Any:
    """Return the expression of a symbolic int, its value if it is constant, and any other value
    unchanged."""
    if not isinstance(value, torch.SymInt):
        return value
    expr = value.node.expr
    return int(expr) if expr.is_number else expr


def evaluate(value: object, known: Mapping[sympy.Symbol, int]) -> Any:
    """Return the value of a symbolic int for these values of its symbols; any other value
    unchanged."""
    expr = expression(value)
    return int(expr.xreplace(dict(known))) if isinstance(expr, Expression) else expr


def hints(values: Iterable[object]) -> dict[sympy.Symbol, int | None]:
    """Return the symbols in ``values`` with their values in the traced call, or None for a symbol
    that depends on the values of tensors. Tried on 2.11, 2.13, 2.14."""
    found: dict[sympy.Symbol, int | None] = {}
    for value in values:
        if isinstance(value, torch.SymInt) and not isinstance(expression(value), int):
            known = value.node.shape_env.backed_var_to_val
            for symbol in sorted(value.node.expr.free_symbols, key=str):
                found[symbol] = int(known[symbol]) if symbol in known else None
    return found


def guard_equal(value: torch.SymInt, symbol: sympy.Symbol, other: object) -> None:
    """Recompile when ``symbol``, of the graph that ``value`` belongs to, no longer equals
    ``other``. Tried on 2.11, 2.13, 2.14."""
    value.node.shape_env.evaluate_expr(sympy.Eq(symbol, other))


def hint(value: object) -> Any:
    """Return the value of a symbolic size in the traced call, or 2 where it has none. Tried on
    2.11, 2.13, 2.14."""
    if isinstance(value, torch.SymInt):
        return value.node.hint if value.node.has_hint() else 2
    return value


def guards_of(env: ShapeEnv) -> list[sympy.Expr]:
    """Return the guards on the symbols of ``env``. Tried on 2.11, 2.13, 2.14."""
    return [guard.expr for guard in env.guards]


def bounds(known: Any) -> tuple[int, int | None]:
    """Return the least and the greatest value of a range of ``torch.export``; None for no upper
    limit. Tried on 2.11, 2.13, 2.14."""
    if known is None:
        return 2, None
    greatest = None if known.upper > 2**62 else int(known.upper)
    return int(known.lower), greatest
