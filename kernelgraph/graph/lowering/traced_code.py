"""The code that Dynamo traces in the place of a layer's forward, once the call has an op.

It is written for each layer and call signature, without loops: Dynamo takes long over a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from kernelgraph.graph.calls import (
    Path,
    Step,
    access,
    expression,
    literal,
    tuple_of,
    write_function,
)
from kernelgraph.graph.ops import Lowered, pack

StateReader = Callable[[nn.Module], tuple[object, ...]]
"""A function from a layer to the values of its state."""

OpCaller = Callable[..., object]
"""A function ``(op, args, kwargs, state, constants)`` that makes a layer's call with its op."""

_ARGUMENTS: dict[Step, str] = {(0,): "args", (1,): "kwargs"}
"""The parameters of an `OpCaller` that the first step of an argument's path leads to."""


def state_reader(paths: Sequence[Path]) -> StateReader:
    """Write the function from a layer to its values at ``paths``."""
    values = tuple_of(access("module", path) for path in paths)
    made: StateReader = write_function(["module"], [f"return {values}"], {}, title="read the state")
    return made


def op_caller(
    lowered: Lowered, arguments: Sequence[Path | float], states: int, numbers: Sequence[int | float]
) -> tuple[OpCaller, tuple[object, ...]]:
    """Write the function that makes a layer's call with its op.

    Args:
        lowered: The op.
        arguments: The paths in ``(args, kwargs)`` to the op's first operands; a float for an
            operand that is to be a constant.
        states: The number of tensors of the layer's state, which are the next operands.
        numbers: The last operands.

    Returns:
        The function, and the constants that it takes.
    """
    constants: list[object] = []

    def constant(value: object) -> str:
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
    lines = [f"results = op({', '.join(given)})"]
    results = [f"results[{i}]" for i in range(lowered.returns)]
    if lowered.returns == 1:
        results = ["results"]
    for number, i in enumerate(lowered.written, len(lowered.results)):
        # No gradient goes from one call to the next through what a layer counts.
        value = results[number] + (".detach()" if i >= first_state else "")
        lines.append(f"{operands[i]}.copy_({value})")
    for i, operand in lowered.aliases:  # as they are now, written
        results[i] = operands[operand]
    lines.append(f"return {expression(lowered.output, results, constant)}")
    parameters = ["op", "args", "kwargs", "state", "constants"]
    function: OpCaller = write_function(parameters, lines, {}, title=f"call {lowered.name}")
    return function, tuple(constants)
