"""Operands made up after the form of others: to run a layer before its inputs are there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernelgraph.graph import _torch

UNKNOWN = 8
"""A size that depends on values, for want of a hint."""

_FILLED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextlib.contextmanager
def apart(operands: Sequence[Any], seed: int | None = None) -> Iterator[None]:
    """Run code for real in the middle of a trace, and leave nothing of it behind.

    No gradient is recorded, and the random numbers that it draws, on the CPU and on the devices
    of ``operands``, are drawn again by whoever comes next. A backward runs in this thread, not in
    the device's: it may compile, and this thread has the lock of compilers while it traces.

    Args:
        operands: What the code works on.
        seed: Of the random numbers there; by default they go on.
    """
    devices = {v.device for v in operands if isinstance(v, Tensor)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_torch.for_real())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in ("cuda", "xpu"):
            indices = sorted({device.index or 0 for device in devices if device.type == kind})
            if indices:
                stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
                for index in indices if seed is not None else ():
                    module = getattr(torch, kind)
                    with module.device(index):
                        module.manual_seed(seed)
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


def measures(value: Any) -> tuple[Any, ...]:
    """The sizes and strides of a tensor; a number itself."""
    if not isinstance(value, Tensor):
        return (value,)
    return (*value.shape, *(value.stride() if value.layout is torch.strided else ()))


def measures_now(value: Any) -> tuple[Any, ...]:
    """`measures`, with what symbols are in the call that is traced."""
    return tuple(map(_torch.hint, measures(value)))


def sizes_now(operands: Sequence[Any]) -> dict[Any, int]:
    """What the symbols in sizes and numbers are in the call that is traced."""
    hints = _torch.hints(n for value in operands for n in measures(value))
    return {symbol: UNKNOWN if hint is None else hint for symbol, hint in hints.items()}


class Form(NamedTuple):
    """All of a tensor but its values."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def reach(self) -> int:
        """How many elements of memory there are from the first to the last."""
        if 0 in self.sizes:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))


def forms(operands: Sequence[Any], size: Callable[[Any], int]) -> list[Any]:
    """``operands`` with forms for tensors, and numbers for symbols.

    Args:
        operands: Tensors and numbers.
        size: What a size, a stride or a symbolic number is to be.

    Raises:
        TypeError: If a tensor is of a kind that cannot be made up.
    """
    return [_form(value, size) for value in operands]


def _form(value: Any, size: Callable[[Any], int]) -> Any:
    if not isinstance(value, Tensor):
        return size(value) if isinstance(value, torch.SymInt) else value
    plain = type(value) in (Tensor, nn.Parameter, nn.Buffer) or _torch.is_fake(value)
    if value.layout is not torch.strided or not plain:
        kind = f"{str(value.layout)[6:]} {type(value).__name__}"
        raise TypeError(f"no values can be made up for a {kind}")
    sizes, strides = (tuple(map(size, numbers)) for numbers in (value.shape, value.stride()))
    return Form(sizes, strides, value.dtype, value.device)


def make(operands: Sequence[Any], seed: int, *, bools: bool = False) -> list[Any]:
    """``operands`` with tensors for forms.

    Floats are drawn from a normal distribution; integers are zeros, which are in range as an
    index wherever anything is; bools are drawn with ``bools``, else False.

    Args:
        operands: Forms, and whatever else.
        seed: Other values for another seed, the same for the same.
        bools: See above.

    Raises:
        Exception: What torch raises where it cannot make a tensor of a dtype or on a device.
    """
    generators: dict[torch.device, torch.Generator] = {}
    made: list[Any] = []
    for value in operands:
        if isinstance(value, Form):
            if value.device not in generators:
                generator = torch.Generator(value.device)
                generators[value.device] = generator.manual_seed(seed)
            memory = _memory(value, generators[value.device], bools)
            made.append(memory.as_strided(value.sizes, value.strides))
        else:
            made.append(value)
    return made


def _memory(form: Form, generator: torch.Generator, bools: bool) -> Tensor:
    extent, dtype, device = form.reach, form.dtype, form.device
    if dtype in _FILLED or dtype.is_complex:
        return torch.randn(extent, dtype=dtype, device=device, generator=generator)
    if dtype.is_floating_point:  # of eight bits
        return torch.randn(extent, device=device, generator=generator).to(dtype)
    if dtype is torch.bool and bools:
        return torch.randint(2, (extent,), device=device, generator=generator).bool()
    return torch.zeros(extent, dtype=dtype, device=device)
