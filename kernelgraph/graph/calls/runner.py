"""Running a ``forward`` with the operands of an op.

What a graph runs is a Python function that is written for the call, as a ``dataclass`` writes its
``__init__``: loops over the operands would cost several times what many kernels do.
"""

from __future__ import annotations

import functools
import keyword
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernelgraph.graph.calls.call import Call
from kernelgraph.graph.calls.codegen import expression, tuple_of, write
from kernelgraph.graph.calls.stand_in import new_stand_in
from kernelgraph.graph.calls.trees import UnsupportedValue, flatten_tensors


class Runner:
    """Calls a ``forward`` with the operands of a `Call`.

    The objects that play ``self`` are made once and kept in a pool, since making one costs more
    than a small kernel; each thread in a call has its own, and between calls they hold no tensor.
    """

    def __init__(self, forward: Callable[..., Any], call: Call) -> None:
        self.call = call
        self.forward = _in_autocast(forward, call.autocast)
        self.operands = [f"a{i}" for i in range(len(call.types))]
        """The names of the operands in the functions that are written."""
        self._namespace: dict[str, Any] = {"forward": self.forward}
        self._namespace |= {"free": [], "new_stand_in": functools.partial(_shell, call)}
        self.run = self._write([*self._call_lines(), "return result"], {})
        """The call, with the operands as its arguments."""

    def __call__(self, operands: Sequence[Any]) -> Any:
        return self.run(*operands)

    def results(self, operands: Sequence[Any], written: Sequence[int]) -> list[Any]:
        """The tensors that a call returns; and behind them those of the operands that it writes
        into, which are copies."""
        given = [v.clone() if i in written else v for i, v in enumerate(operands)]
        results, _ = flatten_tensors(self(given))
        return results + [given[i] for i in written]

    def around(
        self,
        before: Sequence[str],
        on_error: str,
        after: Sequence[str],
        names: dict[str, Any],
        always: Sequence[str] = (),
    ) -> Callable[..., Any]:
        """A function that makes the call between other lines.

        Args:
            before: Lines in front of the call.
            on_error: What to do with the ``error`` that it raises.
            after: Lines behind it, which find what it returns as ``result``.
            names: What the lines call by name.
            always: Lines right behind it, also where it raises.
        """
        return self._write([*before, *self._call_lines(on_error, always), *after], names)

    def _write(self, lines: Sequence[str], names: dict[str, Any]) -> Callable[..., Any]:
        made: Callable[..., Any] = write(self.operands, lines, {**self._namespace, **names})
        return made

    def _call_lines(self, on_error: str = "", always: Sequence[str] = ()) -> list[str]:
        """The lines of the call. For a norm with a weight and an eps::

        try:
            shell = free.pop()
        except IndexError:
            shell = new_stand_in()
        module, (d0, d1, ) = shell
        try:
            d0['weight'] = a1
            d1['eps'] = a2
            result = forward(module, a0)
        finally:
            d0['weight'] = None
            free.append(shell)
        """
        slots = new_stand_in(self.call.state).slots
        first = len(self.operands) - len(slots)  # of the state's
        held = [f"d{j}[{key!r}]" for j, (_, key) in enumerate(slots)]
        tensors = [slot for j, slot in enumerate(held) if self.call.types[first + j] == "Tensor"]
        # Made anew where it is evaluated: a forward may change the containers it is given.
        made = functools.partial(expression, leaves=self.operands, bind=self._bind)
        given = [made(part) for part in self.call.positional]
        given += [_keyword(name, made(part)) for name, part in self.call.keywords]
        return [
            "try:",
            "    shell = free.pop()",
            "except IndexError:",
            "    shell = new_stand_in()",
            f"module, {tuple_of(f'd{j}' for j in range(len(slots)))} = shell",
            "try:",
            *(f"    {s} = {a}" for s, a in zip(held, self.operands[first:], strict=True)),
            f"    result = forward({', '.join(['module', *given])})",
            *(["except Exception as error:", f"    {on_error}"] if on_error else []),
            "finally:",
            *(f"    {line}" for line in always),
            *(f"    {slot} = None" for slot in tensors),
            "    free.append(shell)",
        ]

    def _bind(self, value: Any) -> str:
        name = f"c{len(self._namespace)}"
        self._namespace[name] = value
        return name

    def observe(self, operands: Sequence[Any]) -> Any:
        """Call, and see that the layer's attributes are afterwards what they were before.

        Raises:
            UnsupportedValue: If the call sets one: an op has no such effect.
        """
        shell = new_stand_in(self.call.state)
        count = len(operands) - len(shell.slots)
        for (container, key), value in zip(shell.slots, operands[count:], strict=True):
            container[key] = value
        before = shell.contents()
        args, kwargs = self.call.arguments.unflatten(operands)
        result = self.forward(shell.module, *args, **kwargs)
        changed = {name for (_, name), _ in before.items() ^ shell.contents().items()}
        if changed:
            where = getattr(self.forward, "__qualname__", self.forward)
            raise UnsupportedValue(f"{where} sets {', '.join(sorted(changed))} of the layer")
        return result


def _in_autocast(
    forward: Callable[..., Any], region: tuple[str, torch.dtype] | None
) -> Callable[..., Any]:
    if region is None:
        return forward
    kind, dtype = region

    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        # Without its cache, which would keep casts of the weights.
        with torch.autocast(kind, dtype, cache_enabled=False):
            return forward(*args, **kwargs)

    return inside


def _shell(call: Call) -> tuple[Any, tuple[Any, ...]]:
    shell = new_stand_in(call.state)
    return shell.module, tuple(container for container, _ in shell.slots)


def _keyword(name: str, value: str) -> str:
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return f"{name}={value}" if plain else f"**{{{name!r}: {value}}}"
