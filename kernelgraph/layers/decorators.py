"""Decorators: make a class or a function extensible, and a function visible to ``kernelize``."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from kernelgraph.layers.tags import (
    CONDITION,
    FAKE,
    FUNCTION,
    FUNCTIONS,
    NAME,
    announce,
    extensible,
    reference_of,
)

if TYPE_CHECKING:
    from torch import nn

    from kernelgraph.layers.tags import Condition, Fake

T = TypeVar("T")


def use_kernel_forward_from_hub(
    layer_name: str, condition: Condition | None = None, *, fake: Fake | None = None
) -> Callable[[T], T]:
    """Make the decorated ``nn.Module`` class, or function, extensible under ``layer_name``.

    A class behaves as before until a kernel is chosen for it. A function becomes a module-like
    callable that still behaves as the function; attach it to the module class that calls it with
    `use_kernelized_func` to make it visible to ``kernelize``.

    Args:
        layer_name: The name under which mappings register kernels for the layer.
        condition: Called with each instance; one for which it returns False keeps its reference.
        fake: A shape function with the signature of ``forward`` (its ``self`` included) for a
            layer whose output shape cannot be found by running the kernel or the layer on fake
            tensors. It returns tensors of the output's shape, dtype and device, as ``torch.empty``
            does, and gets a size that depends on values from
            ``torch.library.get_ctx().new_dynamic_size()``.

    Returns:
        A decorator. It returns the class itself, or the callable that the function becomes.

    Raises:
        TypeError: If an argument, or what is decorated, is of the wrong type.

    Example:
        >>> @kg.use_kernel_forward_from_hub("SiluAndMul")
        ... class SiluAndMul(torch.nn.Module):
        ...     def forward(self, x):
        ...         gate, up = x.chunk(2, dim=-1)
        ...         return torch.nn.functional.silu(gate) * up
        >>> x = torch.randn(3, 8)
        >>> expected = SiluAndMul()(x)
        >>> kernel = kg.LocalLayerRepository("examples/kernels", layer_name="SiluAndMul")
        >>> kg.register_kernel_mapping({"SiluAndMul": {"cpu": kernel}})
        >>> layer = kg.kernelize(SiluAndMul(), mode=kg.Mode.INFERENCE, device="cpu")
        >>> torch.testing.assert_close(layer(x), expected)
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
    """Make ``cls``, a class of somebody else's, extensible under ``layer_name``.

    Args:
        cls: An ``nn.Module`` class. The call also holds for the instances that there are, and for
            subclasses that inherit ``forward``.
        layer_name: The name under which mappings register kernels for the layer.
        condition: As in `use_kernel_forward_from_hub`.
        fake: As in `use_kernel_forward_from_hub`.

    Raises:
        TypeError: If an argument is of the wrong type.

    Example:
        >>> class SiluAndMul(torch.nn.Module):  # from a library, say
        ...     def forward(self, x):
        ...         gate, up = x.chunk(2, dim=-1)
        ...         return torch.nn.functional.silu(gate) * up
        >>> kg.replace_kernel_forward_from_hub(SiluAndMul, "SiluAndMul")
        >>> model = torch.nn.Sequential(SiluAndMul())
        >>> kernel = kg.LocalLayerRepository("examples/kernels", layer_name="SiluAndMul")
        >>> with kg.use_kernel_mapping({"SiluAndMul": {"cpu": kernel}}):
        ...     model = kg.kernelize(model, mode=kg.Mode.INFERENCE, device="cpu")
        >>> [decision.layer for decision in kg.last_report().kernels]
        ['SiluAndMul']
    """
    _check_tag(layer_name, condition, fake)
    _check_module_class(cls, "an extensible layer is")
    setattr(cls, NAME, layer_name)
    # staticmethod, because a plain function would be bound to the instance it is read from.
    setattr(cls, CONDITION, None if condition is None else staticmethod(condition))
    setattr(cls, FAKE, None if fake is None else staticmethod(fake))
    announce(cls)


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


def use_kernelized_func(*functions: Callable[..., object]) -> Callable[[type[T]], type[T]]:
    """Make extensible functions that the decorated class calls visible to ``kernelize``.

    Args:
        functions: Functions decorated with `use_kernel_forward_from_hub`.

    Returns:
        A decorator, which returns the ``nn.Module`` class itself.

    Raises:
        TypeError: If one of ``functions`` is not an extensible function, or the decorated object
            is no ``nn.Module`` class.

    Example:
        >>> @kg.use_kernel_forward_from_hub("silu_and_mul")
        ... def silu_and_mul(x):
        ...     gate, up = x.chunk(2, dim=-1)
        ...     return torch.nn.functional.silu(gate) * up
        >>> @kg.use_kernelized_func(silu_and_mul)
        ... class FeedForward(torch.nn.Module):
        ...     def forward(self, x):
        ...         return silu_and_mul(x)
        >>> kernel = kg.LocalFuncRepository("examples/kernels", func_name="silu_and_mul")
        >>> kg.register_kernel_mapping({"silu_and_mul": {"cpu": kernel}})
        >>> model = kg.kernelize(FeedForward(), mode=kg.Mode.INFERENCE, device="cpu")
        >>> [decision.path for decision in kg.last_report().kernels]
        ['silu_and_mul']
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
            if attached.get(name, function) is not function:  # another module's function
                name = f"{function.__module__}.{name}"
            attached[name] = function
        setattr(cls, FUNCTIONS, attached)
        return cls

    return decorate


def functions_of(module: nn.Module) -> dict[str, nn.Module]:
    """The extensible functions attached to the class of ``module`` and, by other packages, to the
    instance itself."""
    own = {name: _called(module, f) for name, f in vars(module).get(FUNCTIONS, {}).items()}
    return {**getattr(type(module), FUNCTIONS, {}), **own}


def _called(module: nn.Module, function: nn.Module) -> nn.Module:
    """The function that the ``forward`` of ``module`` calls, where ``function`` may be a copy.

    A deep copy of a module has copies of the functions attached to it, which nothing calls.
    """
    names = getattr(inspect.unwrap(reference_of(type(module))), "__globals__", {})
    alike = [value for value in names.values() if type(value) is type(function)]
    return alike[0] if len(alike) == 1 else function


def _function_layer(
    function: Callable[..., object], layer_name: str, condition: Condition | None, fake: Fake | None
) -> nn.Module:
    """The module-like callable that an extensible function becomes."""
    # It is pickled as the name of a global: like any function it is one object in all copies and
    # pickles, so that a kernel chosen for it holds wherever it is called.
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
    function: Callable[..., object], name: str, module: str, **members: object
) -> type[nn.Module]:
    """An ``nn.Module`` class whose ``forward`` calls ``function``, with its signature.

    Args:
        function: The function that ``forward`` calls.
        name: The name of the class.
        module: The name of the module that the class belongs to.
        members: Further members of the class.
    """
    from torch import nn

    def forward(self: nn.Module, /, *args: object, **kwargs: object) -> object:
        return function(*args, **kwargs)

    forward.__doc__ = function.__doc__
    forward.__module__ = module
    forward.__qualname__ = f"{name}.forward"
    setattr(forward, FUNCTION, function)
    with contextlib.suppress(TypeError, ValueError):  # some builtins have no signature
        forward.__signature__ = _as_method(inspect.signature(function))  # type: ignore[attr-defined]
    return type(name, (nn.Module,), {"forward": forward, "__module__": module, **members})


def _as_method(signature: inspect.Signature) -> inspect.Signature:
    """``signature`` with a ``self`` before its parameters."""
    parameters = list(signature.parameters.values())
    name = "_self" if "self" in signature.parameters else "self"
    own = inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if parameters and parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY:
        own = own.replace(kind=parameters[0].kind)  # no other kind may come first
    return signature.replace(parameters=[own, *parameters])
