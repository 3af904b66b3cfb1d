"""The operands of a run of a call before there are any: the layer's weights, the rest made up."""

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
from kernelgraph.graph.infer.sample_inputs import Form
from kernelgraph.selection import device_name


class Operands:
    """Makes the operands of runs of one call: equal ones for equal seeds.

    Args:
        call: The form of the call.
        operands: Its operands; of tensors only the form counts, and they may be fakes.
        module: The layer. Its weights are taken where they are at hand.
        trial: Whether the runs are a trial of how the kernel computes, and not of this very call:
            at `reduced` sizes, with `disturbed` parameters.

    Raises:
        TypeError: If there is an operand that cannot be made up.
    """

    def __init__(
        self, call: Call, operands: Sequence[Any], module: nn.Module, *, trial: bool = False
    ) -> None:
        self.bounds: Mapping[int, int] = {}
        """Of the operands that are indices, the numbers that they are below (see
        `index_bounds`)."""
        self.tables: Sequence[int] = ()
        """The operands whose last dimension has the same in both halves (see `rotary_tables`)."""
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

        def size(value: Any) -> Any:
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
        """What `make` makes, but for the values."""

    def at_own_sizes(self) -> bool:
        """Have all made at the call's own sizes; whether they were not."""
        differ = self._made_up != self._own
        self._made_up = self._own
        return differ

    @property
    def tensors(self) -> list[Form | Tensor]:
        """The forms of those that are made up, and the weights."""
        return [*(v for v in self._made_up if isinstance(v, Form)), *self._weights.values()]

    @property
    def devices(self) -> tuple[str, ...]:
        """What they are on, as far as computing there depends on it."""
        return tuple(sorted({device_name(v.device) for v in self.tensors}))

    def apart(self, seed: int | None = None) -> contextlib.AbstractContextManager[None]:
        """See `sample_inputs.apart`."""
        return sample_inputs.apart(self._given, seed)

    def make(self, seed: int) -> list[Any]:
        """The operands."""
        made = sample_inputs.make(self._made_up, seed, bools=True)
        for i in self.tables:
            first, second = _base(made[i]).chunk(2, -1)
            second.copy_(first)
        for i, bound in self.bounds.items():
            made[i] = indices(self._made_up[i], bound, seed)
        for i, form in enumerate(self._made_up[self._first :], self._first):
            if isinstance(form, Form) and len(form.sizes) > 1 and _is_float(form.dtype):
                made[i].mul_(max(form.sizes[-1], 1) ** -0.5)  # as weights are
        for i, weight in self._weights.items():
            own = weight.detach().clone()
            varied = self._trial and isinstance(weight, nn.Parameter) and _is_float(weight.dtype)
            made[i] = disturbed(own, seed + i) if varied else own
        return made

    def rotary_tables(self, wanted: Sequence[bool]) -> list[int]:
        """The arguments that may be the cosines and sines of a rotary embedding, whose halves
        many kernels take to be equal: floats that no gradient is wanted of."""
        arguments = list(enumerate(self._made_up[: self._first]))
        forms = [(i, v) for i, v in arguments if isinstance(v, Form) and not wanted[i]]
        return [i for i, v in forms if _is_float(v.dtype) and v.sizes and v.sizes[-1] % 2 == 0]

    def index_bounds(self, run: Callable[[Sequence[Any]], Any]) -> dict[int, int]:
        """The sizes that indices among the arguments are below, as far as ``run`` tells.

        An index out of range kills a process with a GPU, and zeros alone say little of a layer
        that chooses experts. So ``run`` is asked on the CPU, where there is no harm in it. One
        that checks its indices raises somewhere above, and the largest size whose last index it
        takes is in range. One that compares them with the numbers in range, as loops over experts
        do, returns for all others the same: the range is up to the size from which on it does so.
        (Of more than one dimension: the offsets of segments must be in order as well.)
        """
        forms = [
            Form(tuple(v.shape), v.stride(), v.dtype, v.device) if isinstance(v, Tensor) else v
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
            if not (isinstance(form, Form) and form.dtype in _INDICES and form.reach):
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
            except Exception:  # it cannot be run on the CPU
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
    return value.sizes if isinstance(value, Form) else ()


def _is_float(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point and dtype.itemsize > 1) or dtype.is_complex


def disturbed(weight: Tensor, seed: int) -> Tensor:
    """``weight`` with noise of a third of its size, written into it: a norm's weight, which is
    ones, hides nothing."""
    generator = torch.Generator(weight.device).manual_seed(seed)
    noise = torch.randn(weight.shape, dtype=weight.dtype, device=weight.device, generator=generator)
    size = float(weight.abs().float().square().mean().sqrt()) if weight.numel() else 0.0
    return weight.add_(noise, alpha=0.3 * size or 0.1)


def indices(form: Form, bound: int, seed: int) -> Tensor:
    """Indices below ``bound``, the last among them; in one row all differ where they can."""
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
    """``tensor`` without its expanded dimensions, which nothing can be written into."""
    sizes = [1 if s == 0 else n for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(sizes, tensor.stride())


def _on_cpu(value: Any) -> Any:
    """Of no particular values, but such that what depends on them is not zero."""
    if not isinstance(value, Form):
        return value
    if not _is_float(value.dtype):
        return torch.zeros(value.sizes, dtype=value.dtype)
    return torch.full(value.sizes, max(value.sizes[-1:], default=1) ** -0.5, dtype=value.dtype)


# --- smaller sizes ----------------------------------------------------------------------------

_SMALL = 8


def reduced(operands: Sequence[Any], fixed: Collection[int]) -> list[Any]:
    """Forms and numbers like ``operands``, with small sizes.

    A size that is above 8, is not ``fixed`` and is nowhere that of a last dimension, for which a
    kernel may be built, becomes a small multiple of 4. Equal sizes stay equal, and distinct ones
    distinct and in order; broadcast dimensions stay so. A number that is equal to such a size is
    taken for it.
    """
    forms = [v for v in operands if isinstance(v, Form)]
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
    if not isinstance(value, Form):
        return smaller.get(value, value) if type(value) is int else value
    sizes = tuple(smaller.get(n, n) for n in value.sizes)
    return value._replace(sizes=sizes, strides=rescaled(value.sizes, value.strides, sizes))


def rescaled(
    sizes: Sequence[int], strides: Sequence[int], others: Sequence[int]
) -> tuple[int, ...]:
    """Strides for the sizes ``others``, as ``strides`` are for ``sizes``.

    From the innermost dimension outwards: one whose stride is so many times the extent of what is
    inside of it has one that is as many times the new extent.
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
