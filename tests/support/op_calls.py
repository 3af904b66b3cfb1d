"""Calls of toy layers, lowered to ops by hand, as capture and the FX pass do in a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from kernelgraph.builds import Origin, origin_of
from kernelgraph.graph.calls.call import Call
from kernelgraph.graph.calls.state import State
from kernelgraph.graph.calls.trees import read
from kernelgraph.graph.gradients.gradient import (
    Gradient,
    Overwrites,
    OwnBackward,
    Source,
    SourceKind,
    wanted_of,
)
from kernelgraph.graph.ops import registry
from kernelgraph.graph.ops.definition import overload, pack
from kernelgraph.graph.ops.forward import Body
from kernelgraph.graph.ops.registry import Lowered, lower
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible, extensible
from kernelgraph.selection import Device, Mode, Selection
from tests.support.toy_models import Repository


def own_backward(
    operands: Sequence[int] = (),
    results: Sequence[int] = (),
    flows: tuple[bool, ...] = (True,),
    hidden_saves: bool = False,
    overwrites: Overwrites = Overwrites(),  # noqa: B008 (it is immutable)
) -> OwnBackward:
    """Return an `OwnBackward` that saves these operands and results."""
    sources = [Source(SourceKind.OPERAND, i) for i in operands]
    sources += [Source(SourceKind.RESULT, i) for i in results]
    return OwnBackward(tuple(sources), flows, hidden_saves, overwrites)


def layer_of(module: nn.Module, fake: Callable[..., Any] | None = None) -> Extensible:
    """Return how the class of ``module`` is extensible, whether or not it was made so."""
    return extensible(type(module)) or Extensible(type(module), type(module).__name__, fake=fake)


def kernel_of(cls: type[nn.Module], revision: str | None = None, name: str = "toys") -> Kernel:
    """Return a kernel that is ``cls``: in repository ``name``, if it has a ``revision``."""
    origin = origin_of(cls)
    if revision is not None:
        origin = Origin(f"org/{name}", name, revision, "torch-universal")
    return Kernel(cls, origin, Selection(Repository(cls), Mode.FALLBACK, Device("cpu")))


def call_of(
    module: nn.Module, *args: Any, forward: Callable[..., Any] | None = None, **kwargs: Any
) -> tuple[Call, list[Any]]:
    """Return the signature of ``module(*args, **kwargs)`` and its operands."""
    layer = layer_of(module)
    state = State.of(module, [layer.reference, *([forward] if forward else [])])
    values = [read(module, path) for path in state.tensors]
    return Call.of(state, values, layer, args, kwargs)


@dataclass
class Op:
    """The op of a call, with the call's operands."""

    lowered: Lowered
    call: Call
    operands: list[Any]

    @property
    def overload(self) -> Any:
        return overload(self.lowered.name)

    def __call__(self, *operands: Any) -> Any:
        """Run the op and return what the layer would; by default on the call's operands."""
        operands = operands or tuple(self.operands)
        results = self.overload(*pack(operands, self.lowered.packed))
        results = (results,) if isinstance(results, Tensor) else results
        count = len(self.lowered.results)
        for i, value in zip(self.lowered.written, results[count:]):  # noqa: B905 (more follow)
            operands[i].copy_(value)
        return self.lowered.output.unflatten(results)


def lowered(
    module: nn.Module,
    kernel: type[nn.Module] | Kernel,
    *args: Any,
    training: bool = False,
    own: OwnBackward | None = None,
    every: bool = True,
    fake: Callable[..., Any] | None = None,
    mode: FakeTensorMode | None = None,
    path: str | None = None,
    **kwargs: Any,
) -> Op:
    """Return the op for ``module(*args, **kwargs)``.

    Args:
        module: The layer.
        kernel: The kernel that stands in for it.
        args, kwargs: The arguments of the call.
        training: Whether the op is for training, with the gradient of the reference.
        own: How to run the kernel's own backward, for an op for training with that.
        every: Whether there is a gradient of every operand, or only of those that require one now.
        fake: The layer's shape function.
        mode: The fake mode to lower in.
        path: The path of the layer in its model.
    """
    if isinstance(kernel, type):
        kernel = kernel_of(kernel)
    layer = layer_of(module, fake)
    call, operands = call_of(module, *args, forward=kernel.forward, **kwargs)
    mode = mode or FakeTensorMode()
    fakes = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in operands]
    with mode, enable_python_dispatcher():
        place = None if path is None else (module, path)
        gradient = Gradient(wanted_of(fakes, every=every), own) if training or own else None
        made = lower(kernel, layer, call, fakes, gradient=gradient, place=place)
        return Op(made, call, operands)


def body_of(op: Op) -> Body:
    """Return the body of an op."""
    return registry._bodies[op.lowered.name]
