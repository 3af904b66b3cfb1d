"""The effects of one run of a forward: writes, random draws, changed objects, and its results."""

from __future__ import annotations

import contextlib
import enum
import functools
import math
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernelgraph.eager.twins import Twins, attributes_of
from kernelgraph.graph.calls import UnsupportedValue, flatten_tensors, path_text
from kernelgraph.graph.infer import extent, versions


class Result(NamedTuple):
    """One tensor that a forward returned."""

    path: str
    """The path to it from the output."""
    strides: tuple[int, ...]
    """Its strides; of dimensions with one element they are 0."""
    dense_strides: tuple[int, ...]
    """The strides of a tensor without gaps whose dimensions are in the same order."""
    shares: frozenset[str]
    """The paths of the tensors of the call, and of earlier results, whose memory it shares."""


@dataclass(frozen=True)
class Effects:
    """The effects of one run of a forward on copies of a layer and of the arguments of a call."""

    written: frozenset[str]
    """The paths of the tensors that it wrote into, if only with what they held."""
    changed: frozenset[str]
    """The paths of those whose memory has changed."""
    draws: bool
    """Whether it drew random numbers."""
    before: dict[str, object]
    """The `outline` of the arguments and the layer before the run."""
    after: dict[str, object]
    """Their outline after the run."""
    output: dict[str, object]
    """The outline of what it returned."""
    results: tuple[Result, ...]
    """The tensors in what it returned."""
    plain: bool
    """Whether `flatten_tensors` takes these out of what it returned."""

    @classmethod
    def of(
        cls,
        forward: Callable[..., object],
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        names: Sequence[str],
    ) -> Effects:
        """Run a forward on copies, and find its effects.

        Args:
            forward: The forward of a kernel or of a reference.
            module: The layer.
            args: The positional arguments.
            kwargs: The keyword arguments.
            names: The names of the positional arguments.

        Raises:
            CannotCopy: If something in the call cannot be copied.
            Exception: Whatever the forward raises.
        """
        twins = Twins(module.modules())
        try:
            return cls._on(twins, forward, module, args, kwargs, names)
        finally:
            twins.drop()

    @classmethod
    def _on(
        cls,
        twins: Twins,
        forward: Callable[..., object],
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        names: Sequence[str],
    ) -> Effects:
        copies = [twins.of(v, n, strict=True) for v, n in zip(args, names, strict=True)]
        keywords = {name: twins.of(value, name, strict=True) for name, value in kwargs.items()}
        made = twins.of(module, "self")
        parts = dict(zip(names, copies, strict=True)) | keywords | {"self": made}
        numbers = twins.numbers()
        before = outline(parts, numbers)
        versions_before = versions([t.twin for t in twins.tensors])
        with _generators_kept({t.original.device for t in twins.tensors}) as drew:
            output = forward(made, *copies, **keywords)
        draws = drew() or any(
            not torch.equal(generator.get_state(), twin.get_state())
            for generator, twin in twins.generators
        )
        changed = frozenset(t.path for t in twins.tensors if not _same_bits(t.original, t.twin))
        counted = zip(versions_before, versions([t.twin for t in twins.tensors]), strict=True)
        written = changed | {
            t.path for t, (old, new) in zip(twins.tensors, counted, strict=True) if old != new
        }
        held = {t.path: t.twin for t in twins.tensors}
        after = outline(parts, numbers, held)
        tensors: dict[str, Tensor] = {}
        returned = outline({"": output}, {}, tensors)
        try:
            leaves, template = flatten_tensors(output)
            paths = [path_text(path) for path in template.paths()]
            tensors, plain = dict(zip(paths, leaves, strict=True)), True
        except UnsupportedValue:
            plain = False
        results = tuple(_results(tensors, held))
        return cls(written, changed, draws, before, after, returned, results, plain)

    @property
    def changes(self) -> dict[str, object]:
        """The entries of ``after`` that the run has changed."""
        return {
            path: self.after.get(path)
            for path in self.before.keys() | self.after.keys()
            if not alike(self.before.get(path), self.after.get(path))
        }


# --- results ------------------------------------------------------------------------------------


def _results(tensors: dict[str, Tensor], held: dict[str, Tensor]) -> Iterator[Result]:
    taken = [(path, extent(tensor)) for path, tensor in held.items()]
    for path, tensor in tensors.items():
        start, end = extent(tensor)
        shares = frozenset(name for name, (first, last) in taken if start < last and first < end)
        dense = torch.empty_like(tensor, device="meta")
        yield Result(path, strides_of(tensor), strides_of(dense), shares)
        taken.append((f"result{path}", (start, end)))


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor, with 0 for dimensions that have one element."""
    return tuple(s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*flat)


# --- outlines -----------------------------------------------------------------------------------


def outline(
    parts: dict[str, Any], numbers: dict[int, int], tensors: dict[str, Tensor] | None = None
) -> dict[str, object]:
    """Describe values and all that is in them, by path, without the contents of tensors.

    Args:
        parts: The values by path.
        numbers: Numbers of objects, by id, that are told from others of their kind.
        tensors: A table that receives the tensors by path.
    """
    found: dict[str, object] = {}
    todo: list[tuple[str, Any, tuple[object, ...]]] = [(p, v, ()) for p, v in parts.items()]
    while todo:
        path, value, around = todo.pop()
        number = numbers.get(id(value))
        if isinstance(value, Tensor):
            strides = () if number is None else strides_of(value)
            found[path] = number, (tuple(value.shape), value.dtype, value.device), strides
            if tensors is not None:
                tensors[path] = value
        elif isinstance(value, _VALUES):
            found[path] = value
        else:
            found[path] = type(value), number
            if not any(value is outer for outer in around):
                todo += [(f"{path}{k}", v, (*around, value)) for k, v in _parts_of(value, number)]
    return found


_VALUES = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
_MODULE_FIELDS = frozenset(vars(nn.Module())) - {"training"} | {"forward"}


def _parts_of(value: Any, number: int | None) -> list[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        if number is None:  # it is no part of the layer
            return []
        own = {**vars(value), **value._parameters, **value._buffers, **value._modules}
        return [(f".{name}", part) for name, part in own.items() if name not in _MODULE_FIELDS]
    if isinstance(value, (type, *_CODE)):
        return []
    parts = [(f".{name}", part) for name, part in attributes_of(value).items()]
    if isinstance(value, dict):
        return parts + [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return parts + [(f"[{i}]", part) for i, part in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [*parts, ("{}", len(value))]
    return parts if number is not None else []


_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


def alike(one: object, other: object) -> bool:
    """Whether two entries of outlines are equal; a float may be rounded differently."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6) or one != one != other
    return type(one) is type(other) and one == other


# --- random generators --------------------------------------------------------------------------


@contextlib.contextmanager
def _generators_kept(devices: set[torch.device]) -> Iterator[Callable[[], bool]]:
    """Run code, and then restore the random generators of torch, Python and numpy.

    Yields:
        A function that says afterwards whether the code drew random numbers.
    """
    generators = _generators(devices)
    states = [get() for get, _ in generators]
    drew = False
    try:
        yield lambda: drew
    finally:
        for (get, restore), state in zip(generators, states, strict=True):
            if not _same_state(get(), state):
                drew = True
                restore(state)


def _generators(
    devices: set[torch.device],
) -> list[tuple[Callable[[], Any], Callable[[Any], object]]]:
    """Return functions that get and set the state of each generator that devices share."""
    found: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (torch.get_rng_state, torch.set_rng_state),
        (random.getstate, random.setstate),
    ]
    for device in devices:
        if device.type in ("cuda", "xpu"):
            kind: Any = getattr(torch, device.type)
            get = functools.partial(kind.get_rng_state, device)
            found.append((get, functools.partial(kind.set_rng_state, device=device)))
    if "numpy" in sys.modules:
        numpy: Any = sys.modules["numpy"]
        found.append((numpy.random.get_state, numpy.random.set_state))
    return found


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return all(map(_same_state, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)
