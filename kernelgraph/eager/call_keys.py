"""Keys of eager calls: everything that the decision for a call depends on, quick to compute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeAlias, TypeVar

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
    write_function,
)

V = TypeVar("V")

Key: TypeAlias = tuple[Hashable, ...]
"""The key of a call: one item for each value that the call depends on."""

MAX_LAYOUTS = 16
"""The largest number of state layouts that a `CallTable` remembers."""


class CallTable(Generic[V]):
    """Values by the key of a call.

    The key covers the types, shapes, strides, dtypes and devices of the tensors that a layer is
    called with and that it holds, the other values among them, and the autocast region.

    The class of a layer does not say where the state is that its forward reads: one instance has
    a bias, and another has none. So there is one table for each `_StateLayout`.
    """

    def __init__(self) -> None:
        self._layouts: tuple[_StateLayout[V], ...] = ()

    def __len__(self) -> int:
        return sum(len(layout.values) for layout in self._layouts)

    def get(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> V | None:
        """Return the value for a call, if there is one."""
        for layout in self._layouts:
            key = layout.key(module, args, kwargs)
            if key is not None and (value := layout.values.get(key)) is not None:
                return value
        return None

    def put(
        self,
        module: nn.Module,
        state: State,
        args: tuple[object, ...],
        kwargs: dict[str, object],
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
        for layout in self._layouts:
            if (key := layout.key(module, args, kwargs)) is not None and layout.covers(module):
                remember(layout.values, key, value)
                return
        layout = _StateLayout(module, state)
        if (key := layout.key(module, args, kwargs)) is not None:
            layout.values[key] = value
            self._layouts = (layout, *self._layouts[: MAX_LAYOUTS - 1])


class _StateLayout(Generic[V]):
    """The places in a layer that its calls read, and the values for calls of layers like it."""

    def __init__(self, module: nn.Module, state: State) -> None:
        paths = (*state.tensors, *(path for path, _ in state.values))
        values = tuple_of(_quick_access(module, path) for path in paths)
        self._read: Callable[[nn.Module], tuple[object, ...]] = write_function(
            ["module"], [f"return {values}"], {}, title=f"read the state of {type(module).__name__}"
        )
        self._types = [(path, type(read(module, path))) for path in state.types]
        self._checks = state.checks
        self.values: dict[Key, V] = {}

    def key(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Key | None:
        """Return the key of a call; None where the layer has another layout."""
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
        key: Key = tuple(map(_key, args + held))
        if kwargs:
            key += tuple([(name, _key(value)) for name, value in kwargs.items()])
        if _torch.any_autocast():
            key += (_torch.autocast_regions(),)
        return key

    def covers(self, module: nn.Module) -> bool:
        """Whether keys contain the whole value of all that the layer's calls read."""
        return not any(map(_is_opaque, map(_key, self._read(module))))


def _quick_access(module: nn.Module, path: Path) -> str:
    """Return an expression for the value at ``path`` of ``module``.

    It avoids the attribute lookup of modules, which is slow.
    """
    start, value = "module", module
    for i, step in enumerate(path):
        homes = ("_parameters", "_buffers", "_modules") if isinstance(value, nn.Module) else ()
        home = next((h for h in homes if step in getattr(value, h)), None)
        start = access(start, (step,) if home is None else (home, (str(step),)))
        value = read(module, path[: i + 1])
    return start


_OPAQUE = object()
_TENSORS = frozenset({Tensor, nn.Parameter})
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})


def _key(value: Any) -> Key:
    """Return the type and layout of a tensor, or the type and value of other data.

    For a value that a call cannot be repeated with it is the type and `_OPAQUE`: the layer then
    keeps its reference, whatever the value is.
    """
    cls: type = type(value)
    if cls in _TENSORS or isinstance(value, Tensor):
        try:
            layout: Hashable = value.stride()
        except RuntimeError:  # a sparse tensor
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
    return cls, _OPAQUE


def _is_opaque(key: Hashable) -> bool:
    return key is _OPAQUE or (type(key) is tuple and any(map(_is_opaque, key)))


# --- forms --------------------------------------------------------------------------------------


class FormKeys:
    """Keys of the forms of calls: shapes, strides and dtypes of the tensors among the arguments.

    They are quicker to compute than the keys of a `CallTable`. Numbers count only where they are
    small, as dimensions are, and of the layer only its own flags and the dtypes of its parameters.
    """

    def __init__(self) -> None:
        self._flags: dict[type, Callable[[dict[str, Any]], Key]] = {}
        """For each class, a function that reads the flags of a layer from its attributes."""
        self._names: dict[type, dict[str, str]] = {}
        """For each class, the flags that all its layers have so far, as expressions by name."""

    def of(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Hashable:
        """Return the key of a call."""
        cls, held = type(module), module.__dict__
        try:
            key = self._flags[cls](held)
        except (KeyError, RuntimeError):  # a new class, or another of its layers has other flags
            key = self.read_flags(module)(held)
        for value in args:
            key += (_form(value),)
        if kwargs:
            key += tuple([(name, _form(value)) for name, value in kwargs.items()])
        if _torch.any_autocast():
            key += (_torch.autocast_regions(),)
        return key

    def read_flags(self, module: nn.Module) -> Callable[[dict[str, Any]], Key]:
        """Write the function that reads the flags that all layers of a class have so far."""
        cls, held = type(module), module.__dict__
        known = self._names.get(cls)
        flags = _flags_of(held)
        self._names[cls] = flags = (
            flags if known is None else {n: f for n, f in known.items() if flags.get(n) == f}
        )
        lines = [
            "parameters = held['_parameters']",
            f"return (cls, len(held), {', '.join(flags.values())}{',' if flags else ''})",
        ]
        title = f"read the flags of {cls.__name__}"
        self._flags[cls] = write_function(["held"], lines, {"cls": cls}, title=title)
        return self._flags[cls]


def _flags_of(held: dict[str, Any]) -> dict[str, str]:
    """Return expressions for the flags among the attributes of a layer."""
    flags = {
        name: f"held[{name!r}]" if type(value) in _FLAGS else f"not held[{name!r}]"
        for name, value in held.items()
        if type(value) in (*_FLAGS, int, float) and name not in _UNREAD
    }
    dtypes = {
        f"_parameters {name}": f"getattr(parameters[{name!r}], 'dtype', None)"
        for name in held["_parameters"]
    }
    return {**flags, **dtypes}


_FLAGS = frozenset({bool, str, type(None), torch.dtype, torch.device})
_UNREAD = frozenset(vars(nn.Module())) - {"training"}
_SMALL = range(-8, 9)
"""The numbers that may be dimensions."""


def _form(value: Any) -> Hashable:
    """Return the layout of a tensor, a flag or a small number as it is, or the type of others."""
    cls: type = type(value)
    if cls is Tensor or cls is nn.Parameter:
        try:
            return value.shape, value.stride(), value.dtype
        except RuntimeError:  # a sparse tensor
            return cls, value.shape, value.layout, value.dtype
    if cls in _FLAGS or (cls is int and value in _SMALL):
        return cls, value
    if cls in (tuple, list, torch.Size) or is_named_tuple(cls):
        return cls, *map(_form, value)
    if cls in (dict, OrderedDict):
        return cls, *((key, _form(part)) for key, part in value.items())
    if isinstance(value, Tensor):
        return cls, value.shape, value.dtype
    if (names := field_names(cls)) is not None:
        return cls, *(_form(getattr(value, name)) for name in names)
    return cls
