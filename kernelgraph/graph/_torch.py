"""What kernelgraph uses of torch beyond its public API, and nothing else uses.

Each entry names the versions that it was tried on; a new torch is tried against this file.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import functools
import importlib
import io
import logging
import operator
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._dynamo.guards import GuardBuilder, GuardManagerType, install_guard
from torch._dynamo.source import AttrSource, ConstantSource, DictGetItemSource, GetItemSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import get_metrics_context
from torch._dynamo.variables import ConstantVariable
from torch._dynamo.variables.builder import SourcelessBuilder
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._guards import Guard, TracingContext, detect_fake_mode, tracing
from torch._inductor.codegen.custom_extern_kernel_codegen import (
    CUSTOM_EXTERN_KERNEL_CODEGEN,
    CustomCodegen,
)
from torch._library.fake_impl import FakeImplCtx, set_ctx_getter
from torch._library.utils import get_layout_constraint_tag
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch._subclasses.fake_tensor import is_fake as is_fake
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols as free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from kernelgraph.graph.call import field_names
from kernelgraph.graph.constants import is_named_tuple, same
from kernelgraph.graph.paths import Path, read

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

    def set_callable(self, name: str, value: Callable[..., Any]) -> None:
        """Give a local variable an op or a Python function for its value; nothing guards it."""
        self._tx.symbolic_locals[name] = SourcelessBuilder.create(self._tx, value)

    def fakes(self, name: str) -> Any:
        """A local variable with its tensors as fakes, and everything in it guarded.

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
        # The value of a number that varies becomes guarded by this: an op takes no symbol for it.
        return float(value) if isinstance(value, torch.SymFloat) else value

    def guard(self, name: str, path: Path, value: Any) -> None:
        """Trace anew when what is at ``path`` of a local variable is not ``value`` any more.

        A number that traced code reads may become symbolic once it has changed, and an op's
        schema takes no symbolic float; a guard alone keeps it a constant.
        """
        if isinstance(value, (tuple, list, dict, set, frozenset, functools.partial)):
            # Dynamo's own compares by ==, for which 1 and True are alike; partials by identity.
            self.guard_check(name, path, functools.partial(same, value))
            return
        by_identity = isinstance(value, enum.Enum) or callable(value)
        kind = GuardBuilder.ID_MATCH if by_identity else GuardBuilder.CONSTANT_MATCH
        install_guard(self._source(name, path).make_guard(kind))

    def guard_identity(self, name: str) -> None:
        """Trace anew when a local variable is another object."""
        install_guard(self._source(name, ()).make_guard(GuardBuilder.ID_MATCH))

    def guard_type(self, name: str, path: Path) -> None:
        """Trace anew when what is at ``path`` of a local variable has another type."""
        install_guard(self._source(name, path).make_guard(GuardBuilder.TYPE_MATCH))

    def guard_check(self, name: str, path: Path, check: Callable[[Any], bool]) -> None:
        """Trace anew when ``check`` is not true of what is at ``path`` of a local variable.

        Tried on 2.11, 2.13, 2.14.
        """

        def KERNELGRAPH_CHECK(builder: GuardBuilder, guard: Guard) -> None:  # noqa: N802
            text = f"{check}({guard.name})"
            # By way of an accessor: Dynamo does not run what guards a module or dict itself while
            # that has the attributes and keys that it had, whatever has changed inside of these.
            result = builder.get_guard_manager(guard).lambda_manager(
                python_lambda=check,
                source=text,
                example_value=True,
                guard_manager_enum=GuardManagerType.GUARD_MANAGER,
            )
            result.add_lambda_guard(bool, [text], guard.user_stack)

        install_guard(self._source(name, path).make_guard(KERNELGRAPH_CHECK))

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

    def peek(self, name: str) -> Any:
        """A local variable as it is known, without having Dynamo look at it.

        What Dynamo looks at becomes an input of the graph, in that order, and is guarded.
        """
        return _peek(self._tx, self._tx.symbolic_locals[name])

    @property
    def is_root(self) -> bool:
        """Whether Dynamo traces it for itself, and not where it is called."""
        return self._tx.parent is None

    @property
    def module_stack(self) -> dict[str, tuple[str, type]]:
        """What FX nodes carry as ``nn_module_stack``."""
        return self._tx.nn_module_stack  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def fake_mode(self) -> Iterator[None]:
        """Run code on this trace's fake tensors, as Dynamo itself does."""
        with running_on(self._tx.fake_mode):
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


def _parts_in(tx: Any, variable: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a container and their keys or names; None of anything else.

    Got as Dynamo traces code that reads them. Tried on 2.11, 2.13, 2.14.
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


def _call(tx: Any, function: Any, *arguments: Any) -> Any:
    """The result of a builtin function, as Dynamo traces a call of it."""
    return SourcelessBuilder.create(tx, function).call_function(tx, list(arguments), {})


def _peek(tx: Any, variable: Any) -> Any:
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
    except NotImplementedError:  # it has no type that Python could tell, or is in no graph
        return None


def _made(cls: Any, parts: dict[Any, Any]) -> Any:
    """The inverse of `_parts_in`."""
    if cls in (tuple, list, torch.Size):
        return cls(parts.values())
    return cls(parts) if cls in (dict, OrderedDict) else cls(**parts)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a nested value, dataclasses included."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        cls: type = type(leaf)
        for name in field_names(cls) or ():
            yield from tensors_in(getattr(leaf, name))


def unwrap_backend(compiler: Any) -> tuple[GraphFunction, Mapping[str, Any]]:
    """The user's backend under torch.compile's wrappers. Tried on 2.11, 2.13, 2.14."""
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


def _given_backend(compiler: Any) -> Any:
    """What torch.compile gave to Dynamo, which for a DistributedDataParallel has one of its own
    around it, made for each compile, to hand it the graph in parts. Tried on 2.11, 2.13, 2.14."""
    return getattr(getattr(compiler, "__self__", None), "backend_compile_fn", compiler)


def current_graph() -> tuple[dict[str, Any], object]:
    """Of the graph that a backend is being given: its `Frame.notes`, and an object that stands
    for the call of ``torch.compile`` that it comes from. Nothing if Dynamo did not give it."""
    if TracingContext.try_get() is None:
        return {}, None
    graph = InstructionTranslator.current_tx().output
    return _notes(graph), _given_backend(graph.compiler_fn)


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
    raise TensorifyScalarRestartAnalysis(restart_reason="kernelgraph has decided")


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


def inductor_settings() -> str:
    """A hash of what is set in ``torch._inductor.config``. Tried on 2.11, 2.13, 2.14."""
    from torch._inductor import config

    return config.get_hash().hex()


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
    """Let fake code make data-dependent sizes, which no node will bind.

    Whatever the user set for the rest of the graph: what a layer does inside is its own matter.
    Tried on 2.11, 2.13, 2.14.
    """
    mode: Any = detect_fake_mode()
    # What ``torch.library.get_ctx()`` gives to the fake of an op; its second argument is what it
    # raises where there can be no such size.
    context: Any = FakeImplCtx
    env = mode.shape_env
    with set_ctx_getter(lambda: context(mode, "new_dynamic_size() needs fakes with a ShapeEnv")):
        if env is None:
            yield
            return
        before = env.settings
        env.settings = dataclasses.replace(
            before, allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True
        )
        try:
            with env.ignore_fresh_unbacked_symbols():
                yield
        finally:
            env.settings = before


def bind_unbacked_symbols(made: Iterable[torch.Tensor], given: Iterable[Any]) -> None:
    """Have the node whose fake made these tensors bind the sizes that are in them for the first
    time, and not among the operands ``given``. Tried on 2.11, 2.13, 2.14."""
    known = {symbol for value in given for symbol in free_unbacked_symbols(value)}
    fresh = {symbol for tensor in made for symbol in free_unbacked_symbols(tensor)} - known
    if fresh:
        mode: Any = detect_fake_mode()
        env = mode.shape_env
        if not env._ignore_fresh_unbacked_symbols_tls():  # nor does torch then
            env.pending_fresh_unbacked_symbols += sorted(fresh, key=str)


Expression = sympy.Expr
"""A size in terms of the symbols of a graph."""
Relation = sympy.logic.boolalg.Boolean
"""What is so, or not, of such sizes."""


def expression(value: Any) -> Any:
    """What a symbolic int stands for; a constant, and any other value, as it is."""
    if not isinstance(value, torch.SymInt):
        return value
    expr = value.node.expr
    return int(expr) if expr.is_number else expr


def evaluate(value: Any, known: Mapping[sympy.Symbol, int]) -> Any:
    """What a symbolic int is where its symbols are as ``known``; any other value as it is."""
    expr = expression(value)
    return int(expr.xreplace(dict(known))) if isinstance(expr, Expression) else expr


def hints(values: Iterable[Any]) -> dict[sympy.Symbol, int | None]:
    """The symbols in ``values``, and what they are in the call that is traced: None where that
    depends on values of tensors. Tried on 2.11, 2.13, 2.14."""
    found: dict[sympy.Symbol, int | None] = {}
    for value in values:
        if isinstance(value, torch.SymInt) and not isinstance(expression(value), int):
            known = value.node.shape_env.backed_var_to_val
            for symbol in sorted(value.node.expr.free_symbols, key=str):
                found[symbol] = int(known[symbol]) if symbol in known else None
    return found


def guard_equal(value: torch.SymInt, symbol: sympy.Symbol, other: Any) -> None:
    """Trace anew when a symbol of the graph that ``value`` is of is not ``other`` any more."""
    value.node.shape_env.evaluate_expr(sympy.Eq(symbol, other))


@contextlib.contextmanager
def for_real() -> Iterator[None]:
    """Run code on real tensors in the middle of a trace, as if nothing were traced.

    What the code compiles by itself must not find the trace around it either. Tried on 2.11,
    2.13, 2.14.
    """
    with tracing(None), _disable_current_modes(), no_python_dispatcher():
        yield


@contextlib.contextmanager
def out_of_export() -> Iterator[None]:
    """Run code in the middle of a non-strict export which that does not see.

    It records, for one, each change of the grad mode. Tried on 2.11, 2.13, 2.14.
    """
    with for_real(), torch._C.DisableTorchFunction():
        yield


@contextlib.contextmanager
def running_on(mode: FakeTensorMode) -> Iterator[None]:
    """Run code on fakes of ``mode``."""
    with mode, enable_python_dispatcher():
        yield


@contextlib.contextmanager
def no_data_pointers() -> Iterator[None]:
    """Have fakes of the mode that is on raise where something asks for their memory."""
    mode: Any = detect_fake_mode()
    allowed = mode._allow_unsafe_data_ptr_access
    mode._allow_unsafe_data_ptr_access = False
    try:
        yield
    finally:
        mode._allow_unsafe_data_ptr_access = allowed


@contextlib.contextmanager
def fakes_apart(like: list[torch.Tensor]) -> Iterator[None]:
    """Run code on fakes of a mode of its own, whose sizes may be symbols of those in ``like``.

    Not in the mode that is tracing: a kernel with threads, say, leaves one in no state to go on.
    Asking such a fake for its memory raises. Tried on 2.11, 2.13, 2.14.
    """
    mode: Any = detect_fake_mode(like)
    if all(tensor.layout is torch.strided for tensor in like):  # others cannot be made anew
        mode = FakeTensorMode(
            allow_non_fake_inputs=True, shape_env=getattr(mode, "shape_env", None)
        )
    with for_real(), running_on(mode), no_data_pointers():
        yield


def fake_mode_for(values: Sequence[Any]) -> FakeTensorMode:
    """The mode of the fakes among ``values``, or one that also makes data-dependent sizes."""
    found: FakeTensorMode | None = detect_fake_mode(list(values))
    return found or FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def to_fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake of ``mode`` with the sizes that ``tensor`` has; a fake is its own."""
    return mode.from_tensor(tensor, static_shapes=True)


def hint(value: Any) -> Any:
    """A number for a symbolic size: what it was where it was traced, or any."""
    if isinstance(value, torch.SymInt):
        return value.node.hint if value.node.has_hint() else 2
    return value


def fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A deep copy of ``module`` with fakes for tensors. Tried on 2.11, 2.13, 2.14."""
    with FakeCopyMode(mode):
        return copy.deepcopy(module)


_AUTOGRAD = (
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.ADInplaceOrView,
)
_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded


def begin_recording(enabled: bool = True) -> tuple[bool, ...]:
    """Have autograd record what follows, even where the dispatcher is past it; what was before.

    It is in a graph compiled for inference, which a gradient that is computed inside a compiled
    function ends up in; the results of the reference would not depend on anything, and the
    gradients be zero. Not a context manager: this is on the way of each call of a kernel. Tried on
    2.11, 2.13, 2.14.

    Args:
        enabled: Whether gradients are enabled; without, this is for code that enables them.
    """
    before = torch.is_grad_enabled(), *map(_excluded, _AUTOGRAD)
    torch._C._set_grad_enabled(enabled)
    if True in before[1:]:
        for key in _AUTOGRAD:
            _exclude(key, False)
    return before


def end_recording(before: tuple[bool, ...]) -> None:
    """As it was before `begin_recording`."""
    torch._C._set_grad_enabled(before[0])
    if True in before[1:]:
        for key, was in zip(_AUTOGRAD, before[1:], strict=True):
            _exclude(key, was)


set_grad_enabled = torch._C._set_grad_enabled
"""``torch.set_grad_enabled`` without its object, which takes as long as a call of an op."""


def function_of(node: Any) -> type[torch.autograd.Function]:
    """The function whose results have ``node`` for their ``grad_fn``. Tried on 2.11, 2.13, 2.14."""
    function: type[torch.autograd.Function] = type(node)._forward_cls
    return function


def count_of_results(node: Any) -> int:
    """How many results have ``node`` for their ``grad_fn``. Tried on 2.11, 2.13, 2.14."""
    return len(node._input_metadata)


def splits_forward(function: type[torch.autograd.Function]) -> bool:
    """Whether a function's forward gets no context. Tried on 2.11, 2.13, 2.14."""
    return function.setup_context is not torch.autograd.Function.setup_context


def is_of_op(function: type[torch.autograd.Function]) -> bool:
    """Whether a function is what ``torch.library.register_autograd`` has made of a formula. Tried
    on 2.11, 2.13, 2.14."""
    return function.__module__ == "torch._library.autograd"


class recording_gradients:  # noqa: N801 (a context manager)
    """`begin_recording`, and `end_recording`."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled

    def __enter__(self) -> None:
        self._before = begin_recording(self._enabled)

    def __exit__(self, *_: object) -> None:
        end_recording(self._before)


def transforming() -> bool:
    """Whether the code that runs is differentiated or batched by ``torch.func``, or in forward
    mode. Tried on 2.11, 2.13, 2.14."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


_AUTOCAST_KINDS = tuple(
    kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)
)


any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether there is an autocast region around the code that runs. Tried on 2.11, 2.13, 2.14."""


def autocast_regions() -> tuple[tuple[str, torch.dtype], ...]:
    """The device types and dtypes of these regions."""
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in _AUTOCAST_KINDS
        if torch.is_autocast_enabled(kind)
    )


def symbolic_like(
    operands: Sequence[Any], everything: bool
) -> tuple[list[Any], dict[sympy.Symbol, tuple[int, int]], ShapeEnv]:
    """Operands like those given, as fakes of a mode of their own whose sizes are symbols.

    No symbol is taken for another because they are equal now, nor for 0 or 1 because it is that
    now. Tried on 2.11, 2.13, 2.14.

    Args:
        operands: Tensors and numbers.
        everything: Whether each size of each tensor becomes a symbol; else only those sizes and
            ints that are symbolic.

    Returns:
        The operands; for each symbol the operand that it is in, and which of its sizes it is (0
        for an int); and what the guards are noted in.
    """
    env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
    places: dict[sympy.Symbol, tuple[int, int]] = {}

    def symbol(value: Any, operand: int, dim: int) -> Any:
        source = ConstantSource(f"operand_{operand}_{dim}")
        known = hint(value)
        made = env.create_unspecified_symbol(known, source, DimDynamic.DYNAMIC)
        places[made] = (operand, dim)
        return env.create_symintnode(made, hint=known, source=source)

    symbolic: Any = torch.SymInt
    found = []
    with for_real(), running_on(FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)):
        for i, value in enumerate(operands):
            if isinstance(value, torch.Tensor):
                sizes = [
                    symbol(size, i, dim) if everything or isinstance(size, symbolic) else size
                    for dim, size in enumerate(value.shape)
                ]
                strides = _strides_like(value, sizes)
                device = value.device
                made: Any = torch.empty_strided(sizes, strides, dtype=value.dtype, device=device)
                found.append(made.requires_grad_(value.requires_grad))
            else:
                found.append(symbol(value, i, 0) if isinstance(value, symbolic) else value)
    return found, places, env


def _strides_like(tensor: torch.Tensor, sizes: Sequence[Any]) -> list[Any]:
    """The strides of a tensor of other sizes that lies in memory as ``tensor`` does, if that is
    one piece of it; else those that it has now."""
    now = [int(hint(n)) for n in tensor.stride()]
    order = sorted(range(len(now)), key=lambda dim: (now[dim], -dim))
    strides: list[Any] = [None] * len(now)
    step: Any = 1
    dense = 1
    for dim in order:
        size = int(hint(tensor.shape[dim]))
        if size > 1 and now[dim] != dense:
            return now
        strides[dim], step, dense = step, step * sizes[dim], dense * max(size, 1)
    return strides


def guards_of(env: ShapeEnv) -> list[sympy.Expr]:
    """What was taken for granted of the symbols of ``env``. Tried on 2.11, 2.13, 2.14."""
    return [guard.expr for guard in env.guards]


def fakes_for_export(operands: Sequence[Any]) -> list[Any]:
    """Fakes like ``operands`` that ``torch.export`` takes for example inputs: symbolic sizes are
    what they are now. Tried on 2.11, 2.13, 2.14."""
    env = ShapeEnv(tracked_fakes=[])

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return hint(value)
        size, stride = map(hint, value.shape), map(hint, value.stride())
        made = torch.empty_strided(
            tuple(size), tuple(stride), dtype=value.dtype, device=value.device
        )
        return made.requires_grad_(value.requires_grad)

    with for_real(), FakeTensorMode(shape_env=env, allow_non_fake_inputs=True):
        return [fake(value) for value in operands]


def bounds(known: Any) -> tuple[int, int | None]:
    """The least and the greatest value in a range of ``torch.export``'s; None for no limit."""
    if known is None:
        return 2, None
    greatest = None if known.upper > 2**62 else int(known.upper)
    return int(known.lower), greatest


def register_decomposition(op: Any, fake: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Have ``torch.onnx.export`` replace ``op`` by what ``function`` computes.

    It goes by a table of all decompositions that there are. So do fake tensors, for ops that have
    no fake of Python's, and those are told from another table: an op's is to be in both. Nothing
    else of torch's goes by them for an op that is not its own, but that Inductor, where the
    environment has ``CI``, takes such an op for a mistake of its own and stops. So there it is
    told what it else finds out: that the op stays as it is. Tried on 2.11, 2.13, 2.14.
    """
    torch._decomp.meta_table[op] = fake
    torch._decomp.decomposition_table[op] = function
    if os.environ.get("CI"):
        lowering: Any = importlib.import_module("torch._inductor.lowering")
        if op not in lowering.lowerings:
            layout = lowering.tag_to_layout_constraint(get_layout_constraint_tag(op))
            lowering.make_fallback(op, layout, warn=False)


def aot_compile(program: Any, path: os.PathLike[str], configs: dict[str, Any]) -> None:
    """Compile an exported program to a package of AOTInductor's. Tried on 2.13, 2.14."""
    torch._inductor.aoti_compile_and_package(
        program, package_path=os.fspath(path), inductor_configs=configs
    )


def aot_load(path: os.PathLike[str]) -> Callable[..., Any]:
    """Load such a package. Tried on 2.13, 2.14, and on 2.11 for the CPU."""
    model: Callable[..., Any] = torch._inductor.aoti_load_package(os.fspath(path))
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from saying, at length, that something cannot be exported.

    Most of it is logged; 2.11 prints the graph that it had so far.
    """
    names = ("export", "fx.experimental.symbolic_shapes", "_export.non_strict_utils")
    loggers = [logging.getLogger(f"torch.{name}") for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def compiling_apart() -> Iterator[None]:
    """Compile another graph, or its backward, in the middle of a compile: what Dynamo notes of
    that, each thing once, stays as it is. Tried on 2.11, 2.13, 2.14."""
    context = get_metrics_context()
    before, context._metrics = context._metrics, {}
    try:
        yield
    finally:
        context._metrics = before


def full_graph() -> bool:
    """Whether Dynamo may not break the graph that a backend is being given. Tried on 2.11, 2.13,
    2.14."""
    translator: Any = InstructionTranslator.current_tx()
    return bool(translator.one_graph or translator.error_on_graph_break)


def store_of_group() -> Any:
    """The store of the default process group; None where there is no other process in one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    if torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.distributed_c10d._get_default_store()
