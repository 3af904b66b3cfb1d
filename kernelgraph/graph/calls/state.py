"""The state of a layer that a ``forward`` reads, which a custom op takes as operands.

`State.of` follows the attribute chains that a forward's source names (`attribute_reads`) on a real
module. Where the source does not tell, or a chain ends at a module or object, that module or object
is read whole.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

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
    """A layer has state that is neither an operand nor a guarded constant."""


class Container(NamedTuple):
    """The type and keys of a container whose parts are tensors, modules and others."""

    type: type[Any]
    keys: tuple[Any, ...]

    @classmethod
    def of(cls, value: Any) -> Container:
        """Return the type and keys of a tuple, list or dict."""
        return cls(type(value), tuple(value if isinstance(value, dict) else range(len(value))))


Node = type | Container | None
"""Something between the layer and a value: a module or object by its class, a container by its type
and keys, and an object of which only some attributes are read as None."""


@dataclass(frozen=True)
class State:
    """The paths, from a layer, of the values that its forwards read."""

    tensors: tuple[Path, ...]
    """Tensors. They are operands of the op."""
    numbers: tuple[tuple[Path, int | float], ...]
    """Numbers that are attributes of modules, since sibling layers may differ in them. They are
    operands too, and guarded to have these values."""
    constants: tuple[tuple[Path, Any], ...]
    """Other values. They are part of the op's identity, and guarded."""
    nodes: tuple[tuple[Path, Node], ...]
    """Everything between the layer and these values. Parents come first; the submodules of a module
    that is read whole come in their own order."""
    registered: tuple[tuple[Path, str], ...] = ()
    """For tensors of modules that are read whole, the dict that holds them: ``_parameters`` or
    ``_buffers``. A forward may iterate over ``parameters()`` and ``buffers()``."""
    absent: tuple[Path, ...] = ()
    """Attributes that the source reads and that do not exist. The branch that reads them may never
    be taken."""
    untaken: tuple[tuple[Path, str], ...] = ()
    """Attributes of modules and objects that are read whole, and their types, which are neither
    operands nor constants. The forward may never read them."""
    whole: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    """The modules and objects that are read whole, with the names of their attributes."""

    @classmethod
    def of(cls, module: nn.Module, forwards: Iterable[Callable[..., Any]]) -> State:
        """Return the state of ``module`` that ``forwards`` read.

        Raises:
            UnsupportedState: If one of them reads a value that is neither a tensor, a module, a
                constant nor made of these, or sets an attribute, which an op would not do.
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
        """The paths of the operands that are state, in the op's order."""
        return (*self.tensors, *(path for path, _ in self.numbers))

    @property
    def values(self) -> tuple[tuple[Path, Any], ...]:
        """The values that the op depends on and that are no inputs of the graph."""
        return (*self.numbers, *self.constants)

    @property
    def types(self) -> tuple[Path, ...]:
        """The paths of objects whose type must stay the same."""
        return (
            *(path for path, node in self.nodes if path and node is not None),
            *(path for path, _ in self.untaken),
        )

    @property
    def checks(self) -> tuple[tuple[Path, Callable[[Any], bool]], ...]:
        """Further conditions for the op to stay valid: a path, and a test of the value there."""
        return (
            *((path[:-1], functools.partial(_lacks, str(path[-1]))) for path in self.absent),
            *((path, functools.partial(_has_names, names)) for path, names in self.whole),
            *(
                (p, functools.partial(_has_layout, n))
                for p, n in self.nodes
                if type(n) is Container
            ),
        )


def _by_path(item: tuple[Path, object]) -> str:
    return path_text(item[0])


def _lacks(name: str, value: object) -> bool:
    return not hasattr(value, name)


def _has_names(names: tuple[str, ...], value: object) -> bool:
    return names == tuple(contents_of(value))


def _has_layout(container: Container, value: object) -> bool:
    return container == Container.of(value)


# --- following the reads of a forward on an instance ------------------------------------------


def _is_plain_tensor(value: object, names: Names) -> bool:
    for name in names:
        value = getattr(value, name, None)
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


@dataclass
class _Walk:
    """Collects the fields of a `State` while it follows the reads of forwards on a module."""

    tensors: set[Path] = field(default_factory=set)
    numbers: dict[Path, int | float] = field(default_factory=dict)
    constants: dict[Path, object] = field(default_factory=dict)
    nodes: dict[Path, Node] = field(default_factory=dict)
    registered: dict[Path, str] = field(default_factory=dict)
    absent: set[Path] = field(default_factory=set)
    untaken: dict[Path, str] = field(default_factory=dict)
    whole: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    inside: list[object] = field(default_factory=list)
    """The modules and objects around the value that is being read whole, outermost first."""
    root: nn.Module | None = None
    functions: set[tuple[Path, Callable[..., object]]] = field(default_factory=set)

    def function(self, module: nn.Module, here: Path, function: Callable[..., object]) -> None:
        """Add the state that ``function``, a method of the module at ``here``, reads."""
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

    def follow(self, value: object, here: Path, names: Names) -> None:
        """Add the value at the end of the chain ``names`` from the value at ``here``.

        The chain ends early at a tensor or constant, whose attributes belong to it, and at a
        method.
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
                # No error yet: a forward may read it only if another attribute says so.
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
        """Add the state behind a name that ``module`` inherits from its class or from torch.

        Returns:
            False where the name stands for a value, which `follow` then adds.
        """
        member = inspect.getattr_static(type(module), name, None)
        if name == "__class__" or isinstance(member, (staticmethod, classmethod)):
            return True
        if isinstance(member, property) and member.fget is not None:
            member = member.fget
        if inspect.isfunction(member) and member is not getattr(nn.Module, name, None):
            self.function(module, here, member)
        elif name in vars(module) or not (is_data(member) or isinstance(member, Tensor)):
            self.take_whole(module, here)
        else:
            return False
        return True

    def call(self, module: nn.Module, here: Path) -> None:
        """Add the state that a call of a submodule reads."""
        self.check_submodule(module, here)
        if type(module).__call__ is nn.Module.__call__:
            self.function(module, here, type(module).forward)
        else:
            self.take_whole(module, here)

    def take_whole(self, value: Any, here: Path) -> bool:
        """Add every attribute of a module or object.

        Returns:
            Whether an object can stand in for ``value``.
        """
        if not (isinstance(value, nn.Module) or can_be_blank(value)):
            return False
        if any(value is around for around in self.inside):
            raise UnsupportedState(f"self.{path_text(here)} is a part of itself")
        if isinstance(value, nn.Module):
            self.check_submodule(value, here)
        self.nodes.pop(here, None)  # so that it comes in the order of its owner's attributes
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
        """Add one part of a module, object or container, which `can_carry` has accepted."""
        if not (self.leaf(value, here, numbers_vary=numbers_vary) or self.container(value, here)):
            self.take_whole(value, here)

    def container(self, value: Any, here: Path) -> bool:
        """Add a tuple, list or dict of tensors, modules and others, if ``value`` is one."""
        if not (_is_container(value) and self.can_carry(value)):
            return False
        self.nodes[here] = container = Container.of(value)
        for key in container.keys:
            self.part(value[key], (*here, (key,)))
        return True

    def leaf(self, value: Any, here: Path, *, numbers_vary: bool = True) -> bool:
        """Add a tensor, a number, a constant or a container of constants, if it is one."""
        if isinstance(value, Tensor):
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
        """Whether a copy of ``value`` with the same parts can be made.

        An object may refer to anything, such as loggers and trainers. One that the forward does
        not name is copied only if it consists of tensors and data all through.
        """
        if any(value is outer for outer in around):
            return False
        inside = (*around, value)
        if isinstance(value, Tensor) or is_data(value):
            return True
        if isinstance(value, nn.Module):
            # A module above this one is not its state, however it is reached.
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
        # The layer's own hooks run around its forward, outside of the op; its own instance forward
        # is the caller's business.
        if not here:
            return
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedState(f"self.{path_text(here)} has forward hooks")
        own_forward = vars(module).get("forward")
        if not (own_forward is None or isinstance(own_forward, BoundForward)):
            raise UnsupportedState(f"self.{path_text(here)} has a forward of its own")


_MODULE_FIELDS = frozenset(vars(nn.Module())) - {"training"}


def _values(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of an instance, with its parameters, buffers and submodules."""
    own = {k: v for k, v in vars(module).items() if k not in _MODULE_FIELDS and k != "forward"}
    if module._non_persistent_buffers_set:  # the buffers that state_dict leaves out
        own["_non_persistent_buffers_set"] = module._non_persistent_buffers_set
    return {**own, **module._parameters, **module._buffers, **module._modules}


def contents_of(item: Any) -> dict[str, Any]:
    """Return the attributes of a module or an object by name."""
    return _values(item) if isinstance(item, nn.Module) else vars(item)


def _is_container(value: object) -> bool:
    return type(value) in (tuple, list, dict, OrderedDict) or is_named_tuple(type(value))


def can_be_blank(value: object) -> bool:
    """Whether ``value`` is a plain object, which its attributes describe completely."""
    cls = type(value)
    if isinstance(value, (nn.Module, type)) or any(
        vars(base).get("__slots__") for base in cls.__mro__
    ):
        return False
    try:
        return hasattr(blank(cls), "__dict__")
    except TypeError:  # a type written in C, whose objects only its own constructor can make
        return False


def blank(cls: type) -> object:
    """Return an object of ``cls`` without any attributes."""
    return cls() if cls is types.SimpleNamespace else object.__new__(cls)


def describe(state: State) -> str:
    """Return text that is the same in every process for equal states."""
    homes = dict(state.registered)
    nodes = [f"{path_text(path)}:{_node_text(node)}" for path, node in state.nodes]
    operands = [f"{path_text(path)}:{homes.get(path, '')}" for path in state.operands]
    constants = [f"{path_text(path)}={stable_text(value)}" for path, value in state.constants]
    return repr((nodes, operands, constants))


def _node_text(node: Node) -> str:
    if isinstance(node, Container):
        return f"{class_text(node.type)}{node.keys}"
    return class_text(node) if node else ""
