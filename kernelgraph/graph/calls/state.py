"""What of a layer's state a ``forward`` reads: the values that a custom op takes as operands."""

from __future__ import annotations

import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from kernelgraph.graph.calls.attribute_reads import CALL, EVERYTHING, Names, uses
from kernelgraph.graph.calls.constants import (
    class_text,
    copy_of,
    is_data,
    is_named_tuple,
    is_number,
    stable_text,
)
from kernelgraph.graph.calls.trees import Path, path_text
from kernelgraph.kernel import BoundForward
from kernelgraph.layers import original


class UnsupportedState(Exception):
    """A layer has state that can be neither an operand nor a guarded constant."""


class Container(NamedTuple):
    """What a container of tensors, modules and others is made of."""

    type: type[Any]
    keys: tuple[Any, ...]

    @classmethod
    def of(cls, value: Any) -> Container:
        """The form of a tuple, list or dict."""
        return cls(type(value), tuple(value if isinstance(value, dict) else range(len(value))))


Node = type | Container | None
"""What lies on the way to values: a module or an object that is read whole by its class, a
container by its form, other objects as None."""


@dataclass(frozen=True)
class State:
    """Where the values are that a layer's forwards read, relative to the layer."""

    tensors: tuple[Path, ...]
    """Operands of the op."""
    numbers: tuple[tuple[Path, int | float], ...]
    """Operands too, guarded to have these values: the attributes of modules, which a layer may
    have its own of."""
    constants: tuple[tuple[Path, Any], ...]
    """Other values: part of the op's identity, and guarded."""
    nodes: tuple[tuple[Path, Node], ...]
    """What lies on the way to them. Parents come first, and the submodules of a module that is
    read whole in their own order."""
    registered: tuple[tuple[Path, str], ...] = ()
    """The tensors of modules that are read whole, for which ``parameters()`` and ``buffers()``
    count: the name of the dict that holds them."""
    absent: tuple[Path, ...] = ()
    """What is read, maybe on a path that is not taken, of attributes that are not there."""
    untaken: tuple[tuple[Path, str], ...] = ()
    """Attributes of modules and objects that are read whole which are neither operands nor
    constants, and their types. The forward may never read them."""
    whole: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    """The modules and objects that are read whole, and the names of their attributes."""

    @classmethod
    def of(cls, module: nn.Module, forwards: Iterable[Callable[..., Any]]) -> State:
        """The state that ``forwards`` read of ``module``.

        Raises:
            UnsupportedState: If one reads a value that is neither a tensor, a module, a constant
                nor made of such, or sets an attribute, which an op would not do.
        """
        walk = _Walk(root=module)
        walk.nodes[()] = type(module)
        for forward in forwards:
            walk.function(module, (), forward)
        return cls(
            tuple(sorted(walk.tensors, key=path_text)),
            tuple(sorted(walk.numbers.items(), key=_by_path)),
            tuple(sorted(walk.constants.items(), key=_by_path)),
            tuple(sorted(walk.nodes.items(), key=lambda item: len(item[0]))),
            tuple(walk.registered.items()),
            tuple(sorted(walk.absent, key=path_text)),
            tuple(walk.untaken.items()),
            tuple(walk.whole.items()),
        )

    @property
    def operands(self) -> tuple[Path, ...]:
        """The paths of the op's operands that are state, in their order."""
        return (*self.tensors, *(path for path, _ in self.numbers))

    @property
    def values(self) -> tuple[tuple[Path, Any], ...]:
        """The values that the op depends on without taking them from the graph."""
        return (*self.numbers, *self.constants)

    @property
    def types(self) -> tuple[Path, ...]:
        """Where the type of an object counts."""
        return (
            *(path for path, node in self.nodes if path and node is not None),
            *(path for path, _ in self.untaken),
        )

    @property
    def checks(self) -> tuple[tuple[Path, Callable[[Any], bool]], ...]:
        """What else must stay as it is, as functions of the value at a path."""
        return (
            *((path[:-1], functools.partial(_lacks, str(path[-1]))) for path in self.absent),
            *((path, functools.partial(_has_names, names)) for path, names in self.whole),
            *((p, functools.partial(_has_form, n)) for p, n in self.nodes if type(n) is Container),
        )


def _by_path(item: tuple[Path, Any]) -> str:
    return path_text(item[0])


def _lacks(name: str, value: Any) -> bool:
    return not hasattr(value, name)


def _has_names(names: tuple[str, ...], value: Any) -> bool:
    return names == tuple(contents_of(value))


def _has_form(form: Container, value: Any) -> bool:
    return form == Container.of(value)


# --- what there is of it on an instance -------------------------------------------------------


def _is_plain_tensor(value: Any, names: Names) -> bool:
    for name in names:
        value = getattr(value, name, None)
    return isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)


@dataclass
class _Walk:
    tensors: set[Path] = field(default_factory=set)
    numbers: dict[Path, int | float] = field(default_factory=dict)
    constants: dict[Path, Any] = field(default_factory=dict)
    nodes: dict[Path, Node] = field(default_factory=dict)
    registered: dict[Path, str] = field(default_factory=dict)
    absent: set[Path] = field(default_factory=set)
    untaken: dict[Path, str] = field(default_factory=dict)
    whole: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    inside: list[Any] = field(default_factory=list)
    """What is around the value being read whole."""
    root: nn.Module | None = None
    functions: set[tuple[Path, Callable[..., Any]]] = field(default_factory=set)

    def function(self, module: nn.Module, here: Path, function: Callable[..., Any]) -> None:
        """Add what a method of the module that is ``here`` reads of it."""
        function = original(function)
        if (here, function) in self.functions:
            return
        self.functions.add((here, function))
        reads, writes, updates = uses(function)
        if writes := writes | {names for names in updates if not _is_plain_tensor(module, names)}:
            sets = ", ".join(f"self.{'.'.join(names)}" for names in sorted(writes))
            where = getattr(function, "__qualname__", function)
            raise UnsupportedState(f"{where} sets {sets}, which a custom op cannot")
        if reads == EVERYTHING:
            self.take_whole(module, here)
        for names in sorted(reads - EVERYTHING):
            self.follow(module, here, names)

    def follow(self, value: Any, here: Path, names: Names) -> None:
        """Add what lies at ``names`` of the value that is ``here``.

        It ends early at a tensor or constant, whose attributes are its own, and at a method.
        """
        for name in names:
            if isinstance(value, nn.Module):
                if name == CALL:
                    self.call(value, here)
                    return
                if name not in _values(value) and self.member(value, here, name):
                    return
            elif name == CALL:
                break
            owner, here = value, (*here, name)
            try:
                value = getattr(owner, name)
            except AttributeError:
                # Not wrong yet: a forward may ask another attribute whether there is this one.
                self.absent.add(here)
                return
            if isinstance(value, types.MethodType) and name not in getattr(owner, "__dict__", ()):
                value, here = owner, here[:-1]
                break
            if self.leaf(value, here) or self.container(value, here):
                return
            self.nodes.setdefault(here, type(value) if isinstance(value, nn.Module) else None)
        if not self.take_whole(value, here):
            raise UnsupportedState(
                f"self.{path_text(here)} is a {type(value).__name__}, which is neither a tensor, "
                "a module, a constant nor made of such"
            )

    def member(self, module: nn.Module, here: Path, name: str) -> bool:
        """Add what lies behind a name that ``module`` has from its class, or from torch.

        Returns:
            Whether that was it; else the name stands for a value.
        """
        member = inspect.getattr_static(type(module), name, None)
        if name == "__class__" or isinstance(member, (staticmethod, classmethod)):
            return True
        if isinstance(member, property) and member.fget is not None:
            member = member.fget
        if inspect.isfunction(member) and member is not getattr(nn.Module, name, None):
            self.function(module, here, member)
        elif name in vars(module) or not (is_data(member) or _is_tensor(member)):
            self.take_whole(module, here)
        else:
            return False
        return True

    def call(self, module: nn.Module, here: Path) -> None:
        """Add what calling a submodule reads of it."""
        self.check_submodule(module, here)
        if type(module).__call__ is nn.Module.__call__:
            self.function(module, here, type(module).forward)
        else:
            self.take_whole(module, here)

    def take_whole(self, value: Any, here: Path) -> bool:
        """Add all of a module or object: what it is made of, each as it is.

        Returns:
            Whether there can be an object that stands in for ``value``.
        """
        if not (isinstance(value, nn.Module) or can_be_blank(value)):
            return False
        if any(value is around for around in self.inside):
            raise UnsupportedState(f"self.{path_text(here)} is a part of itself")
        if isinstance(value, nn.Module):
            self.check_submodule(value, here)
        self.nodes.pop(here, None)  # to stand where what is around it puts it
        self.nodes[here] = type(value)
        self.whole[here] = tuple(contents_of(value))
        self.inside.append(value)
        for name, part in contents_of(value).items():
            path = (*here, name)
            in_module = isinstance(value, nn.Module)
            submodule = in_module and name in value._modules
            if not (submodule or self.can_carry(part)):
                self.untaken[path] = type(part).__name__
                continue
            self.part(part, path, numbers_vary=in_module)
            if in_module and path in self.tensors:
                for home in ("_parameters", "_buffers"):
                    if name in getattr(value, home):
                        self.registered[path] = home
        self.inside.pop()
        return True

    def part(self, value: Any, here: Path, *, numbers_vary: bool = False) -> None:
        """Add one of the values that something is made of, which can be carried."""
        if not (self.leaf(value, here, numbers_vary=numbers_vary) or self.container(value, here)):
            self.take_whole(value, here)

    def container(self, value: Any, here: Path) -> bool:
        """Add a tuple, list or dict of tensors, modules and others, if ``value`` is one."""
        if not (_is_container(value) and self.can_carry(value)):
            return False
        self.nodes[here] = form = Container.of(value)
        for key in form.keys:
            self.part(value[key], (*here, (key,)))
        return True

    def leaf(self, value: Any, here: Path, *, numbers_vary: bool = True) -> bool:
        """Add a tensor, a number, a constant or a container of constants, if it is one."""
        if _is_tensor(value):
            self.tensors.add(here)
        elif is_number(value) and numbers_vary:
            self.numbers[here] = value
            self.constants.pop(here, None)
        elif is_data(value):
            if here not in self.numbers:
                self.constants[here] = copy_of(value)
        else:
            return False
        return True

    def can_carry(self, value: Any, around: tuple[Any, ...] = ()) -> bool:
        """Whether there can be another ``value`` with the same in it.

        An object may hold on to anything, loggers and trainers say. One that the forward does not
        name counts only if it is tensors and data all through.
        """
        if any(value is outer for outer in around):
            return False
        inside = (*around, value)
        if _is_tensor(value) or is_data(value):
            return True
        if isinstance(value, nn.Module):
            # A module above this one is not its state, whatever way it is reached.
            here = (self.root, *self.inside)
            is_above = any(part is outer for part in value.modules() for outer in here)
            return not is_above and not any(can_be_blank(outer) for outer in around)
        if _is_container(value):
            keys = Container.of(value).keys
            return all(type(k) in (str, int) and self.can_carry(value[k], inside) for k in keys)
        return can_be_blank(value) and all(
            self.can_carry(part, inside) for part in vars(value).values()
        )

    def check_submodule(self, module: nn.Module, here: Path) -> None:
        # The layer's own hooks run around its forward, as ever, and its own forward is not its.
        if not here:
            return
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedState(f"self.{path_text(here)} has forward hooks")
        own_forward = vars(module).get("forward")
        if not (own_forward is None or isinstance(own_forward, BoundForward)):
            raise UnsupportedState(f"self.{path_text(here)} has a forward of its own")


_MODULE_FIELDS = frozenset(vars(nn.Module())) - {"training"}


def _values(module: nn.Module) -> dict[str, Any]:
    """The attributes of an instance, with its parameters, buffers and submodules."""
    own = {k: v for k, v in vars(module).items() if k not in _MODULE_FIELDS and k != "forward"}
    if module._non_persistent_buffers_set:  # what a state_dict leaves out
        own["_non_persistent_buffers_set"] = module._non_persistent_buffers_set
    return {**own, **module._parameters, **module._buffers, **module._modules}


def contents_of(item: Any) -> dict[str, Any]:
    """The attributes of a module or an object."""
    return _values(item) if isinstance(item, nn.Module) else vars(item)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_container(value: Any) -> bool:
    return type(value) in (tuple, list, dict, OrderedDict) or is_named_tuple(type(value))


def can_be_blank(value: Any) -> bool:
    """Whether ``value`` is a plain object: all that there is of it is its attributes."""
    cls = type(value)
    if isinstance(value, (nn.Module, type)) or any(
        vars(base).get("__slots__") for base in cls.__mro__
    ):
        return False
    try:
        return hasattr(blank(cls), "__dict__")
    except TypeError:  # a type of C's, which needs to make its objects itself
        return False


def blank(cls: type) -> Any:
    """An object of a class without any attributes."""
    return cls() if cls is types.SimpleNamespace else object.__new__(cls)


def describe(state: State) -> str:
    """Text that is the same for the same form of state in every process."""
    homes = dict(state.registered)
    nodes = [f"{path_text(path)}:{_node_text(node)}" for path, node in state.nodes]
    operands = [f"{path_text(path)}:{homes.get(path, '')}" for path in state.operands]
    constants = [f"{path_text(path)}={stable_text(value)}" for path, value in state.constants]
    return repr((nodes, operands, constants))


def _node_text(node: Node) -> str:
    if isinstance(node, Container):
        return f"{class_text(node.type)}{node.keys}"
    return class_text(node) if node else ""
