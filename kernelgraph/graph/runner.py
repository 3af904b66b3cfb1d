"""Running a ``forward`` with the operands of an op: the body of one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernelgraph.graph.call import Call, UnsupportedValue, paths_of, put_leaves
from kernelgraph.graph.paths import read
from kernelgraph.graph.shell import new_shell


class Runner:
    """Calls a ``forward`` with the operands of a `Call`: the body of an op.

    The object that plays ``self`` and the containers of the arguments are made once and kept in a
    pool, since making them costs more than a small kernel; each thread in a call has its own, and
    between calls they hold no tensor.
    """

    def __init__(self, forward: Callable[..., Any], call: Call) -> None:
        self._forward = _in_autocast(forward, call.autocast)
        self._call = call
        self._free: list[_Activation] = []

    def __call__(self, operands: Sequence[Any]) -> Any:
        try:
            activation = self._free.pop()
        except IndexError:
            activation = _Activation(self._call)
        slots = activation.slots
        try:
            for (container, key), value in zip(slots, operands):  # noqa: B905 (hot path)
                container[key] = value
            args, kwargs = activation.arguments()
            return self._forward(activation.shell.module, *args, **kwargs)
        finally:
            for container, key in slots:
                container[key] = None
            self._free.append(activation)

    def observe(self, operands: Sequence[Any]) -> Any:
        """Call, and see that the layer's attributes are afterwards what they were before.

        Raises:
            UnsupportedValue: If the call sets one: an op has no such effect.
        """
        activation = _Activation(self._call)
        for (container, key), value in zip(activation.slots, operands, strict=True):
            container[key] = value
        before = activation.shell.contents()
        args, kwargs = activation.arguments()
        result = self._forward(activation.shell.module, *args, **kwargs)
        changed = {name for (_, name), _ in before.items() ^ activation.shell.contents().items()}
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


class _Activation:
    """What a call needs and no other call may use at the same time."""

    def __init__(self, call: Call) -> None:
        self.shell = new_shell(call.state)
        template = call.arguments
        leaves = paths_of(template)
        _, (args, kwargs) = template
        # Containers among the arguments are made anew for each call, which may change them.
        parts = [*args[1], *(part for _, part in kwargs[1])]
        flat = all(part[0] in ("leaf", "const") for part in parts)
        self._values: list[Any] = [None] * len(leaves)
        self._template = None if flat else template
        self._args: list[Any] = []
        self._kwargs: dict[str, Any] = {}
        self.slots: list[tuple[Any, Any]]
        if flat:
            nothing = [None] * len(leaves)
            self._args = list(put_leaves(args, nothing))
            self._kwargs = put_leaves(kwargs, nothing)
            containers = (self._args, self._kwargs)
            self.slots = [(read(containers, path[:1]), path[1][0]) for path in leaves]
        else:
            self.slots = [(self._values, i) for i in range(len(leaves))]
        self.slots += self.shell.slots

    def arguments(self) -> tuple[Sequence[Any], dict[str, Any]]:
        if self._template is None:
            return self._args, self._kwargs
        args, kwargs = put_leaves(self._template, self._values)
        return args, kwargs
