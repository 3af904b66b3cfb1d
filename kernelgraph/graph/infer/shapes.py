"""Infers what a call of a layer returns and writes into, before it runs.

Shapes come from the layer's ``fake=``, else from a run of the kernel or the reference on fake
tensors, else from a probe (`kernelgraph.graph.infer.probe`).
"""

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
from kernelgraph.graph.infer.run_effects import globals_kept
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible

InferOutput = Callable[[Sequence[object]], OutputSpec]
"""Returns the spec of a call's output, given its operands; one for each call signature."""


class _DependsOnValues(UnsupportedValue):
    """The size of an output depends on the values of tensors."""

    def __init__(self, spec: OutputSpec) -> None:
        super().__init__(
            "the size of what the layer returns depends on values of tensors; pass fake= where "
            "the layer is made extensible, a shape function that takes such a size from "
            "torch.library.get_ctx().new_dynamic_size()"
        )
        self.spec = spec


def run_on_fakes(runner: Runner, operands: Sequence[object], source: str = "") -> OutputSpec:
    """Run a forward on new fakes that are like ``operands``.

    The operands themselves belong to the trace, and a forward may write into them. Asking such a
    fake for its memory raises: native code would otherwise receive a null pointer, which is
    undefined behaviour.

    Args:
        runner: Runs the forward.
        operands: The operands; the values of tensors are not used.
        source: See `OutputSpec.source`. Only a ``fake`` may return sizes that depend on values.

    Raises:
        UnsupportedValue: If the forward does something that no op can do.
        Exception: Whatever the forward raises.
    """
    given = [v for v in operands if isinstance(v, Tensor)]
    with (
        torch.inference_mode(False),  # inference tensors have no version counters
        torch.no_grad(),
        _torch.fakes_apart(given),
        _torch.forgetting_unbacked_symbols(),
    ):
        fakes = [_like(v) if isinstance(v, Tensor) else v for v in operands]
        spec, tensors = observe(runner, fakes)
    known = {symbol for v in operands for symbol in _torch.free_unbacked_symbols(v)}
    fresh = any(_torch.free_unbacked_symbols(t) - known for t in tensors)
    spec = spec._replace(source=source, fresh=fresh)
    if fresh and source != "fake":
        raise _DependsOnValues(spec)
    return spec


def _like(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided:
        return tensor
    size, stride = tensor.size(), tensor.stride()
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device)


class ShapeFunction:
    """Returns the specs of a call's results; one object for each call signature."""

    def __init__(self, source: InferOutput) -> None:
        self._source = source
        self._known: dict[object, tuple[TensorSpec, ...]] = {}

    def __call__(self, operands: Sequence[object]) -> tuple[TensorSpec, ...]:
        """Return the specs for a call with ``operands``, whose values are never read."""
        key = static_key(operands)
        if key is None or key not in self._known:
            spec = self._source(operands)
            if key is None or spec.fresh:  # sizes that are created anew for each call
                return spec.results
            remember(self._known, key, spec.results)
        return self._known[key]


def static_key(operands: Sequence[object]) -> tuple[object, ...] | None:
    """Return everything that shapes may depend on, or None where a part of it is symbolic."""
    key: list[object] = []
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
    kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[object]
) -> tuple[InferOutput, OutputSpec]:
    """Infer the output of a call, and what the layer does besides returning it.

    The results have to be the layer's, so its reference is asked: on fakes, or where it does not
    run on fakes, on small real inputs that are made up (`kernelgraph.graph.infer.probe`). The
    kernel is asked in the same two ways only where the reference raises in both. A ``fake`` of
    the layer's tells the results alone.

    Returns:
        A function that infers the output of other calls with this signature, and the spec of this
        call's output.

    Raises:
        UnsupportedValue: If the layer does something that no op can do, or none of them works
            (`UnknownShape`).
        AttributeError: If the kernel reads an attribute that the layer does not have.
        RuntimeError: If the ``fake`` raises.
    """
    _check_annotated(kernel, layer, call)
    attempts: list[tuple[str, InferOutput]] = [
        ("the reference", _on_fakes("reference", layer.reference, call)),
        ("the reference on sample inputs", _probe("the reference", layer.reference, call)),
    ]
    if layer.fake is not None:
        return _of_fake(layer, call, operands, _aside(attempts[0][1], layer, call))
    attempts += [
        ("the kernel", _kernel_on_fakes(kernel, call)),
        ("the kernel on sample inputs", _probe("the kernel", kernel.forward, call)),
    ]
    errors = []
    for what, runs in attempts:
        source = _aside(runs, layer, call)
        try:
            if not what.endswith("inputs") and static_key(operands) is None:
                # First at fixed sizes: a run that fails on symbolic ones leaves useless guards.
                _at_hints(source, operands)
            spec = source(operands)
        except Exception as error:
            if isinstance(error, AttributeError):
                explain_attribute(error, what, kernel, layer, call)
            # What a kernel does on fakes it may not do on real tensors, so only the others count.
            known = isinstance(error, UnsupportedValue) and not isinstance(error, UnknownShape)
            if isinstance(error, _DependsOnValues) or (known and what != "the kernel"):
                raise
            errors.append(f"{what}: {_text(error)}")
        else:
            _check_possible(spec, layer)
            return source, spec
    raise UnknownShape(
        f"cannot infer the shape of what kernel {kernel} returns for layer {layer.layer_name}: "
        "neither it nor the layer runs on fake tensors, and probing them fails; pass fake= where "
        f"the layer is made extensible ({'; '.join(errors)})"
    )


def _of_fake(
    layer: Extensible, call: Call, operands: Sequence[object], reference: InferOutput
) -> tuple[InferOutput, OutputSpec]:
    """Infer an output by the layer's ``fake``, and the rest by its reference where that runs on
    fakes."""
    assert layer.fake is not None
    source = _on_fakes("fake", layer.fake, call)
    try:
        spec = source(operands)
    except UnsupportedValue:
        raise
    except Exception as error:
        raise RuntimeError(f"fake= of layer {layer.layer_name} raised {_text(error)}") from error
    try:
        told = reference(operands) if static_key(operands) else _at_hints(reference, operands)
    except _DependsOnValues as error:
        told = error.spec
    except UnsupportedValue:
        raise
    except Exception:  # that it does not run on fakes is what a ``fake`` is for
        return source, spec
    _check_possible(told, layer)
    return source, spec._replace(written=told.written, aliases=told.aliases, source="reference")


def _check_possible(spec: OutputSpec, layer: Extensible) -> None:
    """Raise `UnsupportedValue` if no op can do what the layer did in a run."""
    if spec.of_layer and spec.no_op:
        raise UnsupportedValue(f"{layer.reference.__qualname__}: {spec.no_op}")


def _probe(who: str, forward: Callable[..., object], call: Call) -> Probe:
    return Probe(Runner(forward, call), f"probe of {who}")


def _at_hints(source: InferOutput, operands: Sequence[object]) -> OutputSpec:
    """Call ``source`` with the values that symbols have in the traced call, without guards."""
    known = sample_inputs.sizes_now(operands)

    def static(value: object) -> object:
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


def _on_fakes(source: str, forward: Callable[..., object], call: Call) -> InferOutput:
    return functools.partial(run_on_fakes, Runner(forward, call), source=source)


def _aside(runs: InferOutput, layer: Extensible, call: Call) -> InferOutput:
    """Return a function that infers as ``runs``, and undoes what the layer counts in Python."""

    def infer(operands: Sequence[object]) -> OutputSpec:
        with call.program_data_kept(layer) as changed:
            spec = runs(operands)
            if spec.of_layer and changed():  # compilers drop, merge and repeat ops
                spec = spec._replace(no_op="it changes Python data of its class or module")
        return spec

    return infer


def _kernel_on_fakes(kernel: Kernel, call: Call) -> InferOutput:
    """Return a function that runs a kernel on fakes and has it forget them."""

    def infer(operands: Sequence[object]) -> OutputSpec:
        with globals_kept(kernel.forward):
            return run_on_fakes(Runner(kernel.forward, call), operands, "kernel")

    return infer


def _check_annotated(kernel: Kernel, layer: Extensible, call: Call) -> None:
    """Check that the layer has the attributes that the hub layer's bare annotations declare."""
    declared = {n for base in kernel.layer.__mro__ for n in _annotations(base)}
    for path in call.state.absent:
        if path[0] in declared:
            raise _no_attribute(kernel, layer, path_text(path))


def _annotations(cls: type) -> frozenset[str]:
    if cls.__module__.partition(".")[0] == "torch":
        return frozenset()
    return frozenset(getattr(cls, "__annotations__", {}))


def explain_attribute(
    error: AttributeError, what: str, kernel: Kernel, layer: Extensible, call: Call
) -> None:
    """Raise a clearer error for an attribute that the stand-in for the layer does not have.

    Args:
        error: The error that a run has raised.
        what: What ran: the reference, or the kernel.
        kernel: The kernel.
        layer: The layer.
        call: The signature of the call.

    Raises:
        UnsupportedValue: If the layer has the attribute, and it is one that no op takes.
        AttributeError: If the layer does not have it.
    """
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
    """The operands that a call writes into, by number."""

    kernel: tuple[int, ...]
    """The operands that the kernel is known to write into."""
    layer: tuple[int, ...]
    """The operands that the reference writes into. Their new values are part of the result."""

    @classmethod
    def of(cls, spec: OutputSpec) -> Effects:
        """Return what the run that a spec comes from has shown."""
        return cls((), spec.written) if spec.of_layer else cls(spec.written, ())


def does_the_same(
    kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[object]
) -> bool:
    """Whether a kernel that is traced in the place of its layer leaves the same behind.

    Both are run on fakes: they have to return the same structure, shapes, dtypes and strides,
    write into the same operands and return the same ones, and draw no random numbers.
    """
    try:
        with globals_kept(kernel.forward), call.program_data_kept(layer):
            made, expected = (
                run_on_fakes(Runner(forward, call), operands, "fake")
                for forward in (kernel.forward, layer.reference)
            )
    except Exception:
        return False
    sizes = [[[*map(_torch.expression, r.shape)] for r in s.results] for s in (made, expected)]
    alike = [
        (s.output, s.written, s.aliases, s.no_op, [(r.dtype, r.device, r.order) for r in s.results])
        for s in (made, expected)
    ]
    return sizes[0] == sizes[1] and alike[0] == alike[1] and not made.no_op


def differentiable(
    layer: Extensible,
    call: Call,
    operands: Sequence[Any],
    wanted: Sequence[bool],
    written: Sequence[int],
) -> tuple[bool, ...] | None:
    """Find the results that a gradient flows through, by a run of the reference on fakes.

    Args:
        layer: The layer that is called.
        call: The signature of the call.
        operands: The operands of the call.
        wanted: For each operand, whether a gradient is wanted of it.
        written: The operands that the reference writes into; they are further results.

    Returns:
        A flag for each result, or None where the reference does not run on fakes.
    """
    given = [v for v in operands if isinstance(v, Tensor)]
    try:
        with (
            call.program_data_kept(layer),
            torch.inference_mode(False),
            torch.enable_grad(),
            _torch.fakes_apart(given),
            _torch.forgetting_unbacked_symbols(),
        ):
            leaves = [
                _like(v).requires_grad_(needed) if isinstance(v, Tensor) else v
                for v, needed in zip(operands, wanted, strict=True)
            ]
            # Clones, since a layer that writes into its arguments could not write into leaves.
            fakes = [v.clone() if i in written else v for i, v in enumerate(leaves)]
            results, _ = flatten_tensors(Runner(layer.reference, call)(fakes))
            results += [fakes[i] for i in written]
    except Exception:  # native code, for example
        return None
    return tuple(result.requires_grad for result in results)
