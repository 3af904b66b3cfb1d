"""Ops that a pickled graph calls, made again in the process that loads it.

A graph module pickles as its code, in which an op is a name. So that the name means something in
another process, the graph module carries, in its ``meta``, what each of its ops was made from;
torch unpickles that before it runs the code. Names hold the kernel's commit and the code of the
layer: an op that comes out under another name is another op, and an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

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
"""In the ``meta`` of a graph module: its `SavedOp`, by name."""


@dataclass(frozen=True)
class SavedOp:
    """What an op was made from."""

    name: str
    kernel: str
    """For people."""
    cls: type[nn.Module]
    selection: Selection
    target: Target
    mode: Mode
    call: Call
    forms: tuple[Any, ...]
    """Of the operands it was made for: a number, or the arguments of ``torch.empty_strided``."""
    gradient: Gradient | None

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedOp:
        return self

    def __reduce__(self) -> Any:
        return _load, tuple(getattr(self, field.name) for field in fields(self))


def save_op(
    graph_module: fx.GraphModule,
    name: str,
    kernel: Kernel,
    cls: type[nn.Module],
    target: Target,
    mode: Mode,
    call: Call,
    operands: Sequence[Any],
    *,
    gradient: Gradient | None,
) -> None:
    """Have ``graph_module`` carry what one of its ops was made from."""
    ops = graph_module.meta.setdefault(_OPS, {})
    if name not in ops:
        forms = tuple(map(_form, operands))
        selection = kernel.selection
        ops[name] = SavedOp(name, str(kernel), cls, selection, target, mode, call, forms, gradient)


def _form(operand: Any) -> Any:
    if isinstance(operand, Tensor):
        size, stride = map(_torch.hint, operand.shape), map(_torch.hint, operand.stride())
        return tuple(size), tuple(stride), operand.dtype, operand.device
    return _torch.hint(operand)


def _load(*values: Any) -> SavedOp:
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
    if (layer := extensible(saved.cls)) is None:
        raise TypeError(f"class {saved.cls.__qualname__} is not extensible in this process")
    outcome = decide_again(layer, saved.selection, saved.target, saved.mode)
    if isinstance(outcome, Rejection):
        raise ValueError(because(outcome.reason, outcome.detail))
    with _torch.running_on(_torch.fake_mode_for(())):
        operands = [
            torch.empty_strided(form[0], form[1], dtype=form[2], device=form[3])
            if isinstance(form, tuple)
            else form
            for form in saved.forms
        ]
    return lower(outcome, layer, saved.call, operands, gradient=saved.gradient).name
