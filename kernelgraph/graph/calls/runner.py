"""Runs a ``forward`` with the operands of an op.

The function that a graph runs is generated for each call signature, as ``dataclass`` generates an
``__init__``: loops over the operands would cost several times as much as many kernels.
"""

from __future__ import annotations

import functools
import keyword
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernelgraph.graph.calls.attribute_reads import takes_identity
from kernelgraph.graph.calls.call import Call
from kernelgraph.graph.calls.codegen import expression, tuple_of, write_function
from kernelgraph.graph.calls.stand_in import StandIn, new_stand_in
from kernelgraph.graph.calls.trees import UnsupportedValue, flatten, flatten_tensors


class Runner:
    """Calls a ``forward`` with the operands of a `Call`.

    The stand-ins for ``self`` are kept in a pool, since making one costs more than a small kernel.
    Each thread in a call has its own, and between calls they hold no tensors.

    Args:
        forward: The forward of a kernel or of a reference.
        call: The signature of the calls.
    """

    def __init__(self, forward: Callable[..., object], call: Call) -> None:
        self.call = call
        self.forward = _in_autocast(forward, call.autocast)
        self.operands = [f"a{i}" for i in range(len(call.types))]
        """The names of the operands in generated functions."""
        self._namespace: dict[str, object] = {"forward": self.forward}
        self._written: list[dict[str, Any]] = []
        """The namespaces of the functions that were generated."""
        self._namespace |= {"pool": [], "new": functools.partial(_module_and_containers, call)}
        self.run = self._write([*self._call_lines(), "return result"], {})
        """The generated function: takes the operands, and returns what the forward returns."""

    def __call__(self, operands: Sequence[object]) -> object:
        return self.run(*operands)

    def results(self, operands: Sequence[Any], written: Sequence[int]) -> list[Any]:
        """Call on copies of the operands ``written``.

        Returns:
            The tensors that the call returns, and then those copies.
        """
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
        """Return a generated function that makes the call between other lines of code.

        Args:
            before: Lines before the call.
            on_error: A line that handles the exception ``error``.
            after: Lines after the call; ``result`` is what it returned.
            names: Objects that the lines use, by name.
            always: Lines right after the call, also where it raises.
        """
        return self._write([*before, *self._call_lines(on_error, always), *after], names)

    def _write(self, lines: Sequence[str], names: dict[str, Any]) -> Callable[..., Any]:
        title = f"call {getattr(self.forward, '__qualname__', 'forward')}"
        made: Callable[..., Any] = write_function(
            self.operands, lines, {**self._namespace, **names}, title=title
        )
        self._written.append(made.__globals__)
        return made

    def replace_forward(self, forward: Callable[..., object]) -> None:
        """Call another forward from now on, in the functions that were generated too."""
        self.forward = _in_autocast(forward, self.call.autocast)
        for namespace in self._written:
            namespace["forward"] = self.forward

    def _call_lines(self, on_error: str = "", always: Sequence[str] = ()) -> list[str]:
        """Return the lines of the call. For a norm with a weight and an eps::

        try:
            stand_in = pool.pop()
        except IndexError:
            stand_in = new()
        module, (d0, d1, ) = stand_in
        try:
            d0['weight'] = a1
            d1['eps'] = a2
            result = forward(module, a0)
        finally:
            d0['weight'] = None
            pool.append(stand_in)
        """
        slots = new_stand_in(self.call.state).slots
        first = len(self.operands) - len(slots)
        held = [f"d{j}[{key!r}]" for j, (_, key) in enumerate(slots)]
        tensors = [slot for j, slot in enumerate(held) if self.call.types[first + j] == "Tensor"]
        # Each evaluation makes new containers: a forward may change those it is given.
        made = functools.partial(expression, leaves=self.operands, bind=self._bind)
        given = [made(part) for part in self.call.positional]
        given += [_keyword(name, made(part)) for name, part in self.call.keywords]
        return [
            "try:",
            "    stand_in = pool.pop()",
            "except IndexError:",
            "    stand_in = new()",
            f"module, {tuple_of(f'd{j}' for j in range(len(slots)))} = stand_in",
            "try:",
            *(f"    {s} = {a}" for s, a in zip(held, self.operands[first:], strict=True)),
            f"    result = forward({', '.join(['module', *given])})",
            *(["except Exception as error:", f"    {on_error}"] if on_error else []),
            "finally:",
            *(f"    {line}" for line in always),
            *(f"    {slot} = None" for slot in tensors),
            "    pool.append(stand_in)",
        ]

    def _bind(self, value: object) -> str:
        name = f"c{len(self._namespace)}"
        self._namespace[name] = value
        return name

    def alone(self, operands: Sequence[object]) -> tuple[object, StandIn]:
        """Call with a stand-in that no other call has, and that keeps its tensors.

        Returns:
            What the forward returns, and the stand-in.
        """
        stand_in = self._filled(operands)
        args, kwargs = self.call.arguments.unflatten(operands)
        return self.forward(stand_in.module, *args, **kwargs), stand_in

    def _filled(self, operands: Sequence[object]) -> StandIn:
        stand_in = new_stand_in(self.call.state)
        state = operands[self.call.first_state :]
        for (container, key), value in zip(stand_in.slots, state, strict=True):
            container[key] = value
        return stand_in

    def observe(self, operands: Sequence[object], *, may_keep: bool | None = None) -> object:
        """Call, and check that the call changes only tensors.

        Args:
            operands: The operands of the call.
            may_keep: Whether something may refer to the layer after the call, as what autograd
                keeps for a backward does; None: where gradients are recorded.

        Raises:
            UnsupportedValue: If it sets an attribute of the layer, changes a container that is
                an argument, or keeps the layer: an op has no such effect, and its stand-in for
                one layer is later that for another.
        """
        may_keep = torch.is_grad_enabled() if may_keep is None else may_keep
        stand_in = self._filled(operands)
        before, counts = stand_in.contents(), stand_in.references()
        args, kwargs = self.call.arguments.unflatten(operands)
        result = self.forward(stand_in.module, *args, **kwargs)
        changed = {name for (_, name), _ in before.items() ^ stand_in.contents().items()}
        where = getattr(self.forward, "__qualname__", self.forward)
        if changed:
            raise UnsupportedValue(f"{where} sets {', '.join(sorted(changed))} of the layer")
        if not self._holds((args, kwargs), operands[: self.call.first_state]):
            raise UnsupportedValue(f"{where} changes a container that is an argument")
        if not may_keep and (takes_identity(self.forward) or stand_in.is_kept(counts)):
            raise UnsupportedValue(f"{where} keeps the layer, or what it has made of its weights")
        return result

    def _holds(self, arguments: object, operands: Sequence[object]) -> bool:
        """Whether arguments still consist of these operands."""
        try:
            leaves, template = flatten(arguments)
        except UnsupportedValue:
            return False
        same = all(map(operator.is_, leaves, operands))
        return template == self.call.arguments and same


def _in_autocast(
    forward: Callable[..., object], region: tuple[str, torch.dtype] | None
) -> Callable[..., object]:
    if region is None:
        return forward
    kind, dtype = region

    @functools.wraps(forward)
    def inside(*args: object, **kwargs: object) -> object:
        # Autocast's cache would keep casts of the weights alive.
        with torch.autocast(kind, dtype, cache_enabled=False):
            return forward(*args, **kwargs)

    return inside


def _module_and_containers(call: Call) -> tuple[object, tuple[object, ...]]:
    stand_in = new_stand_in(call.state)
    return stand_in.module, tuple(container for container, _ in stand_in.slots)


def _keyword(name: str, value: str) -> str:
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return f"{name}={value}" if plain else f"**{{{name!r}: {value}}}"
