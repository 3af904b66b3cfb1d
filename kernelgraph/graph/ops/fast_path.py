"""The fast path of an op: the generated function that runs at every call.

The first call with operands of some sizes is checked in full, and leaves a `CheckedCall` in a
table. Each later call with operands of the same sizes only compares its results with that record.
This comparison is all that an op costs over its kernel, so it is straight-line code, written for
the signature of the call. For a norm whose one result does not go through autograd it reads::

    def generated(a0, a1, a2):
        if is_grad_enabled():
            with no_grad():
                return again(a0, a1, a2, )
        key = (a0.shape, a1.shape, a2, )
        checked = table.get(key)
        if checked is None:
            return check(key, (a0, a1, a2, ))
        (s0, ), (q0, ), (n0, n1, ), (m0, ) = checked
        ...  # the call, see `Runner`
        if (type(result) is Tensor and result.shape == s0 and result.dtype is t0
                and result.stride() == q0 and not result.storage_offset()
                and not result.requires_grad):
            p0 = result.data_ptr()
            if p0 and not (
                p0 % 16 or 0 <= p0 - a0.data_ptr() < n0 or 0 <= p0 - a1.data_ptr() < n1
            ):
                return result
        return conform(result, checked, (a0, a1, a2, ))
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from kernelgraph.graph.calls import Leaf, Parts, Runner, Template, tuple_of
from kernelgraph.graph.infer import ALIGNMENT

Operand: TypeAlias = Any
"""The value of an operand: a tensor where `Call.tensors` lists it, else a number. (Any, and not
the union: which one it is depends on the signature of the call, as no type can say.)"""

OpResult: TypeAlias = "Tensor | tuple[Tensor, ...]"
"""The results of an op: the tensor itself where there is only one."""

OpFunction: TypeAlias = "Callable[..., object]"
"""A function behind an op: takes the operands of a call and returns an `OpResult`."""


class CheckedCall(NamedTuple):
    """The record of a fully checked call, for later calls with operands of the same sizes."""

    sizes: tuple[torch.Size | None, ...]
    """The sizes of the results; None where they cannot be inferred."""
    strides: tuple[tuple[int, ...], ...] = ()
    """The strides of the results; empty where their sizes cannot be inferred."""
    spans: tuple[int, ...] = ()
    """The number of bytes that each operand reaches over, of those that no result may share
    memory with."""
    lengths: tuple[int, ...] = ()
    """The number of bytes of each result; 0 where its size cannot be inferred."""


def write_fast_path(
    runner: Runner,
    output: Template,
    dtypes: Sequence[torch.dtype],
    unshared: Sequence[int],
    *,
    differentiable: bool,
    table: dict[object, CheckedCall],
    check: Callable[[object, tuple[Operand, ...]], OpResult],
    conform: Callable[[object, CheckedCall, tuple[Operand, ...]], OpResult],
    fail: Callable[[Exception, tuple[Operand, ...]], NoReturn],
) -> OpFunction:
    """Write the function of an op: it runs the kernel below autograd and returns its results.

    Its tests miss memory that is shared depending on the data and not on the sizes.

    Args:
        runner: Calls the kernel.
        output: The structure of what the kernel returns.
        dtypes: The dtypes of the tensors in it.
        unshared: The operands that no result may share memory with.
        differentiable: Whether the results go through autograd, which forbids views.
        table: The checked calls, by the sizes of their operands.
        check: ``(key, operands)``: makes a call that is not in the table, with all checks.
        conform: ``(result, checked, operands)``: copies a result that does not conform, or raises.
        fail: ``(error, operands)``: raises the error that an error of the kernel becomes.
    """
    operands = runner.operands
    every = tuple_of(operands)
    tensors = runner.call.tensors
    key = tuple_of(f"{a}.shape" if i in tensors else a for i, a in enumerate(operands))
    before = _LOOK_UP.format(operands=every, key=key)
    after = _quick_return(output, dtypes, [operands[i] for i in unshared], differentiable)
    after += f"return conform(result, checked, {every})"

    def again(*operands: Operand) -> object:
        return written(*operands)

    names: dict[str, object] = {
        "Tensor": Tensor,
        "is_grad_enabled": torch.is_grad_enabled,
        "no_grad": torch.no_grad,
        "again": again,
        "table": table,
        "check": check,
        "conform": conform,
        "fail": fail,
        **{f"t{k}": dtype for k, dtype in enumerate(dtypes)},
    }
    written: OpFunction = runner.around(
        before.splitlines(), f"fail(error, {every})", after.splitlines(), names
    )
    return written


_LOOK_UP = """\
if is_grad_enabled():
    with no_grad():
        return again{operands}
key = {key}
checked = table.get(key)
if checked is None:
    return check(key, {operands})
"""

_RETURN_CONFORMING = """\
{sizes}, {strides}, {spans}, {lengths} = checked
if {conforming}:
{addresses}
    if {present} and not ({misplaced}):
        return {returned}
"""

_UNPACK = """\
if type(result) is {cls} and len(result) == {count}:
    {results} = result
{then}"""


def _quick_return(
    output: Template, dtypes: Sequence[torch.dtype], unshared: Sequence[str], differentiable: bool
) -> str:
    """Write code that returns ``result`` if a few cheap tests show that it conforms."""
    several = (
        isinstance(output, Parts)
        and output.cls in (tuple, list)
        and all(isinstance(part, Leaf) for part in output.parts)
    )
    # The memory of complex numbers may hold their conjugates, to be resolved.
    if not (several or isinstance(output, Leaf)) or any(dtype.is_complex for dtype in dtypes):
        return ""
    count = len(dtypes)
    results = [f"r{k}" for k in range(count)] if several else ["result"]
    code = _RETURN_CONFORMING.format(
        sizes=tuple_of(f"s{k}" for k in range(count)),
        strides=tuple_of(f"q{k}" for k in range(count)),
        spans=tuple_of(f"n{i}" for i in range(len(unshared))),
        lengths=tuple_of(f"m{k}" for k in range(count)),
        conforming=" and ".join(_conforming_tests(results, differentiable)),
        addresses="\n".join(f"    p{k} = {r}.data_ptr()" for k, r in enumerate(results)),
        present=" and ".join(f"p{k}" for k in range(count)),  # an empty tensor has address 0
        misplaced=" or ".join(_misplaced_tests(count, unshared)),
        returned=results[0] if count == 1 else f"({', '.join(results)})",
    )
    if not isinstance(output, Parts):
        return code
    cls, then = output.cls.__name__, textwrap.indent(code, "    ")
    return _UNPACK.format(cls=cls, count=count, results=tuple_of(results), then=then)


def _conforming_tests(results: Sequence[str], differentiable: bool) -> list[str]:
    """Expressions that are all true if the results have the expected type, sizes and layout."""
    tests = []
    for k, r in enumerate(results):
        tests += [f"type({r}) is Tensor", f"{r}.shape == s{k}", f"{r}.dtype is t{k}"]
        # Imaginary parts, which may be yet to be negated, are never the first in their storage.
        tests += [f"{r}.stride() == q{k}", f"not {r}.storage_offset()", f"not {r}.requires_grad"]
        tests += [f"not {r}._is_view()"] if differentiable else []
    return tests


def _misplaced_tests(count: int, unshared: Sequence[str]) -> list[str]:
    """Expressions of which one is true if a result is not aligned, or shares memory with an
    operand or with another result."""
    tests = [f"p{k} % {ALIGNMENT}" for k in range(count)]
    tests += [
        f"0 <= p{k} - {a}.data_ptr() < n{i}" for k in range(count) for i, a in enumerate(unshared)
    ]
    for k in range(count):
        for j in range(k):
            tests += [f"0 <= p{k} - p{j} < m{j}", f"0 <= p{j} - p{k} < m{k}"]
    return tests
