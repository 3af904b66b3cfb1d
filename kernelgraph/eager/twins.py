"""Copies of a layer and of the arguments of a call, on which a forward leaves no trace."""

from __future__ import annotations

import copy
import enum
import types
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernelgraph.graph.infer import reach
from kernelgraph.kernel import BoundForward

_copies: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
"""The copy of each module, empty while it is not in use. A kernel may know layers by their ids, so
a copy lives as long as its module, and no other object gets its id."""


class CannotCopy(Exception):
    """A value may be written into, and cannot be copied."""


class TensorTwin(NamedTuple):
    """A tensor and its copy."""

    path: str
    """The path to the tensor, as Python writes it."""
    original: Tensor
    twin: Tensor


class Twins:
    """Copies of values that refer to each other as the originals do.

    Tensors keep their strides, and share no memory with the originals. Modules are copied if they
    are among ``modules``; any other is used as it is, and so is an object that holds one.

    Args:
        modules: The layer and its submodules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = {id(module) for module in modules}
        self._made: dict[int, tuple[object, object]] = {}
        self.tensors: list[TensorTwin] = []
        """The tensors with their copies, in the order in which they were found."""
        self.generators: list[tuple[torch.Generator, torch.Generator]] = []
        """The random generators with their copies."""
        self._copied: list[nn.Module] = []

    def drop(self) -> None:
        """Free what the copies of modules hold."""
        for module in self._copied:
            vars(module).clear()

    def of(self, value: Any, path: str, *, strict: bool = False) -> Any:
        """Return the copy of a value.

        Args:
            value: The value.
            path: The path to it, as Python writes it.
            strict: Whether every object that may change has to be copied.

        Raises:
            CannotCopy: If a tensor cannot be copied, or an object in a value that is ``strict``.
        """
        if _is_atom(value):
            return value
        if id(value) in self._made:
            return self._made[id(value)][1]
        if isinstance(value, Tensor):
            made: Any = _tensor_twin(value, path)
            self.tensors.append(TensorTwin(path, value, made))
        elif isinstance(value, torch.Generator):
            made = value.clone_state()
            self.generators.append((value, made))
        elif isinstance(value, nn.Module):
            return self._module(value, path) if id(value) in self._modules else value
        elif isinstance(value, tuple):
            parts = [self.of(part, f"{path}[{i}]", strict=strict) for i, part in enumerate(value)]
            same = all(part is old for part, old in zip(parts, value, strict=True))
            made = value if same else tuple.__new__(type(value), parts)
        elif isinstance(value, (BoundForward, types.MethodType)):
            return self._bound(value, path)
        else:
            return self._object(value, path, strict)
        self._made[id(value)] = value, made
        return made

    def numbers(self) -> dict[int, int]:
        """Return a number for each copied object, by its id; equal copies have equal numbers."""
        return {id(made): number for number, (_, made) in enumerate(self._made.values())}

    def _module(self, module: nn.Module, path: str) -> nn.Module:
        made = _copies.get(module)
        if made is None or type(made) is not type(module) or vars(made):
            _copies[module] = made = object.__new__(type(module))
        self._copied.append(made)
        self._made[id(module)] = module, made
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                held = {k: self.of(v, f"{path}.{k}") for k, v in value.items()}
                made.__dict__[name] = type(value)(held)
            elif name in _HOOKS:
                made.__dict__[name] = value
            else:
                made.__dict__[name] = self.of(value, f"{path}.{name}")
        return made

    def _bound(self, method: Any, path: str) -> Any:
        """Return a method, or the forward of a kernel, that is bound to the copy of its module."""
        if isinstance(method, types.MethodType):
            return types.MethodType(method.__func__, self.of(method.__self__, path))
        made = type(method)(method.func, *(self.of(part, path) for part in method.args))
        vars(made).update(vars(method))
        return made

    def _object(self, value: Any, path: str, strict: bool) -> Any:
        """Return a copy of a container or another object that consists of data and tensors."""
        try:
            made = copy.copy(value) if _is_transparent(value, ()) else None
        except Exception:  # whatever the object raises that cannot be copied
            made = None
        if made is None:
            if strict:
                raise CannotCopy(f"{path} is a {type(value).__name__}")
            return value
        self._made[id(value)] = value, made
        if isinstance(value, dict):
            for key, part in value.items():
                dict.__setitem__(made, key, self.of(part, f"{path}[{key!r}]", strict=strict))
        elif isinstance(value, (list, deque)):
            for i, part in enumerate(value):
                made[i] = self.of(part, f"{path}[{i}]", strict=strict)
        elif isinstance(value, set):
            made.clear()
            made.update([self.of(part, path, strict=strict) for part in value])
        for name, part in attributes_of(value).items():
            object.__setattr__(made, name, self.of(part, f"{path}.{name}", strict=strict))
        return made


def attributes_of(value: object) -> dict[str, Any]:
    """Return the attributes of an object, those in slots too."""
    slots = [n for base in type(value).__mro__ for n in _names(vars(base).get("__slots__", ()))]
    return {
        **{name: getattr(value, name) for name in slots if hasattr(value, name)},
        **getattr(value, "__dict__", {}),
    }


def _names(slots: str | Sequence[str]) -> list[str]:
    names = [slots] if isinstance(slots, str) else [*slots]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


_HOOKS = frozenset(name for name in vars(nn.Module()) if "hooks" in name)
_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    type,
    enum.Enum,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


def _is_atom(value: object) -> bool:
    return isinstance(value, _ATOMS) or value is Ellipsis


def _is_transparent(value: Any, around: tuple[object, ...]) -> bool:
    """Whether an object consists of data, tensors and such objects, all through."""
    if _is_atom(value) or isinstance(value, (Tensor, torch.Generator)):
        return True
    if any(value is outer for outer in around):  # it was asked about before
        return True
    inside = (*around, value)
    parts: list[Any] = [*attributes_of(value).values()]
    if isinstance(value, dict):
        parts += value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        parts += value
    elif (
        isinstance(value, nn.Module)
        or not (parts or hasattr(value, "__dict__"))
        or type(value).__module__ == "builtins"
    ):
        return False
    return all(_is_transparent(part, inside) for part in parts)


def _tensor_twin(tensor: Tensor, path: str) -> Tensor:
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    if not plain or tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise CannotCopy(f"{path} is a {str(tensor.layout)[6:]} {type(tensor).__name__}")
    twin = memory_copy(tensor)
    if type(tensor) is not Tensor:
        twin = type(tensor)(twin)
    twin.requires_grad_(tensor.requires_grad)
    vars(twin).update(vars(tensor))
    return twin


def memory_copy(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor with the same strides."""
    plain = tensor.detach()
    if plain.is_conj() or plain.is_neg():
        return plain.clone()
    memory = plain.as_strided((reach(plain) // plain.itemsize,), (1,))
    return memory.clone().as_strided(plain.shape, plain.stride())
