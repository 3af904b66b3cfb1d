"""Dynamo: the frame that is being traced, its graph, its backend, and tracing a second time."""

from __future__ import annotations

import contextlib
import enum
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._dynamo.guards import GuardBuilder, GuardManagerType, install_guard
from torch._dynamo.source import (
    AttrSource,
    DictGetItemSource,
    GetItemSource,
    GlobalStateSource,
)
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import get_metrics_context
from torch._dynamo.variables import ConstantVariable, TensorVariable
from torch._dynamo.variables.builder import SourcelessBuilder
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._guards import Guard, TracingContext
from torch.utils import _pytree as pytree

from kernelgraph.graph._torch.fakes import running_on
from kernelgraph.graph.calls import Path, field_names, is_named_tuple, read, same

GraphFunction = Callable[..., object]
F = TypeVar("F", bound=Callable[..., object])


def at_trace_time(function: F) -> F:
    """Make Dynamo run ``function`` at trace time and take its result for a constant."""
    mark: Any = torch.compiler.assume_constant_result
    return mark(function)  # type: ignore[no-any-return]


class Frame:
    """The innermost frame that Dynamo is tracing, seen from a function that runs at trace time.

    The function is marked with `at_trace_time`, and its caller is this frame. It reads the traced
    module from here instead of from an argument: Dynamo would guard on the identity of an argument,
    and one compiled block could no longer serve all its siblings. Tried on 2.11, 2.13, 2.14.
    """

    def __init__(self) -> None:
        self._tx: Any = InstructionTranslator.current_tx().output.current_tx

    @property
    def notes(self) -> dict[str, Any]:
        """A dict of ours on the graph that is being traced. It lives as long as the trace."""
        return _notes(self._tx.output)

    def value(self, name: str) -> Any:
        """Return the real object of a local variable that holds a module."""
        return self._tx.symbolic_locals[name].realize().value

    def set_callable(self, name: str, value: Callable[..., Any]) -> None:
        """Set a local variable to an op or a Python function, without a guard."""
        self._tx.symbolic_locals[name] = SourcelessBuilder.create(self._tx, value)

    def fakes(self, name: str) -> Any:
        """Return the value of a local variable with fakes for tensors, and guard everything in it.

        Raises:
            NotImplementedError: If it holds something that no graph node can take.
        """
        try:
            return self._fake(self._tx.symbolic_locals[name])
        except NotImplementedError as error:
            what = f"{name} hold what is neither a tensor nor a constant: {error}"
            raise NotImplementedError(what) from None

    def _fake(self, variable: Any) -> Any:
        variable = variable.realize()
        cls = variable.python_type()
        if (parts := _parts_in(self._tx, variable)) is not None:
            return _made(cls, {key: self._fake(part) for key, part in parts})
        if variable.is_python_constant():
            return variable.as_python_constant()
        value = variable.as_proxy().node.meta["example_value"]
        # float() guards the value of a symbolic float, which the schema of an op does not take.
        return float(value) if isinstance(value, torch.SymFloat) else value

    def guard(self, name: str, path: Path, value: object) -> None:
        """Recompile when the part at ``path`` of a local variable is no longer ``value``.

        A number that traced code reads may become symbolic once it has changed, and an op's
        schema takes no symbolic float. A guard alone keeps the number a constant.
        """
        if isinstance(value, (tuple, list, dict, set, frozenset, functools.partial)):
            # Dynamo's own guard compares by ==, for which 1 and True are equal, and partials by
            # identity.
            self.guard_check(name, path, functools.partial(same, value))
            return
        by_identity = isinstance(value, enum.Enum) or callable(value)
        kind = GuardBuilder.ID_MATCH if by_identity else GuardBuilder.CONSTANT_MATCH
        install_guard(self._source(name, path).make_guard(kind))

    def guard_identity(self, name: str) -> None:
        """Recompile when a local variable is another object."""
        install_guard(self._source(name, ()).make_guard(GuardBuilder.ID_MATCH))

    def guard_type(self, name: str, path: Path) -> None:
        """Recompile when the part at ``path`` of a local variable has another type."""
        install_guard(self._source(name, path).make_guard(GuardBuilder.TYPE_MATCH))

    def guard_check(self, name: str, path: Path, check: Callable[[object], bool]) -> None:
        """Recompile when ``check`` returns False for the part at ``path`` of a local variable.

        Tried on 2.11, 2.13, 2.14.
        """

        def KERNELGRAPH_CHECK(builder: GuardBuilder, guard: Guard) -> None:  # noqa: N802
            text = f"{check}({guard.name})"
            # Through an accessor: Dynamo skips a guard on a module or dict itself while its
            # attributes and keys are the same, whatever has changed inside of them.
            result = builder.get_guard_manager(guard).lambda_manager(
                python_lambda=check,
                source=text,
                example_value=True,
                guard_manager_enum=GuardManagerType.GUARD_MANAGER,
            )
            result.add_lambda_guard(bool, [text], guard.user_stack)

        install_guard(self._source(name, path).make_guard(KERNELGRAPH_CHECK))

    def guard_condition(self, check: Callable[[], bool]) -> None:
        """Recompile when ``check``, which is about no variable, returns False. Tried on 2.13."""

        def KERNELGRAPH_CONDITION(builder: GuardBuilder, guard: Guard) -> None:  # noqa: N802
            root = builder.guard_manager.root
            root.add_lambda_guard(lambda _: check(), [f"{check}()"], guard.user_stack)

        install_guard(GlobalStateSource().make_guard(KERNELGRAPH_CONDITION))

    def guard_no_forward_mode(self) -> None:
        """Recompile under forward-mode differentiation; Dynamo guards the transforms of torch.func
        itself. Tried on 2.13."""
        install_guard(GlobalStateSource().make_guard(GuardBuilder.DUAL_LEVEL))

    def _source(self, name: str, path: Path) -> Any:
        variable = self._tx.symbolic_locals[name]
        source = variable.source
        if source is None:
            raise NotImplementedError(f"{name} was made inside the graph")
        value = variable.realize().value
        for step in path:
            if isinstance(step, str):
                source = AttrSource(source, step)
            elif isinstance(value, dict):
                source = DictGetItemSource(source, step[0])
            else:
                source = GetItemSource(source, step[0])
            value = read(value, (step,))
        return source

    def is_pending(self, item: object, attribute: str | None = None) -> bool:
        """Whether the traced code has changed an object, which the real one does not show yet.

        Dynamo makes such changes once the graph has run. Tried on 2.13.

        Args:
            item: A module, another object, or a container.
            attribute: The name of an attribute, which may be pending if it is a tensor; None for
                anything in ``item``.
        """
        effects = self._tx.output.side_effects
        variable = effects.id_to_variable.get(id(item))
        if variable is None or variable.mutation_type is None:
            return False
        if attribute is None:
            return bool(effects.is_modified(variable))
        pending = effects.store_attr_mutations.get(variable, {}).get(attribute)
        return pending is not None and not isinstance(pending.realize(), TensorVariable)

    def peek(self, name: str) -> Any:
        """Return the value of a local variable without making Dynamo realize it.

        A realized variable becomes an input of the graph, in that order, and is guarded.
        """
        return _peek(self._tx, self._tx.symbolic_locals[name])

    @property
    def is_root(self) -> bool:
        """Whether the frame is compiled for itself, and not inlined into a caller."""
        return self._tx.parent is None

    @property
    def around(self) -> tuple[str, ...]:
        """The names of the higher-order ops whose subgraphs are being traced, innermost first.
        Tried on 2.13."""
        names, tracer = [], self._tx.output.current_tracer
        while tracer is not None and tracer.parent is not None:
            target = tracer.source_target
            names.append(getattr(target, "__name__", str(target)))
            tracer = tracer.parent
        return tuple(names)

    @property
    def module_stack(self) -> dict[str, tuple[str, type]]:
        """The ``nn_module_stack`` that FX nodes of this frame get."""
        return self._tx.nn_module_stack  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def fake_mode(self) -> Iterator[None]:
        """Run code on the fake tensors of this trace, as Dynamo does."""
        with running_on(self._tx.fake_mode):
            yield

    @property
    def backend(self) -> tuple[GraphFunction, Mapping[str, Any]]:
        """The backend that will get the graph, and its keyword arguments."""
        return unwrap_backend(self._tx.output.compiler_fn)

    def backend_error(self, error: Exception) -> Exception:
        """Return ``error`` as Dynamo reports an exception of a backend."""
        return BackendCompilerFailed(self.backend[0], error, None).with_traceback(
            error.__traceback__
        )


def _parts_in(tx: object, variable: Any) -> list[tuple[Any, object]] | None:
    """Return the parts of a container with their keys or names, or None for anything else.

    They are read as traced code would read them. Tried on 2.11, 2.13, 2.14.
    """
    cls = variable.python_type()
    names = cls._fields if is_named_tuple(cls) else field_names(cls)
    if names is not None:
        return [(n, _call(tx, getattr, variable, ConstantVariable.create(n))) for n in names]
    if cls in (tuple, list, torch.Size):
        return list(enumerate(variable.unpack_var_sequence(tx)))
    if cls in (dict, OrderedDict):
        keys = variable.unpack_var_sequence(tx)
        return [(k.as_python_constant(), _call(tx, operator.getitem, variable, k)) for k in keys]
    return None


def _call(tx: Any, function: Any, *arguments: Any) -> object:
    """Return the result of a builtin function, as Dynamo traces its call."""
    return SourcelessBuilder.create(tx, function).call_function(tx, list(arguments), {})


def _peek(tx: object, variable: Any) -> Any:
    if isinstance(variable, LazyVariableTracker):
        if not variable.is_realized():
            return variable.peek_value()
        variable = variable.realize()
    try:
        if (parts := _parts_in(tx, variable)) is not None:
            return _made(variable.python_type(), {key: _peek(tx, part) for key, part in parts})
        if variable.is_python_constant():
            return variable.as_python_constant()
        value = variable.as_proxy().node.meta.get("example_value")
        return value.node.hint if isinstance(value, torch.SymFloat) else value
    except NotImplementedError:  # Dynamo knows no Python type for it, or it is in no graph
        return None


def _made(cls: Any, parts: dict[Any, Any]) -> Any:
    """Make a container from its parts; the inverse of `_parts_in`."""
    if cls in (tuple, list, torch.Size):
        return cls(parts.values())
    return cls(parts) if cls in (dict, OrderedDict) else cls(**parts)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in a nested value, dataclasses included."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        cls: type = type(leaf)
        for name in field_names(cls) or ():
            yield from tensors_in(getattr(leaf, name))


def unwrap_backend(compiler: Any) -> tuple[GraphFunction, Mapping[str, Any]]:
    """Return the user's backend from under the wrappers of ``torch.compile``, and its keyword
    arguments. Tried on 2.11, 2.13, 2.14."""
    kwargs: dict[str, Any] = {}
    compiler = _given_backend(compiler)
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


def _given_backend(compiler: object) -> object:
    """Return the compiler that ``torch.compile`` gave to Dynamo.

    For a DistributedDataParallel Dynamo wraps it, anew for each compile, in one that splits the
    graph. Tried on 2.11, 2.13, 2.14.
    """
    return getattr(getattr(compiler, "__self__", None), "backend_compile_fn", compiler)


def current_graph() -> tuple[dict[str, Any], object]:
    """Return facts about the graph that a backend is compiling.

    Returns:
        Its `Frame.notes`, and an object that identifies the call of ``torch.compile`` that it comes
        from. ``({}, None)`` outside of Dynamo.
    """
    if TracingContext.try_get() is None:
        return {}, None
    graph = InstructionTranslator.current_tx().output
    return _notes(graph), _given_backend(graph.compiler_fn)


def _notes(graph: Any) -> dict[str, Any]:
    # On the graph itself: Dynamo may trace a frame several times, each time with a new graph, and
    # does not say when it drops the old one.
    return vars(graph).setdefault("kernelgraph_notes", {})  # type: ignore[no-any-return]


def trace_again() -> NoReturn:
    """Make Dynamo trace the frame again, in the same compile; called by a backend.

    The caller must have changed something that changes the trace, or this never ends. Dynamo has
    this exception for floats that cannot become tensors
    (https://github.com/pytorch/pytorch/pull/140346). Tried on 2.11, 2.13, 2.14.
    """
    # Else Dynamo raises an error, because the new trace diverges from the recorded one.
    InstructionTranslator.current_tx().speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason="kernelgraph has decided")


def named_backend(name: str) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """Return the backend that is registered with Dynamo under ``name``."""
    return lookup_backend(name)


@contextlib.contextmanager
def compiling_apart() -> Iterator[None]:
    """Compile another graph, or its backward, in the middle of a compile.

    Dynamo records metrics of a compile, and raises an error where one is set twice; so the outer
    compile's metrics are put aside. Tried on 2.11, 2.13, 2.14.
    """
    context = get_metrics_context()
    before, context._metrics = context._metrics, {}
    try:
        yield
    finally:
        context._metrics = before


def full_graph() -> bool:
    """Whether ``fullgraph=True`` holds for the graph that is being compiled. Tried on 2.11, 2.13,
    2.14."""
    translator: Any = InstructionTranslator.current_tx()
    return bool(translator.one_graph or translator.error_on_graph_break)
