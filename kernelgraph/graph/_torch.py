"""What kernelgraph uses of torch beyond its public API, and nothing else uses.

Each entry names the versions that it was tried on; a new torch is tried against this file.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.tensor import TensorVariable
from torch._guards import TracingContext, detect_fake_mode
from torch._inductor.codegen.custom_extern_kernel_codegen import (
    CUSTOM_EXTERN_KERNEL_CODEGEN,
    CustomCodegen,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols as free_unbacked_symbols
from torch.utils import _pytree as pytree

GraphFunction = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., Any])


def at_trace_time(function: F) -> F:
    """Have Dynamo run ``function`` when it traces a call of it, and keep the result."""
    mark: Any = torch.compiler.assume_constant_result
    return mark(function)  # type: ignore[no-any-return]


class Frame:
    """The innermost frame that Dynamo is tracing, seen from a function it runs at trace time.

    Such a function is marked ``torch.compiler.assume_constant_result``; its caller is this frame.
    The module of a traced frame is read from here and not passed as an argument: as an argument
    Dynamo would guard on its identity, and one compiled block could no longer serve all its
    siblings. Tried on 2.11, 2.13, 2.14.
    """

    def __init__(self) -> None:
        self._tx: Any = InstructionTranslator.current_tx().output.current_tx

    @property
    def notes(self) -> dict[str, Any]:
        """A dict that belongs to the graph being traced, and lives as long as its trace."""
        return _notes(self._tx.output)

    def value(self, name: str) -> Any:
        """The real object behind a local variable that holds a module."""
        return self._tx.symbolic_locals[name].realize().value

    def fakes(self, name: str) -> Any:
        """A local variable with its tensors as fakes, and everything in it guarded.

        Raises:
            NotImplementedError: If it holds something that no graph node can take.
        """
        try:
            proxies = self._tx.symbolic_locals[name].realize().as_proxy()
        except NotImplementedError as error:
            what = f"{name} hold what is neither a tensor nor a constant: {error}"
            raise NotImplementedError(what) from None
        return pytree.tree_map_only(fx.Proxy, lambda p: p.node.meta["example_value"], proxies)

    def guard(self, name: str, path: tuple[str, ...], value: Any) -> None:
        """Trace anew when attribute ``path`` of a local variable is not ``value`` any more.

        A number that traced code reads may become symbolic once it has changed, and an op's
        schema takes no symbolic float; a guard alone keeps it a constant.
        """
        source = self._tx.symbolic_locals[name].source
        if source is None:
            raise NotImplementedError(f"{name} was made inside the graph")
        for part in path:
            source = AttrSource(source, part)
        by_identity = isinstance(value, nn.Module) or callable(value)
        kind = GuardBuilder.ID_MATCH if by_identity else GuardBuilder.CONSTANT_MATCH
        install_guard(source.make_guard(kind))

    def tensors(self, *names: str) -> list[torch.Tensor]:
        """The tensors in local variables, without having Dynamo look at them.

        What Dynamo looks at becomes an input of the graph, in that order, and is guarded.
        """
        return [t for name in names for t in _tensors_in(self._tx.symbolic_locals[name])]

    @property
    def module_stack(self) -> dict[str, tuple[str, type]]:
        """What FX nodes carry as ``nn_module_stack``."""
        return self._tx.nn_module_stack  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def fake_mode(self) -> Iterator[None]:
        """Run code on this trace's fake tensors, as Dynamo itself does."""
        with self._tx.fake_mode, enable_python_dispatcher():
            yield

    @property
    def backend(self) -> tuple[GraphFunction, Mapping[str, Any]]:
        """The backend function that will get the graph, and its keyword arguments."""
        return unwrap_backend(self._tx.output.compiler_fn)

    def backend_error(self, error: Exception) -> Exception:
        """``error`` as Dynamo reports what a backend raises."""
        return BackendCompilerFailed(self.backend[0], error, None).with_traceback(
            error.__traceback__
        )


def _tensors_in(variable: Any) -> Iterator[torch.Tensor]:
    if isinstance(variable, LazyVariableTracker):
        if not variable.is_realized():
            leaves = pytree.tree_leaves(variable.peek_value())
            yield from (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
            return
        variable = variable.realize()
    if isinstance(variable, TensorVariable):
        yield variable.as_proxy().node.meta["example_value"]
    if isinstance(variable, ConstantVariable):  # a text's items are texts, without end
        return
    items = getattr(variable, "items", ())
    for item in items.values() if isinstance(items, dict) else items:
        yield from _tensors_in(item)


def unwrap_backend(compiler: Any) -> tuple[GraphFunction, Mapping[str, Any]]:
    """The user's backend under torch.compile's wrappers. Tried on 2.11, 2.13, 2.14."""
    kwargs: dict[str, Any] = {}
    while True:
        if isinstance(compiler, functools.partial):
            kwargs = {**compiler.keywords, **kwargs}
            compiler = compiler.func
        elif hasattr(compiler, "_torchdynamo_orig_backend"):
            compiler = compiler._torchdynamo_orig_backend
        elif hasattr(compiler, "compiler_fn"):
            kwargs = {**getattr(compiler, "kwargs", {}), **kwargs}
            compiler = compiler.compiler_fn
        else:
            return compiler, kwargs


def current_graph() -> tuple[dict[str, Any], object]:
    """Of the graph that a backend is being given: its `Frame.notes`, and an object that stands
    for the call of ``torch.compile`` that it comes from. Nothing if Dynamo did not give it."""
    if TracingContext.try_get() is None:
        return {}, None
    graph = InstructionTranslator.current_tx().output
    return _notes(graph), graph.compiler_fn


def _notes(graph: Any) -> dict[str, Any]:
    # On the graph itself: Dynamo may trace a frame anew, each time with another graph, and
    # makes no promise of when the old one goes.
    return vars(graph).setdefault("kernelgraph_notes", {})  # type: ignore[no-any-return]


def trace_again() -> NoReturn:
    """From a backend: have Dynamo trace the frame anew, in the same compile.

    What changed must change the trace, or it goes on for ever. Tried on 2.11, 2.13, 2.14.
    """
    # Without this Dynamo takes the new trace for one that diverged from the first.
    InstructionTranslator.current_tx().speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason="kernelgraph found layers to adopt")


def inductor(
    mode: str | None, options: Mapping[str, Any]
) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """What ``torch.compile(backend="inductor", ...)`` makes of these arguments."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    return wrapper(mode, dict(options) or None, None)  # type: ignore[no-any-return]


def inductor_options() -> frozenset[str]:
    """The names of Inductor's options."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def reset_inductor() -> None:
    """What ``torch.compiler.reset()`` asks of a compile by Inductor."""
    inductor(None, {}).reset()  # type: ignore[attr-defined]


def named_backend(name: str) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """A backend that is registered with Dynamo."""
    return lookup_backend(name)


def call_without_dispatch(op: Any, body: Callable[..., Any]) -> None:
    """Have the code that Inductor writes call ``body`` where it would call ``op``.

    It calls ops with autograd and every dispatch mode out of the way, so that all which the
    dispatcher does is cost time: 3 us and more, as much as a small kernel. Where there is a
    profiler it goes through the dispatcher, to be seen. Code for AOTInductor stays as it is.
    Tried on 2.11, 2.13, 2.14.
    """

    profiling = "torch._C._autograd._profiler_enabled()"

    def write(node: Any, writeline: Callable[[str], None]) -> None:
        arguments = ", ".join([*node.codegen_args(), *node.codegen_kwargs()])
        name = node.python_kernel_name
        writeline(f"{node.get_name()} = ({name} if {profiling} else {name}.run)({arguments})")

    op.run = body
    CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{op}"] = CustomCodegen(python=write)


@contextlib.contextmanager
def forgetting_unbacked_symbols() -> Iterator[None]:
    """Let fake code make data-dependent sizes that no node will bind. Tried on 2.11 to 2.14."""
    mode = detect_fake_mode()
    if mode is None or mode.shape_env is None:
        yield
        return
    with mode.shape_env.ignore_fresh_unbacked_symbols():
        yield


@contextlib.contextmanager
def fake_mode_of(fakes: list[Any]) -> Iterator[None]:
    """Run code on ``fakes``, as their maker does."""
    mode = detect_fake_mode(fakes) or FakeTensorMode(allow_non_fake_inputs=True)
    with mode, enable_python_dispatcher():
        yield


@contextlib.contextmanager
def no_data_pointers() -> Iterator[None]:
    """Have fakes that are made here raise where something asks for their memory."""
    mode: Any = detect_fake_mode()
    if mode is None:
        yield
        return
    allowed = mode._allow_unsafe_data_ptr_access
    mode._allow_unsafe_data_ptr_access = False
    try:
        yield
    finally:
        mode._allow_unsafe_data_ptr_access = allowed


@contextlib.contextmanager
def recording_gradients() -> Iterator[None]:
    """Have autograd record what happens here, even where the dispatcher is past it.

    It is in a graph compiled for inference, which a gradient that is computed inside a compiled
    function ends up in; the results of the reference would not depend on anything, and the
    gradients be zero. Tried on 2.11, 2.13, 2.14.
    """
    keys = torch._C.DispatchKey
    with contextlib.ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield
