"""What a layer returns, told by running it on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.call import Call, Template, UnsupportedValue, take_leaves
from kernelgraph.graph.runner import Runner
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible


class NoFake(Exception):
    """The shape of a layer's output cannot be told."""


class _DependsOnValues(UnsupportedValue):
    """An output's size is not known before there are values."""


class Result(NamedTuple):
    """What is known of one tensor of an output before there is any."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


class Told(NamedTuple):
    """What a run on fakes tells."""

    results: tuple[Result, ...]
    output: Template
    """What the layer returns, its tensors taken out."""
    written: tuple[int, ...]
    """The operands that the run wrote into."""


def run_on_fakes(runner: Runner, operands: Sequence[Any]) -> Told:
    """Run a forward on fakes that are like ``operands``.

    On fakes of its own: the operands belong to whoever traces, and a forward may write into
    them. Asking such a fake for its memory raises: what native code would do with the null
    pointer that it would otherwise get is nobody's guess.

    Raises:
        UnsupportedValue: If no op can do what it does.
        Exception: Whatever it raises.
    """
    given = [v for v in operands if isinstance(v, Tensor)]
    tensors: list[Any] = []
    with (
        torch.inference_mode(False),  # tensors of inference mode do not count what writes to them
        torch.no_grad(),
        _torch.fake_mode_of(given),
        _torch.forgetting_unbacked_symbols(),
        _torch.no_data_pointers(),
    ):
        fakes = [_like(v) if isinstance(v, Tensor) else v for v in operands]
        before = [_version(v) for v in fakes]
        output = take_leaves(runner.observe(fakes), tensors)
        written = tuple(i for i, v in enumerate(fakes) if _version(v) != before[i])
    if not all(isinstance(t, Tensor) for t in tensors):
        raise UnsupportedValue("the layer returns a number, which no op can")
    if not tensors:
        raise UnsupportedValue("the layer returns no tensor")
    known = {symbol for v in given for symbol in _torch.free_unbacked_symbols(v)}
    if any(_torch.free_unbacked_symbols(t) - known for t in tensors):
        raise _DependsOnValues("the size of what the layer returns depends on values of tensors")
    results = tuple(Result(tuple(t.shape), t.dtype, t.device) for t in tensors)
    return Told(results, output, written)


def _like(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided:
        return tensor
    size, stride = tensor.size(), tensor.stride()
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


class ShapeFunction:
    """The shapes of what one form of call returns."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._known: dict[Any, tuple[Result, ...]] = {}

    def __call__(self, operands: Sequence[Any]) -> tuple[Result, ...]:
        """The results of a call with ``operands``, of which the values are never looked at."""
        key = static_key(operands)
        if key is None:
            return run_on_fakes(self._runner, operands).results
        if key not in self._known:
            remember(self._known, key, run_on_fakes(self._runner, operands).results)
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


def remember(known: dict[Any, Any], key: Any, value: Any, most: int = 1024) -> None:
    """Put ``value`` into a table that never grows beyond ``most`` entries."""
    if len(known) >= most:
        known.clear()
    known[key] = value


def tell(
    kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[Any]
) -> tuple[Runner, Told]:
    """What ``call`` returns, by the first that runs on fakes, and that one.

    The layer's ``fake`` stands alone where there is one; else it is the kernel, whose results are
    what the graph will get, or the reference, which mostly can where the kernel is native code.

    Raises:
        NoFake: If none does.
        UnsupportedValue: If the reference does what no op can.
        AttributeError: If the kernel reads an attribute that the layer does not have.
    """
    if layer.fake is not None:
        runner = Runner(layer.fake, call)
        return runner, run_on_fakes(runner, operands)
    _check_annotated(kernel, layer, call)
    errors = []
    for what, forward in (("kernel", kernel.forward), ("reference", layer.reference)):
        runner = Runner(forward, call)
        try:
            return runner, run_on_fakes(runner, operands)
        except Exception as error:
            if isinstance(error, AttributeError):
                _explain_attribute(error, what, kernel, layer, call)
            if isinstance(error, UnsupportedValue) and what == "reference":
                raise
            first_line = (str(error).splitlines() or [""])[0]
            errors.append(f"the {what}: {type(error).__name__}: {first_line}")
    raise NoFake(
        f"the output's shape of layer {layer.layer_name} cannot be told by running it on fake "
        f"tensors; pass fake= where the layer is made extensible ({'; '.join(errors)})"
    )


def _check_annotated(kernel: Kernel, layer: Extensible, call: Call) -> None:
    """A hub layer's bare annotations say which attributes it wants."""
    declared = {n for base in kernel.layer.__mro__ for n in _annotations(base)}
    for path in call.state.absent:
        if path[0] in declared:
            raise _no_attribute(kernel, layer, ".".join(path))


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
                f"the {what} reads self.{'.'.join(path)}, a {kind}, which is neither a tensor, a "
                "module nor a constant"
            ) from error
    if what == "kernel":
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


def effects(kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[Any]) -> Effects:
    """What kernel and reference write into, as far as runs on fakes tell.

    Raises:
        UnsupportedValue: If the reference does what no op can.
        RuntimeError: If the two do not return the same structure.
    """
    kernels = _attempt(kernel.forward, call, operands)
    references = _attempt(layer.reference, call, operands)
    if kernels and references and references.output != kernels.output:
        raise RuntimeError(
            f"kernel {kernel} returns {describe_output(kernels.output)} for layer "
            f"{layer.layer_name}, which returns {describe_output(references.output)}"
        )
    return Effects(kernels.written if kernels else (), references.written if references else ())


def differentiable(
    layer: Extensible, call: Call, operands: Sequence[Any], written: Sequence[int]
) -> tuple[bool, ...] | None:
    """Which results a gradient flows through, by a run of the reference on fakes; None where that
    does not run.

    Args:
        layer: The layer that is called.
        call: The form of the call.
        operands: Its operands, which say by ``requires_grad`` where gradients are wanted.
        written: The operands that the reference writes into: results too, behind the others.
    """
    given = [v for v in operands if isinstance(v, Tensor)]
    results: list[Any] = []
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _torch.fake_mode_of(given),
            _torch.forgetting_unbacked_symbols(),
            _torch.no_data_pointers(),
        ):
            leaves = [
                _like(v).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
                for v in operands
            ]
            # A layer may write into what it is given, which it could not if these were leaves.
            fakes = [v.clone() if i in written else v for i, v in enumerate(leaves)]
            take_leaves(Runner(layer.reference, call)(fakes), results)
            results += [fakes[i] for i in written]
    except Exception:  # native code, say
        return None
    return tuple(result.requires_grad for result in results)


def _attempt(forward: Callable[..., Any], call: Call, operands: Sequence[Any]) -> Told | None:
    try:
        return run_on_fakes(Runner(forward, call), operands)
    except _DependsOnValues:
        return None
    except UnsupportedValue:
        raise
    except Exception:  # native code, say
        return None


def describe_output(output: Template) -> str:
    """A template in words."""
    kind, body = output
    if kind == "leaf":
        return "a tensor"
    if kind == "const":
        return repr(body)
    if kind == "dict":
        inside = ", ".join(f"{key!r}: {describe_output(part)}" for key, part in body)
        return f"a dict {{{inside}}}"
    return f"a {kind} of {len(body)} ({', '.join(map(describe_output, body))})"
