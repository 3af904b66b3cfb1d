"""Sample inputs: operands with made-up values, to run a layer before its inputs exist."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernelgraph.graph import _torch

UNKNOWN = 8
"""The size used in place of a data-dependent size, which has no hint."""

_FILLED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextlib.contextmanager
def apart(operands: Sequence[object], seed: int | None = None) -> Iterator[None]:
    """Run code on real tensors in the middle of a trace, without a trace of it afterwards.

    No gradient is recorded, and the random generators of the CPU and of the devices of ``operands``
    are restored. A backward runs in this thread and not in the device's: it may compile, and this
    thread holds the compile lock while it traces.

    Args:
        operands: The tensors whose devices the code uses.
        seed: A seed for the generators; by default they continue.
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


def measures(value: object) -> tuple[object, ...]:
    """Return the sizes and strides of a tensor; for a number, the number."""
    if not isinstance(value, Tensor):
        return (value,)
    return (*value.shape, *(value.stride() if value.layout is torch.strided else ()))


def measures_now(value: object) -> tuple[object, ...]:
    """Return `measures` with the values that symbols have in the traced call."""
    return tuple(map(_torch.hint, measures(value)))


def sizes_now(operands: Sequence[object]) -> dict[object, int]:
    """Return the values that the symbols in sizes and numbers have in the traced call."""
    hints = _torch.hints(n for value in operands for n in measures(value))
    return {symbol: UNKNOWN if hint is None else hint for symbol, hint in hints.items()}


class StridedSpec(NamedTuple):
    """Sizes, strides, dtype and device of a strided tensor."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def reach(self) -> int:
        """The number of elements of memory from the first to the last."""
        if 0 in self.sizes:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))


def forms(operands: Sequence[object], size: Callable[[object], int]) -> list[Any]:
    """Return ``operands`` with a `StridedSpec` for each tensor and a number for each symbol.

    Args:
        operands: Tensors and numbers.
        size: Returns the number to use for a size, a stride or a symbolic number.

    Raises:
        TypeError: If values for a tensor cannot be made up, because it is sparse for example.
    """
    return [_form(value, size) for value in operands]


def _form(value: Any, size: Callable[[object], int]) -> object:
    if not isinstance(value, Tensor):
        return size(value) if isinstance(value, torch.SymInt) else value
    plain = type(value) in (Tensor, nn.Parameter, nn.Buffer) or _torch.is_fake(value)
    if value.layout is not torch.strided or not plain:
        kind = f"{str(value.layout)[6:]} {type(value).__name__}"
        raise TypeError(f"no values can be made up for a {kind}")
    sizes, strides = (tuple(map(size, numbers)) for numbers in (value.shape, value.stride()))
    return StridedSpec(sizes, strides, value.dtype, value.device)


def make(operands: Sequence[object], seed: int, *, bools: bool = False) -> list[Any]:
    """Return ``operands`` with a tensor for each `StridedSpec`.

    Floats are normally distributed. Integers are zeros, the one index that is always in range.
    Bools are random with ``bools``, else False.

    Args:
        operands: Forms, and other values, which stay.
        seed: The seed of the random values.
        bools: Whether bools are random.

    Raises:
        Exception: What torch raises where it cannot make a tensor of a dtype or on a device.
    """
    generators: dict[torch.device, torch.Generator] = {}
    made: list[Any] = []
    for value in operands:
        if isinstance(value, StridedSpec):
            if value.device not in generators:
                generator = torch.Generator(value.device)
                generators[value.device] = generator.manual_seed(seed)
            memory = _memory(value, generators[value.device], bools)
            made.append(memory.as_strided(value.sizes, value.strides))
        else:
            made.append(value)
    return made


def _memory(form: StridedSpec, generator: torch.Generator, bools: bool) -> Tensor:
    extent, dtype, device = form.reach, form.dtype, form.device
    if dtype in _FILLED or dtype.is_complex:
        return torch.randn(extent, dtype=dtype, device=device, generator=generator)
    if dtype.is_floating_point:  # eight bits, which randn cannot fill
        return torch.randn(extent, device=device, generator=generator).to(dtype)
    if dtype is torch.bool and bools:
        return torch.randint(2, (extent,), device=device, generator=generator).bool()
    return torch.zeros(extent, dtype=dtype, device=device)
