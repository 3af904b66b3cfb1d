"""What Dynamo traces in the place of a layer's forward, once there is an op for the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kernelgraph.graph.calls import Path, Step, access, expression, literal, tuple_of, write
from kernelgraph.graph.ops import Lowered, pack


def reader(paths: Sequence[Path]) -> Callable[[Any], tuple[Any, ...]]:
    """A function from a layer to its values at ``paths``."""
    values = tuple_of(access("module", path) for path in paths)
    made: Callable[[Any], tuple[Any, ...]] = write(["module"], [f"return {values}"], {})
    return made


_ARGUMENTS: dict[Step, str] = {(0,): "args", (1,): "kwargs"}


def op_call(
    lowered: Lowered, arguments: Sequence[Path | float], states: int, numbers: Sequence[int | float]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function ``(op, args, kwargs, state, constants)`` that makes a layer's call with its op.

    Args:
        lowered: The op.
        arguments: Where in ``(args, kwargs)`` its first operands are; a number for one that is to
            be a constant.
        states: How many values the state has, which are the next operands.
        numbers: The last operands.

    Returns:
        The function, and the constants that it takes.
    """
    constants: list[Any] = []

    def constant(value: Any) -> str:
        constants.append(value)
        return f"constants[{len(constants) - 1}]"

    operands = [
        literal(path, constant)
        if isinstance(path, float)
        else access(_ARGUMENTS[path[0]], path[1:])
        for path in arguments
    ]
    first_state = len(operands)
    operands += [f"state[{i}]" for i in range(states)]
    operands += [literal(number, constant) for number in numbers]
    given = pack(operands, lowered.packed)
    if lowered.packed:
        given[0] = f"[{', '.join(given[0])}]"
    count = len(lowered.results)
    one = lowered.returns == 1
    results = ["results"] if one else [f"results[{i}]" for i in range(count)]
    lines = [f"results = op({', '.join(given)})"]
    for number, i in enumerate(lowered.written, count):
        # No gradient goes from one call to the next through what a layer counts.
        value = f"results[{number}]" + (".detach()" if i >= first_state else "")
        lines.append(f"{operands[i]}.copy_({value})")
    lines.append(f"return {expression(lowered.output, results, constant)}")
    function = write(["op", "args", "kwargs", "state", "constants"], lines, {})
    return function, tuple(constants)
