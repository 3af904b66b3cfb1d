"""Fake tensors and their modes, and running code on real tensors in the middle of a trace."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch._subclasses.fake_tensor import is_fake as is_fake
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

from kernelgraph.graph._torch.symbols import hint


def is_functional(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a wrapper that functionalization makes. Tried on 2.13."""
    return isinstance(tensor, FunctionalTensor) or torch._is_functional_tensor(tensor)


@contextlib.contextmanager
def for_real() -> Iterator[None]:
    """Run code on real tensors in the middle of a trace, as if nothing were being traced.

    The tracing context is hidden too, since the code may compile something itself. Tried on 2.11,
    2.13, 2.14.
    """
    with tracing(None), _disable_current_modes(), no_python_dispatcher():
        yield


@contextlib.contextmanager
def out_of_export() -> Iterator[None]:
    """Run code in the middle of a non-strict export without the export recording it.

    Export records every change of the grad mode, for example. Tried on 2.11, 2.13, 2.14.
    """
    with for_real(), torch._C.DisableTorchFunction():
        yield


@contextlib.contextmanager
def running_on(mode: FakeTensorMode) -> Iterator[None]:
    """Run code on fakes of ``mode``. Tried on 2.11, 2.13, 2.14."""
    with mode, enable_python_dispatcher():
        yield


@contextlib.contextmanager
def no_data_pointers() -> Iterator[None]:
    """Make fakes of the active mode raise an error where code asks for their memory.

    Native code would otherwise receive a null pointer, which is undefined behaviour. Tried on 2.11,
    2.13, 2.14.
    """
    mode: Any = detect_fake_mode()
    allowed = mode._allow_unsafe_data_ptr_access
    mode._allow_unsafe_data_ptr_access = False
    try:
        yield
    finally:
        mode._allow_unsafe_data_ptr_access = allowed


@contextlib.contextmanager
def fakes_apart(like: list[torch.Tensor]) -> Iterator[None]:
    """Run code on fakes of a separate mode, whose sizes may be symbols of the fakes in ``like``.

    The mode that is tracing is not used, because a kernel that starts threads, for example, may
    leave it unusable. Asking such a fake for its memory raises. Tried on 2.11, 2.13, 2.14.
    """
    mode: Any = detect_fake_mode(like)
    # Fakes of other layouts cannot be recreated in another mode.
    if all(tensor.layout is torch.strided for tensor in like):
        # An environment of its own is for sizes that depend on values.
        env = getattr(mode, "shape_env", None) or ShapeEnv()
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)
    with for_real(), running_on(mode), no_data_pointers():
        yield


def fake_mode_for(values: Sequence[Any]) -> FakeTensorMode:
    """Return the mode of the fakes among ``values``, or a new one that supports data-dependent
    sizes. Tried on 2.11, 2.13, 2.14."""
    found: FakeTensorMode | None = detect_fake_mode(list(values))
    return found or FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def to_fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """Return a fake of ``mode`` with the sizes of ``tensor``; a fake itself unchanged. Tried on
    2.11, 2.13, 2.14."""
    return mode.from_tensor(tensor, static_shapes=True)


def fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a deep copy of ``module`` with fakes for tensors. Tried on 2.11, 2.13, 2.14."""
    with FakeCopyMode(mode):
        return copy.deepcopy(module)


def symbolic_like(
    operands: Sequence[object], everything: bool
) -> tuple[list[object], dict[sympy.Symbol, tuple[int, int]], ShapeEnv]:
    """Return fakes like ``operands``, of a separate mode, whose sizes are symbols.

    Symbols are not merged because they are equal in this call, nor specialized because they are 0
    or 1 in it. Tried on 2.11, 2.13, 2.14.

    Args:
        operands: Tensors and numbers.
        everything: Whether every size of every tensor becomes a symbol, or only the sizes and
            ints that are symbolic.

    Returns:
        The fakes; for each symbol the number of its operand and the dimension (0 for an int); and
        the environment that records guards.
    """
    env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
    places: dict[sympy.Symbol, tuple[int, int]] = {}

    def symbol(value: object, operand: int, dim: int) -> Any:
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
    """Return the strides for ``sizes`` in the memory order of ``tensor`` if that is dense, else
    the strides of ``tensor``."""
    now = [int(hint(n)) for n in tensor.stride()]
    order = sorted(range(len(now)), key=lambda dim: (now[dim], -dim))
    strides: list[Any] = [None] * len(now)
    step: object = 1
    dense = 1
    for dim in order:
        size = int(hint(tensor.shape[dim]))
        if size > 1 and now[dim] != dense:
            return now
        strides[dim], step, dense = step, step * sizes[dim], dense * max(size, 1)
    return strides


def fakes_for_export(operands: Sequence[object]) -> list[object]:
    """Return fakes like ``operands`` for ``torch.export`` to use as example inputs.

    Symbolic sizes become their values in this call. Tried on 2.11, 2.13, 2.14.
    """
    env = ShapeEnv(tracked_fakes=[])

    def fake(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return hint(value)
        size, stride = map(hint, value.shape), map(hint, value.stride())
        made = torch.empty_strided(
            tuple(size), tuple(stride), dtype=value.dtype, device=value.device
        )
        return made.requires_grad_(value.requires_grad)

    with for_real(), FakeTensorMode(shape_env=env, allow_non_fake_inputs=True):
        return [fake(value) for value in operands]
