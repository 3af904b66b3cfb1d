"""Kinds of eager calls: what a decision for a call depends on, as a key that is quick to make."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from kernelgraph.graph import _torch
from kernelgraph.graph.call import field_names
from kernelgraph.graph.constants import is_constant, is_data, is_named_tuple, stable_text
from kernelgraph.graph.paths import Path, read
from kernelgraph.graph.source import access, tuple_of, write
from kernelgraph.graph.state import State
from kernelgraph.graph.told import remember

V = TypeVar("V")
_MOST_FORMS = 16


class Kinds(Generic[V]):
    """Values by the kind of a call: the forms of the tensors that a layer is called with and that
    it holds, the other values among them, and the autocast region.

    A layer's class does not say where it has what its forward reads: one instance has a bias, and
    another has not. So there is one table for each `_Form` of the layer.
    """

    def __init__(self) -> None:
        self._forms: tuple[_Form[V], ...] = ()

    def get(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> V | None:
        """The value for a call, if there is one."""
        for form in self._forms:
            if (key := form.key(module, args, kwargs)) is not None:
                return form.values.get(key)
        return None

    def put(
        self,
        module: nn.Module,
        state: State,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        value: V,
    ) -> None:
        """Set the value for a call.

        Args:
            module: The layer that is called.
            state: The state that it reads.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            value: The value.
        """
        for form in self._forms:
            if (key := form.key(module, args, kwargs)) is not None:
                remember(form.values, key, value)
                return
        form = _Form(module, state)
        if (key := form.key(module, args, kwargs)) is not None:
            form.values[key] = value
            self._forms = (form, *self._forms[: _MOST_FORMS - 1])


class _Odd(Exception):
    """A value that no key can be made of."""


_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})


class _Form(Generic[V]):
    """Where a layer has what its calls depend on, and the values for calls by what that is."""

    def __init__(self, module: nn.Module, state: State) -> None:
        paths = (*state.tensors, *(path for path, _ in state.values))
        values = tuple_of(_quick_access(module, path) for path in paths)
        self._read: Callable[[Any], tuple[Any, ...]] = write(["module"], [f"return {values}"], {})
        self._types = [(path, type(read(module, path))) for path in state.types]
        self._checks = state.checks
        self.values: dict[Any, V] = {}

    def key(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call depends on; None where the layer is not of this form."""
        try:
            held = self._read(module)
            for path, cls in self._types:
                if type(read(module, path)) is not cls:
                    return None
            for path, check in self._checks:
                if not check(read(module, path)):
                    return None
            state = [_key(value) for value in held]
        except (AttributeError, KeyError, IndexError, TypeError, _Odd):
            return None
        given = [_argument_key(value) for value in args]
        if kwargs:
            given += [(name, _argument_key(value)) for name, value in kwargs.items()]
        return (len(args), *given, *state, _torch.autocast_regions())


def _quick_access(module: nn.Module, path: Path) -> str:
    """What is at ``path`` of ``module``, past the attribute lookup of modules, which is slow."""
    start, value = "module", module
    for i, step in enumerate(path):
        homes = ("_parameters", "_buffers", "_modules") if isinstance(value, nn.Module) else ()
        home = next((h for h in homes if step in getattr(value, h)), None)
        start = access(start, (step,) if home is None else (home, (str(step),)))
        value = read(module, path[: i + 1])
    return start


def _argument_key(value: Any) -> Any:
    try:
        return _key(value)
    except _Odd:  # whatever it is, its type keeps the reference
        return type(value), "odd"


def _key(value: Any) -> Any:
    cls = type(value)
    if isinstance(value, Tensor):
        strided = value.layout is torch.strided
        layout = value.stride() if strided else value.layout
        return cls, value.shape, layout, value.dtype, value.device, value.requires_grad
    if cls in _PLAIN:
        return cls, value
    if cls in (tuple, list, torch.Size) or is_named_tuple(cls):
        return cls, *map(_key, value)
    if cls in (dict, OrderedDict):
        return cls, *((key, _key(part)) for key, part in value.items())
    if (names := field_names(cls)) is not None:
        return cls, *(_key(getattr(value, name)) for name in names)
    if is_constant(value) or is_data(value):
        return cls, stable_text(value)
    raise _Odd
