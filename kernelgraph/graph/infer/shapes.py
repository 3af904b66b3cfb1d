"""The shapes of what a layer returns: by its ``fake``, by runs on fake tensors, or by a probe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraph.cache import remember
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, Runner, UnsupportedValue, flatten_tensors, path_text
from kernelgraph.graph.infer import sample_inputs
from kernelgraph.graph.infer.output_specs import OutputSpec, TensorSpec, UnknownShape, observe
from kernelgraph.graph.infer.probe import Probe
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible

Source = Callable[[Sequence[Any]], OutputSpec]
"""What tells the results of calls of one form, given the operands."""


class _DependsOnValues(UnsupportedValue):
    """An output's size is not known before there are values."""


def run_on_fakes(runner: Runner, operands: Sequence[Any], source: str = "") -> OutputSpec:
    """Run a forward on fakes that are like ``operands``.

    On fakes of its own: the operands belong to whoever traces, and a forward may write into
    them. Asking such a fake for its memory raises: what native code would do with the null
    pointer that it would otherwise get is nobody's guess.

    Args:
        runner: Runs the forward.
        operands: Of tensors only the form counts.
        source: What the forward is, see `OutputSpec.source`. Only a ``fake`` may return sizes that
            depend on values.

    Raises:
        UnsupportedValue: If no op can do what it does.
        Exception: Whatever it raises.
    """
    given = [v for v in operands if isinstance(v, Tensor)]
    with (
        torch.inference_mode(False),  # tensors of inference mode do not count what writes to them
        torch.no_grad(),
        _torch.fakes_apart(given),
        _torch.forgetting_unbacked_symbols(),
    ):
        fakes = [_like(v) if isinstance(v, Tensor) else v for v in operands]
        told, tensors = observe(runner, fakes)
    known = {symbol for v in operands for symbol in _torch.free_unbacked_symbols(v)}
    fresh = any(_torch.free_unbacked_symbols(t) - known for t in tensors)
    if fresh and source != "fake":
        raise _DependsOnValues(
            "the size of what the layer returns depends on values of tensors; pass fake= where "
            "the layer is made extensible, a shape function that takes such a size from "
            "torch.library.get_ctx().new_dynamic_size()"
        )
    return told._replace(source=source, fresh=fresh)


def _like(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided:
        return tensor
    size, stride = tensor.size(), tensor.stride()
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device)


class ShapeFunction:
    """The shapes of what one form of call returns."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._known: dict[Any, tuple[TensorSpec, ...]] = {}

    def __call__(self, operands: Sequence[Any]) -> tuple[TensorSpec, ...]:
        """The results of a call with ``operands``, of which the values are never looked at."""
        key = static_key(operands)
        if key is None or key not in self._known:
            told = self._source(operands)
            if key is None or told.fresh:  # each call has sizes of its own
                return told.results
            remember(self._known, key, told.results)
        return self._known[key]


def static_key(operands: Sequence[Any]) -> tuple[Any, ...] | None:
    """All that shapes may depend on; None where some of it is symbolic."""
    key: list[Any] = []
    for value in operands:
        if isinstance(value, Tensor):
            sizes = (*value.shape, *(value.stride() if value.layout is torch.strided else ()))
            if not all(type(size) is int for size in sizes):
                return None
            key += (sizes, value.dtype, value.device, type(value))
        elif isinstance(value, torch.SymInt):
            return None
        else:
            key.append(value)
    return tuple(key)


def infer_output(
    kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[Any]
) -> tuple[Source, OutputSpec]:
    """What ``call`` returns, and what tells it of other calls of the form.

    The layer's ``fake`` stands alone where there is one. Else it is the first that can of

    1. the kernel on fakes, whose results are what the graph will get;
    2. the reference on fakes, which mostly can where the kernel is native code;
    3. the kernel run for real, on small inputs that are made up (`kernelgraph.graph.infer.probe`).

    Raises:
        UnknownShape: If none can, or the ``fake`` raises.
        UnsupportedValue: If the kernel or the reference does what no op can.
        AttributeError: If the kernel reads an attribute that the layer does not have.
    """
    if layer.fake is not None:
        source: Source = _on_fakes("fake", layer.fake, call)
        try:
            return source, source(operands)
        except UnsupportedValue:
            raise
        except Exception as error:
            raise UnknownShape(
                f"fake= of layer {layer.layer_name} raised {_text(error)}"
            ) from error
    _check_annotated(kernel, layer, call)
    attempts: list[tuple[str, Source]] = [
        ("the kernel", _on_fakes("kernel", kernel.forward, call)),
        ("the reference", _on_fakes("reference", layer.reference, call)),
        ("the kernel on inputs made up for it", Probe(Runner(kernel.forward, call))),
    ]
    errors = []
    for what, source in attempts:
        try:
            if what == "the kernel" and static_key(operands) is None:
                # A run that fails on symbolic sizes has guarded them by then, for nothing.
                _at_hints(source, operands)
            return source, source(operands)
        except Exception as error:
            if isinstance(error, AttributeError):
                _explain_attribute(error, what, kernel, layer, call)
            # On fakes a kernel may do what it does only there.
            if isinstance(error, _DependsOnValues) or (
                isinstance(error, UnsupportedValue) and what != "the kernel"
            ):
                raise
            errors.append(f"{what}: {_text(error)}")
    raise UnknownShape(
        f"the shape of what kernel {kernel} returns for layer {layer.layer_name} cannot be told "
        "by running it or the layer on fake tensors, nor by probing it; pass fake= where the "
        f"layer is made extensible ({'; '.join(errors)})"
    )


def _at_hints(source: Source, operands: Sequence[Any]) -> OutputSpec:
    """What ``source`` tells of a call with the sizes that symbols have in the call that is traced;
    nothing is guarded."""
    known = sample_inputs.sizes_now(operands)

    def static(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return _torch.evaluate(value, known)
        size, stride = (
            [_torch.evaluate(n, known) for n in numbers]
            for numbers in (value.shape, value.stride())
        )
        return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)

    with _torch.for_real():
        with _torch.fakes_apart([]):
            fakes = [static(value) for value in operands]
        return source(fakes)


def _text(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return (
        first_line if isinstance(error, UnknownShape) else f"{type(error).__name__}: {first_line}"
    )


def _on_fakes(source: str, forward: Callable[..., Any], call: Call) -> Source:
    return functools.partial(run_on_fakes, Runner(forward, call), source=source)


def _check_annotated(kernel: Kernel, layer: Extensible, call: Call) -> None:
    """A hub layer's bare annotations say which attributes it wants."""
    declared = {n for base in kernel.layer.__mro__ for n in _annotations(base)}
    for path in call.state.absent:
        if path[0] in declared:
            raise _no_attribute(kernel, layer, path_text(path))


def _annotations(cls: type) -> frozenset[str]:
    if cls.__module__.partition(".")[0] == "torch":
        return frozenset()
    return frozenset(getattr(cls, "__annotations__", {}))


def _explain_attribute(
    error: AttributeError, what: str, kernel: Kernel, layer: Extensible, call: Call
) -> None:
    """Say more of an attribute that the object in the layer's place does not have."""
    if type(error.obj) not in [cls for _, cls in call.state.nodes]:
        return
    for path, kind in call.state.untaken:
        if path[-1] == error.name:
            raise UnsupportedValue(
                f"{what} reads self.{path_text(path)}, a {kind}, which is neither a tensor, a "
                "module, a constant nor made of such"
            ) from error
    if what != "the reference":
        raise _no_attribute(kernel, layer, str(error.name)) from error


def _no_attribute(kernel: Kernel, layer: Extensible, name: str) -> AttributeError:
    return AttributeError(
        f"kernel {kernel} reads self.{name}, which layer {layer.layer_name} "
        f"({layer.owner.__qualname__}) does not have"
    )


class Effects(NamedTuple):
    """The operands that a call writes into."""

    kernel: tuple[int, ...]
    layer: tuple[int, ...]
    """Those that the layer's reference writes into: what is in them is part of its result."""


def effects(
    kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[Any], told: OutputSpec
) -> Effects:
    """What kernel and reference write into, as far as runs on fakes tell, or the probe; one of
    which ``told`` comes from.

    Raises:
        UnsupportedValue: If the reference does what no op can.
        RuntimeError: If the two do not return the same structure.
    """
    # One of the two runs is the one that told the shapes.
    kernels: OutputSpec | None = told
    references: OutputSpec | None = told
    if told.source != "kernel":
        kernels = _attempt("kernel", kernel.forward, call, operands)
    if told.source != "reference":
        references = _attempt("reference", layer.reference, call, operands)
    if kernels and references and references.output != kernels.output:
        raise RuntimeError(
            f"kernel {kernel} returns {kernels.output.describe()} for layer "
            f"{layer.layer_name}, which returns {references.output.describe()}"
        )
    if kernels is None and told.source == "probe":
        kernels = told
    return Effects(kernels.written if kernels else (), references.written if references else ())


def differentiable(
    layer: Extensible,
    call: Call,
    operands: Sequence[Any],
    wanted: Sequence[bool],
    written: Sequence[int],
) -> tuple[bool, ...] | None:
    """Which results a gradient flows through, by a run of the reference on fakes; None where that
    does not run.

    Args:
        layer: The layer that is called.
        call: The form of the call.
        operands: Its operands.
        wanted: Of which of them gradients are wanted.
        written: The operands that the reference writes into: results too, behind the others.
    """
    given = [v for v in operands if isinstance(v, Tensor)]
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _torch.fakes_apart(given),
            _torch.forgetting_unbacked_symbols(),
        ):
            leaves = [
                _like(v).requires_grad_(needed) if isinstance(v, Tensor) else v
                for v, needed in zip(operands, wanted, strict=True)
            ]
            # A layer may write into what it is given, which it could not if these were leaves.
            fakes = [v.clone() if i in written else v for i, v in enumerate(leaves)]
            results, _ = flatten_tensors(Runner(layer.reference, call)(fakes))
            results += [fakes[i] for i in written]
    except Exception:  # native code, say
        return None
    return tuple(result.requires_grad for result in results)


def _attempt(
    what: str, forward: Callable[..., Any], call: Call, operands: Sequence[Any]
) -> OutputSpec | None:
    source = _on_fakes(what, forward, call)
    try:
        return source(operands) if static_key(operands) else _at_hints(source, operands)
    except _DependsOnValues:
        return None
    except UnsupportedValue:
        raise
    except Exception:  # native code, say
        return None
