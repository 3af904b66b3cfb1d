"""Running a ``forward`` with the operands of an op: the body of one."""

from __future__ import annotations

import functools
import keyword
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernelgraph.graph.call import Call, Template, UnsupportedValue, put_leaves
from kernelgraph.graph.state import new_shell


class Runner:
    """Calls a ``forward`` with the operands of a `Call`.

    The objects that play ``self`` are made once and kept in a pool, since making one costs more
    than a small kernel; each thread in a call has its own, and between calls they hold no tensor.
    """

    def __init__(self, forward: Callable[..., Any], call: Call) -> None:
        self._call = call
        self._forward = _in_autocast(forward, call.autocast)
        self.run = _function(self._forward, call)
        """The call, with the operands as its arguments."""

    def __call__(self, operands: Sequence[Any]) -> Any:
        return self.run(*operands)

    def observe(self, operands: Sequence[Any]) -> Any:
        """Call, and see that the layer's attributes are afterwards what they were before.

        Raises:
            UnsupportedValue: If the call sets one: an op has no such effect.
        """
        shell = new_shell(self._call.state)
        count = len(operands) - len(shell.slots)
        for (container, key), value in zip(shell.slots, operands[count:], strict=True):
            container[key] = value
        before = shell.contents()
        args, kwargs = put_leaves(self._call.arguments, operands)
        result = self._forward(shell.module, *args, **kwargs)
        changed = {name for (_, name), _ in before.items() ^ shell.contents().items()}
        if changed:
            where = getattr(self._forward, "__qualname__", self._forward)
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


def _function(forward: Callable[..., Any], call: Call) -> Callable[..., Any]:
    """A Python function that calls ``forward`` with the operands that it is given.

    Written for the call, as a ``dataclass`` writes its ``__init__``: this is what a graph runs,
    and loops over the operands would cost several times what the function does. For a norm::

        def run(a0, a1, a2):
            try:
                shell = free.pop()
            except IndexError:
                shell = new_shell()
            module, (d0, d1) = shell
            try:
                d0['weight'] = a1
                d1['eps'] = a2
                return forward(module, a0)
            finally:
                d0['weight'] = None
                free.append(shell)
    """
    slots = new_shell(call.state).slots
    operands = [f"a{i}" for i in range(len(call.types))]
    first = len(operands) - len(slots)  # of the state's
    held = [f"d{j}[{key!r}]" for j, (_, key) in enumerate(slots)]
    into = [f"{slot} = {a}" for slot, a in zip(held, operands[first:], strict=True)]
    tensors = [slot for j, slot in enumerate(held) if call.types[first + j] == "Tensor"]
    namespace: dict[str, Any] = {"forward": forward, "put_leaves": put_leaves, "free": []}
    namespace["new_shell"] = functools.partial(_shell, call)
    _, (args, kwargs) = call.arguments
    given = [_expression(part, operands, namespace) for part in args[1]]
    given += [_keyword(k, _expression(part, operands, namespace)) for k, part in kwargs[1]]
    lines = [
        f"def run({', '.join(operands)}):",
        "    try:",
        "        shell = free.pop()",
        "    except IndexError:",
        "        shell = new_shell()",
        f"    module, ({''.join(f'd{j}, ' for j in range(len(slots)))}) = shell",
        "    try:",
        *(f"        {line}" for line in into),
        f"        return forward({', '.join(['module', *given])})",
        "    finally:",
        *(f"        {slot} = None" for slot in tensors),
        "        free.append(shell)",
    ]
    exec("\n".join(lines), namespace)
    made: Callable[..., Any] = namespace["run"]
    return made


def sizes_function(call: Call) -> Callable[..., tuple[Any, ...]]:
    """A function from a call's operands to all that sizes may depend on, to look them up by."""
    operands = [f"a{i}" for i in range(len(call.types))]
    parts = [f"{a}.shape" if i in call.tensors else a for i, a in enumerate(operands)]
    made: Callable[..., tuple[Any, ...]] = eval(
        f"lambda {', '.join(operands)}: ({''.join(f'{part}, ' for part in parts)})"
    )
    return made


def _shell(call: Call) -> tuple[Any, tuple[Any, ...]]:
    shell = new_shell(call.state)
    return shell.module, tuple(container for container, _ in shell.slots)


def _keyword(name: str, value: str) -> str:
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return f"{name}={value}" if plain else f"**{{{name!r}: {value}}}"


def _expression(template: Template, operands: Sequence[str], namespace: dict[str, Any]) -> str:
    """``template`` as an expression over the operands, made anew where it is evaluated: a
    forward may change the containers that it is given."""
    kind, body = template[0], template[1]
    if kind == "leaf":
        return operands[body]
    if kind in ("tuple", "list"):
        parts = "".join(f"{_expression(part, operands, namespace)}, " for part in body)
        return f"({parts})" if kind == "tuple" else f"[{parts}]"
    if kind == "dict":
        items = (f"{key!r}: {_expression(part, operands, namespace)}" for key, part in body)
        return f"{{{', '.join(items)}}}"
    name = f"c{len(namespace)}"
    namespace[name] = template
    if kind == "const":
        namespace[name] = body
        return name
    return f"put_leaves({name}, ({''.join(f'{a}, ' for a in operands)}))"
