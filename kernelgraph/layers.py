"""Extensible layers: classes and functions whose ``forward`` a kernel may replace.

An extensible layer carries its layer name in the class attribute ``kernel_layer_name``. This is
the convention of the ecosystem and not of this package alone, so a class that any other package
tagged is extensible here too.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import nn

    Condition = Callable[[nn.Module], bool]
    Fake = Callable[..., Any]

T = TypeVar("T")

NAME = "kernel_layer_name"
CONDITION = "kernel_condition"
FAKE = "kernel_fake"
FUNCTIONS = "_kernel_funcs"
FUNCTION = "__kernelgraph_function__"
"""Where the ``forward`` of a class that was made of a function keeps it."""


@dataclass(frozen=True)
class Extensible:
    """What makes a class extensible, found by `extensible`."""

    owner: type[nn.Module]
    """The class whose ``forward`` the tag is for; the one asked about, or one it inherits from."""
    layer_name: str
    condition: Condition | None = None
    fake: Fake | None = None

    @property
    def reference(self) -> Callable[..., Any]:
        """The layer's own ``forward``, as its author wrote it."""
        return reference_of(self.owner)


def reference_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """The ``forward`` of ``cls`` without the wrapper that captures its calls in compiled graphs."""
    return original(cls.forward)


def original(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` without the wrapper that captures a forward's calls, if it has one."""
    return getattr(function, "__kernelgraph_reference__", function)


def extensible(cls: type) -> Extensible | None:
    """How ``cls`` is extensible, or None.

    A subclass is extensible under the inherited name as long as it inherits ``forward`` too: a
    ``forward`` of its own that is not tagged is somebody's different computation. A class opts out
    of an inherited name with ``kernel_layer_name = None``.
    """
    from torch import nn

    forward = getattr(cls, "forward", None)
    if forward in (None, nn.Module.forward):  # nothing to replace
        return None
    for base in cls.__mro__:
        members = vars(base)
        if NAME in members:
            name, tagged = members[NAME], getattr(base, "forward", None)
            # A mixin without a forward tags whichever its subclasses inherit beside it.
            owner = cls if tagged in (None, nn.Module.forward) else base
            if not isinstance(name, str) or not name or getattr(owner, "forward", None) != forward:
                return None
            condition, fake = _plain(members.get(CONDITION)), _plain(members.get(FAKE))
            return Extensible(owner, name, None if _always(condition) else condition, fake)
        if "forward" in members:
            return None
    return None


def _plain(member: Any) -> Any:
    return member.__func__ if isinstance(member, staticmethod) else member


def _always(condition: Any) -> bool:
    """Whether ``condition`` says yes to every instance, by its code: ``lambda module: True``.

    The ``kernels`` package gives one to each class that is tagged without. One that has to be
    asked ties a compiled graph to the instance that it was asked of.
    """
    code = getattr(condition, "__code__", None)
    return isinstance(code, CodeType) and code.co_argcount == 1 and _returns_true(code)


@functools.lru_cache(maxsize=256)
def _returns_true(code: CodeType) -> bool:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("RESUME", "NOP")]
    if [step.opname for step in steps] not in (["LOAD_CONST", "RETURN_VALUE"], ["RETURN_CONST"]):
        return False  # asked, then; also where a later Python returns constants in another way
    return bool(steps[0].argval)


def use_kernel_forward_from_hub(
    layer_name: str, condition: Condition | None = None, *, fake: Fake | None = None
) -> Callable[[T], T]:
    """Make the decorated ``nn.Module`` class, or function, extensible under ``layer_name``.

    The class itself is returned, and behaves as before until a kernel is chosen for it. A function
    becomes a module-like callable that still behaves as the function; attach it to the module
    class that calls it with `use_kernelized_func` to make it visible to ``kernelize``.

    Args:
        layer_name: The name under which mappings register kernels for the layer.
        condition: Asked of each instance; where it returns False the instance is left alone.
        fake: A shape function with the signature of ``forward`` (its ``self`` included) for a
            layer whose output shape cannot be had by running the kernel or the layer: it returns
            tensors of the output's shape, dtype and device, as ``torch.empty`` does. A size that
            depends on values it takes from ``torch.library.get_ctx().new_dynamic_size()``.

    Raises:
        TypeError: If an argument, or what is decorated, is of the wrong type.
    """
    _check_tag(layer_name, condition, fake)

    def decorate(target: T) -> T:
        if inspect.isclass(target):
            replace_kernel_forward_from_hub(target, layer_name, condition, fake=fake)
            return target
        if inspect.isfunction(target):
            return _function_layer(target, layer_name, condition, fake)  # type: ignore[return-value]
        raise TypeError(
            "use_kernel_forward_from_hub decorates an nn.Module class or a function, "
            f"not {target!r}"
        )

    return decorate


def replace_kernel_forward_from_hub(
    cls: type, layer_name: str, condition: Condition | None = None, *, fake: Fake | None = None
) -> None:
    """Make ``cls``, a layer class that one does not own, extensible under ``layer_name``.

    Args:
        cls: An ``nn.Module`` class; its instances and subclasses that inherit ``forward`` follow.
        layer_name, condition, fake: As in `use_kernel_forward_from_hub`.

    Raises:
        TypeError: If an argument is of the wrong type.
    """
    _check_tag(layer_name, condition, fake)
    _check_module_class(cls, "an extensible layer is")
    setattr(cls, NAME, layer_name)
    # staticmethod: read through an instance, a plain function would be bound to it.
    setattr(cls, CONDITION, None if condition is None else staticmethod(condition))
    setattr(cls, FAKE, None if fake is None else staticmethod(fake))
    _announce(cls)


def _check_tag(layer_name: object, condition: object, fake: object) -> None:
    if not isinstance(layer_name, str) or not layer_name:
        raise TypeError(f"layer_name is a non-empty string, not {layer_name!r}")
    for argument, value in (("condition", condition), ("fake", fake)):
        if value is not None and not callable(value):
            raise TypeError(f"{argument} is a callable or None, not {value!r}")


def _check_module_class(cls: object, what: str) -> None:
    from torch import nn

    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise TypeError(f"{what} an nn.Module class, not {cls!r}")


def use_kernelized_func(*functions: Callable[..., Any]) -> Callable[[type[T]], type[T]]:
    """Make extensible functions that a module class calls visible to ``kernelize``.

    Args:
        functions: Functions decorated with `use_kernel_forward_from_hub`.

    Raises:
        TypeError: If one of ``functions`` is not an extensible function.
    """
    for function in functions:
        if extensible(type(function)) is None:
            raise TypeError(
                f"{getattr(function, '__name__', function)!r} is not extensible: decorate it "
                'with @use_kernel_forward_from_hub("...") first'
            )

    def decorate(cls: type[T]) -> type[T]:
        _check_module_class(cls, "use_kernelized_func decorates")
        attached = dict(getattr(cls, FUNCTIONS, {}))
        for function in functions:
            name = getattr(function, "__name__", type(function).__name__)
            if attached.get(name, function) is not function:  # a namesake from another module
                name = f"{function.__module__}.{name}"
            attached[name] = function
        setattr(cls, FUNCTIONS, attached)
        return cls

    return decorate


def functions_of(module: nn.Module) -> dict[str, nn.Module]:
    """The extensible functions attached to ``module``'s class and, by other packages, to it."""
    own = {name: _called(module, f) for name, f in vars(module).get(FUNCTIONS, {}).items()}
    return {**getattr(type(module), FUNCTIONS, {}), **own}


def _called(module: nn.Module, function: nn.Module) -> nn.Module:
    """The function that ``module`` calls: in a deep copy it has a copy, which nothing calls."""
    names = getattr(inspect.unwrap(reference_of(type(module))), "__globals__", {})
    alike = [value for value in names.values() if type(value) is type(function)]
    return alike[0] if len(alike) == 1 else function


def _function_layer(
    function: Callable[..., Any], layer_name: str, condition: Condition | None, fake: Fake | None
) -> nn.Module:
    # Pickled as a global's name: as any function, it stays one object in its copies and pickles,
    # so that a kernel chosen for it holds wherever it is called.
    cls = class_of_function(
        function,
        function.__name__,
        function.__module__,
        __reduce__=lambda self: function.__qualname__,
    )
    replace_kernel_forward_from_hub(cls, layer_name, condition, fake=fake)
    layer: nn.Module = cls()
    functools.update_wrapper(layer, function)
    return layer


def class_of_function(
    function: Callable[..., Any], name: str, module: str, **members: Any
) -> type[nn.Module]:
    """An ``nn.Module`` class whose ``forward`` calls ``function``, with its signature.

    Args:
        function: What to call.
        name: The class's name.
        module: The name of the module that it is to belong to.
        members: Further members of the class.
    """
    from torch import nn

    def forward(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    forward.__doc__ = function.__doc__
    forward.__module__ = module
    forward.__qualname__ = f"{name}.forward"
    setattr(forward, FUNCTION, function)
    with contextlib.suppress(TypeError, ValueError):  # some builtins have none
        forward.__signature__ = _as_method(inspect.signature(function))  # type: ignore[attr-defined]
    return type(name, (nn.Module,), {"forward": forward, "__module__": module, **members})


def _as_method(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    name = "_self" if "self" in signature.parameters else "self"
    own = inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if parameters and parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY:
        own = own.replace(kind=parameters[0].kind)  # nothing of another kind may come before one
    return signature.replace(parameters=[own, *parameters])


# --- who wants to know of extensible classes ------------------------------------------------

_listeners: list[Callable[[type], object]] = []


def _announce(cls: type) -> None:
    for listener in tuple(_listeners):
        listener(cls)


def on_extensible(listener: Callable[[type], object]) -> None:
    """Call ``listener`` with each extensible class there is, and with those tagged later here."""
    _listeners.append(listener)
    for cls in tagged_subclasses():
        listener(cls)


def tagged_subclasses() -> Iterator[type]:
    """Each class in the process whose own ``forward`` a tag is for, whoever set it."""
    from torch import nn

    seen: set[type] = set()
    todo = [nn.Module]
    while todo:
        for cls in todo.pop().__subclasses__():
            if cls not in seen:
                seen.add(cls)
                todo.append(cls)
                if hasattr(cls, NAME) and (layer := extensible(cls)) and layer.owner is cls:
                    yield cls


# --- whether a hub layer can stand in for a reference ---------------------------------------

_MEMBERS = frozenset({"forward", "has_backward", "can_torch_compile"})
# What Python itself writes into every class, by version.
_PYTHON_MEMBERS = frozenset(
    {
        "__module__",
        "__qualname__",
        "__doc__",
        "__dict__",
        "__weakref__",
        "__annotations__",
        "__annotations_cache__",
        "__annotate__",
        "__annotate_func__",
        "__conditional_annotations__",
        "__firstlineno__",
        "__static_attributes__",
        "__parameters__",
        "__type_params__",
        "__orig_bases__",
    }
)


def check_hub_layer(layer: Any, reference: Callable[..., Any], repository: object) -> None:
    """Refuse a hub layer that is not pure, or whose ``forward`` cannot replace ``reference``.

    Args:
        layer: The class that a repository loaded.
        reference: The ``forward`` function it is to replace; ``self`` is its first parameter.
        repository: Named in the error.

    Raises:
        TypeError: If ``layer`` is not an ``nn.Module`` class, has an ``__init__`` or members of
            its own, or takes another number or other kinds of parameters than ``reference``.
    """
    from torch import nn

    if not (inspect.isclass(layer) and issubclass(layer, nn.Module)):
        raise TypeError(f"{repository}: a hub layer is a subclass of nn.Module, not {layer!r}")
    for base in layer.__mro__:
        if base in (nn.Module, Generic, object):
            continue
        if "__init__" in vars(base):
            raise TypeError(
                f"{repository}: hub layer {layer.__name__} has an __init__; it must be pure, "
                "since it runs on the state of the layer that it replaces"
            )
        if extra := sorted(vars(base).keys() - _MEMBERS - _PYTHON_MEMBERS):
            raise TypeError(
                f"{repository}: hub layer {layer.__name__} has members other than forward, "
                f"has_backward and can_torch_compile: {', '.join(extra)}"
            )
    ours, theirs = _kinds(reference), _kinds(layer.forward)
    if ours != theirs:
        raise TypeError(
            f"{repository}: forward of hub layer {layer.__name__} takes "
            f"{inspect.signature(layer.forward)}, and the layer that it would replace takes "
            f"{inspect.signature(reference)}: the parameters differ in number or kind"
        )


def _kinds(forward: Callable[..., Any]) -> list[Any]:
    return [p.kind for p in inspect.signature(forward).parameters.values()]


def first_device(module: nn.Module) -> torch.device | None:
    """The device of the first parameter, else of the first buffer, of ``module``."""
    tensor: torch.Tensor | None = next(module.parameters(), None)
    if tensor is None:
        tensor = next(module.buffers(), None)
    return None if tensor is None else tensor.device
