"""The steady state of an op: what runs at every call but the first with operands of some sizes.

It is one function, written for the form of the call, because it is all that an op costs over its
kernel. For a norm whose one result goes through no autograd it reads::

    def written(a0, a1, a2):
        if is_grad_enabled():
            with no_grad():
                return again(a0, a1, a2, )
        form = (a0.shape, a1.shape, a2, )
        known = table.get(form)
        if known is None:
            return checked(form, (a0, a1, a2, ))
        (s0, ), (n0, n1, ), (m0, ) = known
        ...  # the call, see `Runner`
        if (type(result) is Tensor and result.shape == s0 and result.dtype is t0
                and result.is_contiguous() and not result.storage_offset()
                and not result.requires_grad):
            p0 = result.data_ptr()
            if p0 and not (
                p0 % 16 or 0 <= p0 - a0.data_ptr() < n0 or 0 <= p0 - a1.data_ptr() < n1
            ):
                return result
        return fitted(result, known, (a0, a1, a2, ))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraph.graph.calls import Leaf, Parts, Runner, Template, tuple_of
from kernelgraph.graph.infer import ALIGNMENT


class Known(NamedTuple):
    """What the first call with operands of some sizes tells of those that follow."""

    sizes: tuple[Any, ...]
    """The results' sizes; None where they cannot be told."""
    spans: tuple[int, ...] = ()
    """How many bytes each operand reaches over that no result may share memory with."""
    lengths: tuple[int, ...] = ()
    """How many bytes each result has; 0 where that cannot be told."""


def steady_state(
    runner: Runner,
    output: Template,
    dtypes: Sequence[torch.dtype],
    lent: Sequence[int],
    *,
    differentiable: bool,
    table: dict[Any, Known],
    checked: Callable[..., Any],
    fitted: Callable[..., Any],
    failed: Callable[..., Any],
) -> Callable[..., Any]:
    """The function of an op: its kernel, below autograd, with results that fit.

    What its tests miss is shared memory that comes and goes with the data, and not the sizes.

    Args:
        runner: Calls the kernel.
        output: What the kernel returns.
        dtypes: Those of its tensors.
        lent: The operands that no result may share memory with.
        differentiable: Whether the results go through autograd, which wants no views.
        table: What is known of a form of call, by the sizes of its operands.
        checked: ``(form, operands)``: makes a call of which nothing is known.
        fitted: ``(result, known, operands)``: makes a result fit, or raises.
        failed: ``(error, operands)``: raises what an error of the kernel is to become.
    """
    operands = runner.operands
    every = tuple_of(operands)
    tensors = runner.call.tensors
    form = tuple_of(f"{a}.shape" if i in tensors else a for i, a in enumerate(operands))
    before = [
        "if is_grad_enabled():",
        "    with no_grad():",
        f"        return again{every}",
        f"form = {form}",
        "known = table.get(form)",
        "if known is None:",
        f"    return checked(form, {every})",
    ]
    after = [
        *_quick_return(output, dtypes, [operands[i] for i in lent], differentiable),
        f"return fitted(result, known, {every})",
    ]
    names: dict[str, Any] = {f"t{k}": dtype for k, dtype in enumerate(dtypes)}
    names |= {"table": table, "checked": checked, "fitted": fitted, "failed": failed}
    names |= {"is_grad_enabled": torch.is_grad_enabled, "no_grad": torch.no_grad, "Tensor": Tensor}
    names["again"] = lambda *given: written(*given)
    written: Callable[..., Any] = runner.around(before, f"failed(error, {every})", after, names)
    return written


def _quick_return(
    output: Template, dtypes: Sequence[torch.dtype], lent: Sequence[str], differentiable: bool
) -> list[str]:
    """Lines that return ``result`` if a glance tells that it fits."""
    several = (
        isinstance(output, Parts)
        and output.cls in (tuple, list)
        and all(isinstance(part, Leaf) for part in output.parts)
    )
    # The memory of complex numbers may hold their conjugates, to be resolved.
    if not (several or isinstance(output, Leaf)) or any(dtype.is_complex for dtype in dtypes):
        return []
    results = [f"r{k}" for k in range(len(dtypes))] if several else ["result"]
    fits = []
    for k, r in enumerate(results):
        fits += [f"type({r}) is Tensor", f"{r}.shape == s{k}", f"{r}.dtype is t{k}"]
        # Imaginary parts, which may be yet to be negated, are never the first in their storage.
        fits += [f"{r}.is_contiguous()", f"not {r}.storage_offset()", f"not {r}.requires_grad"]
        fits += [f"not {r}._is_view()"] if differentiable else []
    misplaced = [f"p{k} % {ALIGNMENT}" for k in range(len(results))]
    shared = [
        f"0 <= p{k} - {a}.data_ptr() < n{i}"
        for k in range(len(results))
        for i, a in enumerate(lent)
    ]
    for k in range(len(results)):
        for j in range(k):
            shared += [f"0 <= p{k} - p{j} < m{j}", f"0 <= p{j} - p{k} < m{k}"]
    there = " and ".join(f"p{k}" for k in range(len(results)))  # an empty one is nowhere
    given = results[0] if len(results) == 1 else f"({', '.join(results)})"
    lines = [
        f"{tuple_of(f's{k}' for k in range(len(results)))}, "
        f"{tuple_of(f'n{i}' for i in range(len(lent)))}, "
        f"{tuple_of(f'm{k}' for k in range(len(results)))} = known",
        f"if {' and '.join(fits)}:",
        *(f"    p{k} = {r}.data_ptr()" for k, r in enumerate(results)),
        f"    if {there} and not ({' or '.join(misplaced + shared)}):",
        f"        return {given}",
    ]
    if not isinstance(output, Parts):
        return lines
    test = f"if type(result) is {output.cls.__name__} and len(result) == {len(results)}:"
    return [test, *(f"    {line}" for line in [f"{tuple_of(results)} = result", *lines])]
