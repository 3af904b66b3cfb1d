"""What of a layer's state a ``forward`` reads: the values that a custom op takes as operands."""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Path = tuple[str, ...]
"""Attribute names from the layer to a value: ``("experts", "weight")`` for self.experts.weight."""

EVERYTHING: frozenset[Path] = frozenset({()})
"""The reads of a function whose use of ``self`` cannot be told from its source."""


class UnsupportedState(Exception):
    """A layer reads something that can be neither an operand nor a guarded constant."""


@functools.cache
def attribute_reads(forward: Callable[..., Any]) -> frozenset[Path]:
    """The attribute chains that ``forward`` reads of its first parameter, from its source.

    Every appearance of ``self`` must be the start of such a chain; where it is anything else (it
    is handed to another function, say), or there is no source, the answer is `EVERYTHING`.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return EVERYTHING
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return EVERYTHING
    parameters = [*function.args.posonlyargs, *function.args.args]
    if not parameters:
        return EVERYTHING
    visitor = _Reads(parameters[0].arg)
    for statement in function.body:
        visitor.visit(statement)
    return EVERYTHING if visitor.escapes else frozenset(visitor.paths)


class _Reads(ast.NodeVisitor):
    def __init__(self, self_name: str) -> None:
        self.self_name = self_name
        self.paths: set[Path] = set()
        self.escapes = False

    def visit_Attribute(self, node: ast.Attribute) -> None:
        names: list[str] = []
        value: ast.expr = node
        while isinstance(value, ast.Attribute):
            names.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id == self.self_name:
            self.paths.add(tuple(reversed(names)))
        else:
            self.visit(value)

    def visit_Name(self, node: ast.Name) -> None:
        # ``super`` needs the instance without naming it.
        if node.id in (self.self_name, "super", "__class__"):
            self.escapes = True


@dataclass(frozen=True)
class State:
    """Where the values are that a layer's forwards read, relative to the layer."""

    tensors: tuple[Path, ...]
    """Operands of the op."""
    numbers: tuple[tuple[Path, int | float], ...]
    """Operands too, guarded to have these values."""
    constants: tuple[tuple[Path, Any], ...]
    """Other values: part of the op's identity, and guarded."""
    nodes: tuple[tuple[Path, type | None], ...]
    """What lies on the way to them: modules by their class, other objects as None."""

    @classmethod
    def of(cls, module: nn.Module, forwards: Iterable[Callable[..., Any]]) -> State:
        """The state that ``forwards`` read of ``module``.

        Raises:
            UnsupportedState: If one reads a value that is neither a tensor, a module nor a
                constant.
        """
        reads = frozenset[Path]().union(*(attribute_reads(f) for f in forwards))
        walk = _Walk()
        walk.nodes[()] = type(module)
        for path in sorted(reads):
            walk.follow(module, path)
        return cls(
            tuple(sorted(walk.tensors)),
            *(
                tuple(sorted(found.items(), key=lambda item: item[0]))
                for found in (walk.numbers, walk.constants, walk.nodes)
            ),
        )

    @property
    def operands(self) -> tuple[Path, ...]:
        """The paths of the op's operands that are state, in their order."""
        return (*self.tensors, *(path for path, _ in self.numbers))

    @property
    def guarded(self) -> tuple[tuple[Path, Any], ...]:
        """The values that the op depends on without taking them from the graph."""
        return (*self.numbers, *self.constants)


class _Walk:
    def __init__(self) -> None:
        self.tensors: set[Path] = set()
        self.numbers: dict[Path, int | float] = {}
        self.constants: dict[Path, Any] = {}
        self.nodes: dict[Path, type | None] = {}

    def follow(self, module: nn.Module, path: Path) -> None:
        """Add what lies at ``path``: it ends early at a tensor, whose attributes are its own."""
        value: Any = module
        here: Path = ()
        for name in path:
            if isinstance(value, nn.Module) and name not in _values(value):
                member = inspect.getattr_static(type(value), name, None)
                if isinstance(member, (staticmethod, classmethod)):
                    return
                if not _is_plain(member):
                    # A method or a property may read anything of the instance.
                    self.whole(value, here)
                    return
            value = getattr(value, name)
            here = (*here, name)
            if self._take(value, here):
                return
            self.nodes[here] = type(value) if isinstance(value, nn.Module) else None
        if isinstance(value, nn.Module):
            self.whole(value, here)
        else:
            raise UnsupportedState(
                f"self.{'.'.join(here)} is a {type(value).__name__}, which is neither a tensor, "
                "a module nor a constant"
            )

    def whole(self, module: nn.Module, here: Path) -> None:
        """Add all of ``module``: its tensors, its constants and its submodules."""
        # The layer's own hooks run around its forward, as ever.
        if here and (module._forward_hooks or module._forward_pre_hooks):
            raise UnsupportedState(f"self.{'.'.join(here)} has forward hooks")
        self.nodes[here] = type(module)
        for name, value in _values(module).items():
            path = (*here, name)
            if isinstance(value, nn.Module):
                self.whole(value, path)
            else:
                # What cannot be taken raises an AttributeError, with its name, if it is read
                # after all.
                self._take(value, path)

    def _take(self, value: Any, here: Path) -> bool:
        if isinstance(value, torch.Tensor):
            self.tensors.add(here)
        elif _is_number(value):
            self.numbers[here] = value
        elif _is_constant(value):
            self.constants[here] = value
        else:
            return False
        return True


_MODULE_FIELDS = frozenset(vars(nn.Module())) - {"training"}


def _values(module: nn.Module) -> dict[str, Any]:
    """The attributes of an instance, with its parameters, buffers and submodules."""
    own = {k: v for k, v in vars(module).items() if k not in _MODULE_FIELDS and k != "forward"}
    return {**own, **module._parameters, **module._buffers, **module._modules}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, (bool, enum.Enum))


def _is_plain(value: Any) -> bool:
    return _is_number(value) or (_is_constant(value) and not callable(value))


_CONSTANTS = (
    type(None),
    bool,
    str,
    bytes,
    complex,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    types.FunctionType,
    types.BuiltinFunctionType,
    type,
)


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_constant(v) or _is_number(v) for v in value)
    return isinstance(value, _CONSTANTS)


def new_shell(state: State) -> tuple[nn.Module, list[tuple[dict[str, Any], str]]]:
    """An object that stands in for a layer in a call: its classes and constants, no tensors.

    Returns:
        The shell, and for each of ``state.operands`` the dict and key where its value goes.
    """
    objects: dict[Path, Any] = {}
    for path, cls in state.nodes:
        node: Any = types.SimpleNamespace()
        if cls is not None:
            node = object.__new__(cls)
            nn.Module.__init__(node)
        objects[path] = node
        if path:
            container, key = _place(objects[path[:-1]], path[-1], node)
            container[key] = node
    for path, value in state.constants:
        container, key = _place(objects[path[:-1]], path[-1], value)
        container[key] = value
    return objects[()], [_place(objects[p[:-1]], p[-1], None) for p in state.operands]


def _place(owner: Any, name: str, value: Any) -> tuple[dict[str, Any], str]:
    if isinstance(value, nn.Module) and isinstance(owner, nn.Module):
        modules: dict[str, Any] = owner._modules
        return modules, name
    return vars(owner), name


def describe_constants(values: Iterable[tuple[Path, Any]]) -> Iterator[str]:
    """The constants as text that is the same in every process."""
    for path, value in values:
        yield f"{'.'.join(path)}={stable_repr(value)}"


def stable_repr(value: Any) -> str:
    """A constant as text without addresses."""
    if isinstance(value, tuple):
        return f"({', '.join(map(stable_repr, value))})"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, enum.Enum):
        return f"{stable_repr(type(value))}.{value.name}"
    return repr(value)
