"""Operands to try a call with before it runs: the layer's own weights, and sample inputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, flatten_tensors, read
from kernelgraph.graph.infer import sample_inputs
from kernelgraph.graph.infer.sample_inputs import StridedSpec
from kernelgraph.selection import device_name


class Operands:
    """Makes operands for runs of one call; equal seeds give equal operands.

    Args:
        call: The signature of the call.
        operands: The operands of the call; they may be fakes, and their values are not used.
        module: The layer. Its weights are used where they are real tensors.
        trial: Whether the runs are to test how the kernel computes, and not this very call: at
            `reduced` sizes, and with `disturbed` parameters.

    Raises:
        TypeError: If values for an operand cannot be made up.
    """

    def __init__(
        self, call: Call, operands: Sequence[Any], module: nn.Module, *, trial: bool = False
    ) -> None:
        self.bounds: Mapping[int, int] = {}
        """For operands that are indices, the bound that they stay below (see `index_bounds`)."""
        self.tables: Sequence[int] = ()
        """The operands whose last dimension has two equal halves (see `rotary_tables`)."""
        self._given = operands
        self._trial = trial
        self._weights: dict[int, Tensor] = {}
        self._made_up = list(operands)
        self._first = call.first_state
        for i, path in enumerate(call.state.tensors, self._first):
            value: Tensor = read(module, path)
            if not _torch.is_fake(value) and value.device.type != "meta":
                self._weights[i] = value
                self._made_up[i] = None
        known = sample_inputs.sizes_now(operands)

        def size(value: object) -> Any:
            return _torch.evaluate(value, known)

        self._made_up = sample_inputs.forms(self._made_up, size)
        plain = tuple((*map(size, sample_inputs.measures(v)), *_kind(v)) for v in operands)
        if trial:
            state = [*self._weights.values(), *self._made_up[self._first :]]
            fixed = {n for v in state for n in _sizes(v)}
            fixed |= {n for _, n in call.state.numbers if type(n) is int}
            self._own = self._made_up
            arguments = reduced(self._made_up[: self._first], fixed)
            self._made_up = [*arguments, *self._made_up[self._first :]]
            plain = tuple(plain[i] if v is None else v for i, v in enumerate(self._made_up))
        self.form: tuple[Any, ...] = plain
        """Everything about the operands that `make` returns except the values."""

    def at_own_sizes(self) -> bool:
        """Make all operands at the sizes of the call from now on.

        Returns:
            Whether that changes any size.
        """
        differ = self._made_up != self._own
        self._made_up = self._own
        return differ

    @property
    def tensors(self) -> list[StridedSpec | Tensor]:
        """The forms of the sample inputs, and the weights."""
        return [*(v for v in self._made_up if isinstance(v, StridedSpec)), *self._weights.values()]

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices of the operands."""
        return tuple(sorted({device_name(v.device) for v in self.tensors}))

    def apart(self, seed: int | None = None) -> contextlib.AbstractContextManager[None]:
        """See `sample_inputs.apart`."""
        return sample_inputs.apart(self._given, seed)

    def make(self, seed: int) -> list[Any]:
        """Return the operands for ``seed``."""
        made = sample_inputs.make(self._made_up, seed, bools=True)
        for i in self.tables:
            first, second = _base(made[i]).chunk(2, -1)
            second.copy_(first)
        for i, bound in self.bounds.items():
            made[i] = indices(self._made_up[i], bound, seed)
        for i, form in enumerate(self._made_up[self._first :], self._first):
            if isinstance(form, StridedSpec) and len(form.sizes) > 1 and _is_float(form.dtype):
                made[i].mul_(
                    max(form.sizes[-1], 1) ** -0.5
                )  # about the scale of initialised weights
        for i, weight in self._weights.items():
            own = weight.detach().clone()
            varied = self._trial and isinstance(weight, nn.Parameter) and _is_float(weight.dtype)
            made[i] = disturbed(own, seed + i) if varied else own
        return made

    def rotary_tables(self, wanted: Sequence[bool]) -> list[int]:
        """Return the arguments that may be cosines and sines of a rotary embedding.

        Many kernels assume that the two halves of these are equal. They are floats of which no
        gradient is wanted.
        """
        arguments = list(enumerate(self._made_up[: self._first]))
        forms = [(i, v) for i, v in arguments if isinstance(v, StridedSpec) and not wanted[i]]
        return [i for i, v in forms if _is_float(v.dtype) and v.sizes and v.sizes[-1] % 2 == 0]

    def index_bounds(self, run: Callable[[Sequence[Any]], object]) -> dict[int, int]:
        """Find, for each argument that holds indices, the bound that its values stay below.

        An index out of range kills a process that uses a GPU, and zeros alone do not test a layer
        that chooses among experts. So ``run`` is called on the CPU, where a wrong index raises an
        error. A layer that checks its indices raises for large ones: the bound is the largest size
        whose last index works. A layer that compares indices with those in range, as a loop over
        experts does, returns the same for all others: the bound is the size from which on it does.
        The latter is tried only with several dimensions, since offsets of segments, with one,
        must also be sorted.
        """
        forms = [
            StridedSpec(tuple(v.shape), v.stride(), v.dtype, v.device)
            if isinstance(v, Tensor)
            else v
            for v in (self._weights.get(i, v) for i, v in enumerate(self._made_up))
        ]
        sizes = sorted({n for f in forms for n in _sizes(f) if n > 0}, reverse=True)
        bounds: dict[int, int] = {}

        def returned(operand: int, index: int) -> list[Any] | None:
            made = [_on_cpu(form) for form in forms]
            for i, bound in bounds.items():
                made[i].fill_(bound - 1)
            made[operand].fill_(index)
            try:
                return flatten_tensors(run(made))[0]
            except (IndexError, RuntimeError):
                return None

        for i, form in enumerate(self._made_up[: self._first]):
            if not (isinstance(form, StridedSpec) and form.dtype in _INDICES and form.reach):
                continue
            at = functools.partial(returned, i)
            try:
                if at(0) is None:
                    continue
                above = at(2 * sizes[0] + 1000)
                if above is None:
                    bounds[i] = next(n for n in sizes if at(n - 1) is not None)
                elif len(form.sizes) > 1:
                    last = next((n for n in sizes if not _equal(at(n - 1), above)), None)
                    if last is not None and _equal(at(last), above):
                        bounds[i] = last
            except Exception:  # it does not run on the CPU
                return {}
        return bounds


_INDICES = (torch.int32, torch.int64)


def _equal(some: list[Tensor] | None, others: list[Tensor] | None) -> bool:
    if some is None or others is None:
        return some is others
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _kind(value: Any) -> tuple[Any, ...]:
    return (value.dtype, value.device) if isinstance(value, Tensor) else (type(value),)


def _sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return value.sizes if isinstance(value, StridedSpec) else ()


def _is_float(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point and dtype.itemsize > 1) or dtype.is_complex


def disturbed(weight: Tensor, seed: int) -> Tensor:
    """Add noise of a third of its root mean square to ``weight``, in place.

    The weight of a fresh norm is all ones, which would hide a kernel that does not multiply by it.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    noise = torch.randn(weight.shape, dtype=weight.dtype, device=weight.device, generator=generator)
    size = float(weight.abs().float().square().mean().sqrt()) if weight.numel() else 0.0
    return weight.add_(noise, alpha=0.3 * size or 0.1)


def indices(form: StridedSpec, bound: int, seed: int) -> Tensor:
    """Return random indices below ``bound`` that include ``bound - 1``; distinct in each row, where
    the row is not too long."""
    made: Tensor = sample_inputs.make([form], seed)[0]
    base = _base(made)
    generator = torch.Generator().manual_seed(seed)
    width = base.shape[-1] if base.dim() else 1
    rows = base.numel() // width
    if width <= bound and rows * bound <= 2**24:
        drawn = torch.rand(rows, bound, generator=generator).argsort(-1)[:, :width]
    else:
        drawn = torch.randint(bound, (rows, width), generator=generator)
    drawn = drawn.flatten()
    if not (drawn == bound - 1).any():
        drawn[0] = bound - 1
    base.copy_(drawn.view(base.shape))
    return made


def _base(tensor: Tensor) -> Tensor:
    """Return a view of ``tensor`` without expanded dimensions, which in-place ops refuse."""
    sizes = [1 if s == 0 else n for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(sizes, tensor.stride())


def _on_cpu(value: object) -> Any:
    """Return a CPU tensor like ``value``, with values that do not make results zero."""
    if not isinstance(value, StridedSpec):
        return value
    if not _is_float(value.dtype):
        return torch.zeros(value.sizes, dtype=value.dtype)
    return torch.full(value.sizes, max(value.sizes[-1:], default=1) ** -0.5, dtype=value.dtype)


# --- smaller sizes ----------------------------------------------------------------------------

_SMALL = 8


def reduced(operands: Sequence[Any], fixed: Collection[int]) -> list[Any]:
    """Return forms and numbers like ``operands``, with small sizes.

    A size becomes a small multiple of 4 if it is above 8, not ``fixed``, and not that of a last
    dimension, for which a kernel may be built. Equal sizes stay equal; distinct ones stay distinct
    and in order; broadcast dimensions stay broadcast. A number that equals such a size changes with
    it.
    """
    forms = [v for v in operands if isinstance(v, StridedSpec)]
    kept = {n for f in forms for n in f.sizes[-1:]} | set(fixed)
    free = sorted({n for f in forms for n in f.sizes if n > _SMALL and n not in kept})
    smaller: dict[int, int] = {}
    last = _SMALL
    for size in free:
        last += 4 - last % 4
        while last in kept:
            last += 4
        smaller[size] = last = min(last, size)
    return [_smaller(v, smaller) for v in operands]


def _smaller(value: Any, smaller: Mapping[int, int]) -> Any:
    if not isinstance(value, StridedSpec):
        return smaller.get(value, value) if type(value) is int else value
    sizes = tuple(smaller.get(n, n) for n in value.sizes)
    return value._replace(sizes=sizes, strides=rescaled(value.sizes, value.strides, sizes))


def rescaled(
    sizes: Sequence[int], strides: Sequence[int], others: Sequence[int]
) -> tuple[int, ...]:
    """Return strides for the sizes ``others`` that correspond to ``strides`` for ``sizes``.

    From the innermost dimension outwards, the ratio of each stride to the extent of the dimensions
    inside of it stays the same.
    """
    made = list(strides)
    extent = new_extent = 1
    for dim in sorted(range(len(sizes)), key=lambda d: (strides[d], sizes[d])):
        stride = strides[dim]
        if stride >= extent:
            made[dim] = -(-stride * new_extent // extent)
            if sizes[dim] > 1:
                extent, new_extent = stride * sizes[dim], made[dim] * others[dim]
    return tuple(made)
