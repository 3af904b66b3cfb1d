"""What of a layer's state a ``forward`` reads: the values that a custom op takes as operands."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from kernelgraph.graph.constants import class_text, is_constant, is_number, stable_text
from kernelgraph.kernel import BoundForward

Path = tuple[str, ...]
"""Attribute names from the layer to a value: ``("experts", "weight")`` for self.experts.weight."""

EVERYTHING: frozenset[Path] = frozenset({()})
"""The reads of a function whose use of ``self`` cannot be told from its source."""


class UnsupportedState(Exception):
    """A layer has state that can be neither an operand nor a guarded constant."""


# --- what a function reads of self, from its source ------------------------------------------


def attribute_reads(forward: Callable[..., Any]) -> frozenset[Path]:
    """The attribute chains that ``forward`` reads of its first parameter.

    Every appearance of ``self`` must be the start of such a chain; where it is anything else (it
    is handed to another function, say), or there is no source, the answer is `EVERYTHING`.
    """
    return _uses(forward)[0]


def attribute_writes(forward: Callable[..., Any]) -> frozenset[Path]:
    """The attributes that ``forward`` itself sets or deletes, as far as its source tells."""
    return _uses(forward)[1]


@functools.cache
def _uses(forward: Callable[..., Any]) -> tuple[frozenset[Path], frozenset[Path]]:
    unknown = EVERYTHING, frozenset[Path]()
    if hasattr(forward, "__wrapped__"):  # the source would be that of the function inside
        return unknown
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
        code = forward.__code__
    except (OSError, TypeError, SyntaxError, AttributeError):
        return unknown
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return unknown
    parameters = [p.arg for p in (*function.args.posonlyargs, *function.args.args)]
    # A file that has changed since it was imported shows another function.
    if not parameters or tuple(parameters) != code.co_varnames[: code.co_argcount]:
        return unknown
    visitor = _Uses(parameters[0])
    for statement in function.body:
        visitor.visit(statement)
    return EVERYTHING if visitor.escapes else frozenset(visitor.reads), frozenset(visitor.writes)


class _Uses(ast.NodeVisitor):
    def __init__(self, self_name: str) -> None:
        self.self_name = self_name
        self.reads: set[Path] = set()
        self.writes: set[Path] = set()
        self.escapes = False

    def visit_Attribute(self, node: ast.Attribute) -> None:
        names: list[str] = []
        value: ast.expr = node
        while isinstance(value, ast.Attribute):
            names.append(value.attr)
            value = value.value
        if not (isinstance(value, ast.Name) and value.id == self.self_name):
            self.visit(value)
            return
        path = tuple(reversed(names))
        (self.reads if isinstance(node.ctx, ast.Load) else self.writes).add(path)
        # A private name has another one at run time, which depends on the class around it.
        self.escapes |= any(n.startswith("__") and not n.endswith("__") for n in names)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Attribute):  # written, but read before
            node.target.ctx = ast.Load()
            self.visit(node.target)

    def visit_Name(self, node: ast.Name) -> None:
        # ``super`` needs the instance without naming it.
        if node.id in (self.self_name, "super", "__class__", "locals"):
            self.escapes = True


# --- what there is of it on an instance -------------------------------------------------------


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
    """What lies on the way to them: modules by their class, other objects as None. Parents come
    first, and the submodules of a module that is read whole in their own order."""
    registered: tuple[tuple[Path, str], ...] = ()
    """The tensors of modules that are read whole, for which ``parameters()`` and ``buffers()``
    count: the name of the dict that holds them."""
    absent: tuple[Path, ...] = ()
    """What is read, maybe on a path that is not taken, of attributes that are not there."""
    untaken: tuple[tuple[Path, str], ...] = ()
    """Attributes of modules that are read whole which are neither operands nor constants, and
    their types. The forward may never read them."""

    @classmethod
    def of(cls, module: nn.Module, forwards: Iterable[Callable[..., Any]]) -> State:
        """The state that ``forwards`` read of ``module``.

        Raises:
            UnsupportedState: If one reads a value that is neither a tensor, a module nor a
                constant, or sets an attribute, which an op would not do.
        """
        reads: set[Path] = set()
        for forward in forwards:
            reads |= attribute_reads(forward)
            if writes := attribute_writes(forward):
                names = ", ".join(f"self.{'.'.join(path)}" for path in sorted(writes))
                where = getattr(forward, "__qualname__", forward)
                raise UnsupportedState(f"{where} sets {names}, which a custom op cannot")
        walk = _Walk()
        walk.nodes[()] = type(module)
        for path in sorted(reads):
            walk.follow(module, path)
        return cls(
            tuple(sorted(walk.tensors)),
            tuple(sorted(walk.numbers.items())),
            tuple(sorted(walk.constants.items(), key=lambda item: item[0])),
            tuple(sorted(walk.nodes.items(), key=lambda item: len(item[0]))),
            tuple(walk.registered.items()),
            tuple(sorted(walk.absent)),
            tuple(walk.untaken.items()),
        )

    @property
    def operands(self) -> tuple[Path, ...]:
        """The paths of the op's operands that are state, in their order."""
        return (*self.tensors, *(path for path, _ in self.numbers))

    @property
    def guarded(self) -> tuple[tuple[Path, Any], ...]:
        """The values that the op depends on without taking them from the graph."""
        return (*self.numbers, *self.constants)


@dataclass
class _Walk:
    tensors: set[Path] = field(default_factory=set)
    numbers: dict[Path, int | float] = field(default_factory=dict)
    constants: dict[Path, Any] = field(default_factory=dict)
    nodes: dict[Path, type | None] = field(default_factory=dict)
    registered: dict[Path, str] = field(default_factory=dict)
    absent: set[Path] = field(default_factory=set)
    untaken: dict[Path, str] = field(default_factory=dict)
    inside: list[nn.Module] = field(default_factory=list)
    """The modules around the one being read whole."""

    def follow(self, module: nn.Module, path: Path) -> None:
        """Add what lies at ``path``: it ends early at a tensor, whose attributes are its own."""
        value: Any = module
        here: Path = ()
        for name in path:
            if isinstance(value, nn.Module) and name not in _values(value):
                member = inspect.getattr_static(type(value), name, None)
                if isinstance(member, (staticmethod, classmethod)):
                    return
                if not (is_number(member) or is_constant(member) or _is_tensor(member)) or callable(
                    member
                ):
                    # A method or a property may read anything of the instance.
                    self.whole(value, here)
                    return
            try:
                value = getattr(value, name)
            except AttributeError:
                # Not wrong yet: a forward may ask another attribute whether there is this one.
                self.absent.add((*here, name))
                return
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
        name = f"self.{'.'.join(here)}"
        if module in self.inside:
            raise UnsupportedState(f"{name} is a module that it is itself a part of")
        # The layer's own hooks run around its forward, as ever, and its own forward is not its.
        if here and (module._forward_hooks or module._forward_pre_hooks):
            raise UnsupportedState(f"{name} has forward hooks")
        own_forward = vars(module).get("forward")
        if here and not (own_forward is None or isinstance(own_forward, BoundForward)):
            raise UnsupportedState(f"{name} has a forward of its own")
        self.nodes.pop(here, None)  # to stand where the module before it puts it
        self.nodes[here] = type(module)
        self.inside.append(module)
        for key, value in _values(module).items():
            path = (*here, key)
            if isinstance(value, nn.Module):
                self.whole(value, path)
            elif not self._take(value, path):
                self.untaken[path] = type(value).__name__
            elif path in self.tensors:
                for home in ("_parameters", "_buffers"):
                    if key in getattr(module, home):
                        self.registered[path] = home
        self.inside.pop()

    def _take(self, value: Any, here: Path) -> bool:
        if _is_tensor(value):
            self.tensors.add(here)
        elif is_number(value):
            self.numbers[here] = value
        elif is_constant(value):
            self.constants[here] = value
        else:
            return False
        return True


_MODULE_FIELDS = frozenset(vars(nn.Module())) - {"training"}


def _values(module: nn.Module) -> dict[str, Any]:
    """The attributes of an instance, with its parameters, buffers and submodules."""
    own = {k: v for k, v in vars(module).items() if k not in _MODULE_FIELDS and k != "forward"}
    return {**own, **module._parameters, **module._buffers, **module._modules}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


# --- an object that stands in for the instance ------------------------------------------------


class Shell(NamedTuple):
    """The classes and constants of a layer in a call, and no tensors."""

    module: Any
    """What plays ``self``."""
    objects: tuple[Any, ...]
    """It, and all that hangs on it."""
    slots: list[tuple[dict[str, Any], str]]
    """For each of the state's operands the dict and key where its value goes."""

    def contents(self) -> dict[tuple[int, str], int]:
        """What each attribute is, by identity: whatever a call sets shows in it."""
        return {
            (number, name): id(value)
            for number, item in enumerate(self.objects)
            for name, value in _contents(item).items()
        }


def _contents(item: Any) -> dict[str, Any]:
    return _values(item) if isinstance(item, nn.Module) else vars(item)


def new_shell(state: State) -> Shell:
    """An object that stands in for a layer in a call."""
    objects: dict[Path, Any] = {}
    for path, cls in state.nodes:
        node: Any = types.SimpleNamespace()
        if cls is not None:
            node = object.__new__(cls)
            nn.Module.__init__(node)
        objects[path] = node
        if path:
            owner = objects[path[:-1]]
            both = isinstance(node, nn.Module) and isinstance(owner, nn.Module)
            (owner._modules if both else vars(owner))[path[-1]] = node
    for path, value in state.constants:
        vars(objects[path[:-1]])[path[-1]] = value
    homes = dict(state.registered)
    for path, home in state.registered:  # parameters() goes by their order
        vars(objects[path[:-1]])[home][path[-1]] = None
    slots = []
    for path in state.operands:
        attributes = vars(objects[path[:-1]])
        slots.append((attributes[homes[path]] if path in homes else attributes, path[-1]))
    return Shell(objects[()], tuple(objects.values()), slots)


def describe(state: State) -> str:
    """Text that is the same for the same form of state in every process."""
    nodes = [f"{'.'.join(p)}:{class_text(c) if c else ''}" for p, c in state.nodes]
    operands = [f"{'.'.join(p)}:{dict(state.registered).get(p, '')}" for p in state.operands]
    constants = [f"{'.'.join(p)}={stable_text(value)}" for p, value in state.constants]
    return repr((nodes, operands, constants))
