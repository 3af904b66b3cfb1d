"""Makes the ops of a pickled graph again in the process that loads it.

A graph module pickles as its code, in which an op is only a name. To give the name a meaning in
another process, the graph module has in its ``meta`` what each of its ops was made from. torch
unpickles that before it runs the code. An op's name contains the kernel's commit and the code of
the layer, so if the op that is made again has another name, it is another op: that is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call
from kernelgraph.graph.gradients import Gradient
from kernelgraph.graph.ops import NAMESPACE, lower
from kernelgraph.kernel import Kernel, decide_again
from kernelgraph.layers import extensible
from kernelgraph.report import because
from kernelgraph.selection import Mode, Rejection, Selection, Target

_OPS = "kernelgraph_ops"
"""The key in the ``meta`` of a graph module for its `SavedOp` objects, by name."""


class TensorLayout(NamedTuple):
    """The arguments of ``torch.empty_strided`` for a tensor like an operand."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class SavedOp:
    """The parts that an op was made from."""

    name: str
    kernel: str
    """The kernel, for error messages."""
    cls: type[nn.Module]
    """The class of the layer."""
    selection: Selection
    target: Target
    mode: Mode
    call: Call
    operands: tuple[TensorLayout | float, ...]
    """The operands that it was made for: layouts of tensors, and numbers."""
    gradient: Gradient | None

    def __deepcopy__(self, memo: dict[int, object]) -> SavedOp:
        return self

    def __reduce__(self) -> tuple[Callable[..., SavedOp], tuple[object, ...]]:
        return _load, tuple(getattr(self, field.name) for field in fields(self))


def save_op(
    graph_module: fx.GraphModule,
    name: str,
    kernel: Kernel,
    cls: type[nn.Module],
    target: Target,
    mode: Mode,
    call: Call,
    operands: Sequence[object],
    *,
    gradient: Gradient | None,
) -> None:
    """Store in ``graph_module`` what one of its ops was made from."""
    ops = graph_module.meta.setdefault(_OPS, {})
    if name not in ops:
        ops[name] = SavedOp(
            name,
            str(kernel),
            cls,
            kernel.selection,
            target,
            mode,
            call,
            tuple(map(_described, operands)),
            gradient,
        )


def _described(operand: object) -> TensorLayout | float:
    """Return the layout of a tensor, or the value of a number."""
    if isinstance(operand, Tensor):
        size, stride = map(_torch.hint, operand.shape), map(_torch.hint, operand.stride())
        return TensorLayout(tuple(size), tuple(stride), operand.dtype, operand.device)
    number: float = _torch.hint(operand)
    return number


def _load(*values: Any) -> SavedOp:
    """Return a `SavedOp`, and register its op if this process does not have it."""
    saved = SavedOp(*values)
    if not hasattr(getattr(torch.ops, NAMESPACE), saved.name):
        head = f"the graph calls op {NAMESPACE}::{saved.name} of kernel {saved.kernel}"
        try:
            made = _make(saved)
        except Exception as error:
            raise RuntimeError(
                f"{head}, which cannot be made here: {type(error).__name__}: {error}"
            ) from error
        if made != saved.name:
            raise RuntimeError(
                f"{head}, and here it would be {made}: the kernel or the layer is another one "
                "than it was. Trace the model and rewrite it anew"
            )
    return saved


def _make(saved: SavedOp) -> str:
    """Register the op that its parts make in this process, and return its name."""
    if (layer := extensible(saved.cls)) is None:
        raise TypeError(f"class {saved.cls.__qualname__} is not extensible in this process")
    kernel = decide_again(layer, saved.selection, saved.target, saved.mode)
    if isinstance(kernel, Rejection):
        raise ValueError(because(kernel.reason, kernel.detail))
    with _torch.running_on(_torch.fake_mode_for(())):
        operands = [
            torch.empty_strided(o.size, o.stride, dtype=o.dtype, device=o.device)
            if isinstance(o, TensorLayout)
            else o
            for o in saved.operands
        ]
    return lower(kernel, layer, saved.call, operands, gradient=saved.gradient).name
