"""Kinds of eager calls: what a decision for a call depends on, as a key that is quick to make."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from kernelgraph.cache import remember
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import (
    Path,
    State,
    access,
    field_names,
    is_constant,
    is_data,
    is_named_tuple,
    read,
    stable_text,
    tuple_of,
    write,
)

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
            key = form.key(module, args, kwargs)
            if key is not None and (value := form.values.get(key)) is not None:
                return value
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
            if (key := form.key(module, args, kwargs)) is not None and form.tells(module):
                remember(form.values, key, value)
                return
        form = _Form(module, state)
        if (key := form.key(module, args, kwargs)) is not None:
            form.values[key] = value
            self._forms = (form, *self._forms[: _MOST_FORMS - 1])


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
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
        key: tuple[Any, ...] = tuple(map(_key, args + held))
        if kwargs:
            key += tuple([(name, _key(value)) for name, value in kwargs.items()])
        if _torch.any_autocast():
            key += (_torch.autocast_regions(),)
        return key

    def tells(self, module: nn.Module) -> bool:
        """Whether keys tell all that there is to tell of a layer's state."""
        return not any(map(_is_odd, map(_key, self._read(module))))


def _quick_access(module: nn.Module, path: Path) -> str:
    """What is at ``path`` of ``module``, past the attribute lookup of modules, which is slow."""
    start, value = "module", module
    for i, step in enumerate(path):
        homes = ("_parameters", "_buffers", "_modules") if isinstance(value, nn.Module) else ()
        home = next((h for h in homes if step in getattr(value, h)), None)
        start = access(start, (step,) if home is None else (home, (str(step),)))
        value = read(module, path[: i + 1])
    return start


_ODD = object()
_TENSORS = frozenset({Tensor, nn.Parameter})
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})


def _key(value: Any) -> Any:
    """The type and form of a tensor, the type and value of anything else that is data.

    Of what a call cannot be made again with it is the type and `_ODD`: it keeps the reference,
    whatever it is.
    """
    cls: type = type(value)
    if cls in _TENSORS or isinstance(value, Tensor):
        try:
            layout: Any = value.stride()
        except RuntimeError:  # a sparse one
            layout = value.layout
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
    return cls, _ODD


def _is_odd(key: Any) -> bool:
    return key is _ODD or (type(key) is tuple and any(map(_is_odd, key)))
