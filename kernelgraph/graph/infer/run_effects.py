"""Watches a run: which operands it writes into, and whether it draws random numbers.

The version counter of a tensor does not tell: batch norm writes its running statistics without
raising it, and so do Triton kernels, native code and numpy. On fakes every op is seen, and its
schema says what it writes. On real tensors the memory is compared.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraph.graph import _torch
from kernelgraph.graph.infer.aliasing import memory_of, same_bits, versions


class Watch:
    """The result of watching a run."""

    def __init__(self) -> None:
        self.written: set[int] = set()
        """The numbers of the operands that the run wrote into."""
        self.drew = False
        """Whether it drew random numbers."""


@contextlib.contextmanager
def watching(operands: Sequence[object]) -> Iterator[Watch]:
    """Watch the run inside of the context; its result is complete behind it.

    Args:
        operands: The operands of the run, real tensors or fakes of an active mode.
    """
    watch = Watch()
    if any(isinstance(v, Tensor) and _torch.is_fake(v) for v in operands):
        python = Generators([])
        ops = _OpWatch()
        with ops:
            yield watch
        watch.drew = ops.drew or python.changed()
        python.restore()
        watch.written = {
            i
            for i, v in enumerate(operands)
            if isinstance(v, Tensor)
            and v.layout is torch.strided
            and _torch.storage_of(v) in ops.written
        }
        return
    snapshot = Snapshot(operands)
    yield watch
    watch.written = snapshot.written()
    watch.drew = snapshot.generators.changed()


# --- what a run on fakes leaves behind ----------------------------------------------------------


@contextlib.contextmanager
def globals_kept(forward: Callable[..., object]) -> Iterator[None]:
    """Run a kernel on fakes, and give its module the contents that it had before.

    Tables and workspaces that the kernel keeps would hold fakes otherwise, in its globals, in
    containers, on its classes and in caches of functions.

    Args:
        forward: The kernel's forward.
    """
    function = inspect.unwrap(getattr(forward, "func", forward))
    names = getattr(function, "__globals__", {})
    cells = [_content(cell) for cell in getattr(function, "__closure__", None) or ()]
    values = [*names.values(), *cells]
    home = names.get("__name__")
    classes = [v for v in values if isinstance(v, type) and v.__module__ == home]
    before = dict(names)
    members = [(cls, dict(vars(cls))) for cls in classes]
    inside = [*values, *(v for _, found in members for v in found.values())]
    containers = [(v, v.copy()) for v in inside if type(v) in (list, dict, set)]
    try:
        yield
    finally:
        _refill(names, before)
        for container, contents in containers:
            _refill(container, contents)
        for cls, contents in members:
            _restore_members(cls, contents)
        for value in inside:
            if callable(clear := getattr(value, "cache_clear", None)):
                clear()


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _refill(container: Any, contents: Any) -> None:
    """Give a container its contents back, if they are others now."""
    if isinstance(container, set):
        container.intersection_update(contents)
        container.update(contents)
    elif isinstance(container, dict):
        for key in container.keys() - contents.keys():
            del container[key]
        container.update({k: v for k, v in contents.items() if container.get(k) is not v})
    elif len(container) != len(contents) or not all(map(operator.is_, container, contents)):
        container[:] = contents


def _restore_members(cls: type, contents: dict[str, Any]) -> None:
    for name in vars(cls).keys() - contents.keys():
        delattr(cls, name)
    for name, value in contents.items():
        if vars(cls)[name] is not value:
            setattr(cls, name, value)


# --- on fakes -----------------------------------------------------------------------------------

_STATISTICS = ("running_mean", "running_var")
"""The arguments that batch norms write into, whatever their schemas say."""
_TRAINING = ("training", "train", "use_input_stats")
"""The arguments that say whether they do."""


class _OpWatch(_torch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the storages that ops write into, and whether one of them draws."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[object] = set()
        self.drew = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> object:
        given = _torch.arguments_of(func, args, kwargs or {})
        written = [value for name, (value, writes) in given.items() if writes]
        values = {name: value for name, (value, _) in given.items()}
        if any(values.get(name) for name in _TRAINING):
            written += [values[name] for name in _STATISTICS if name in values]
        self.written.update(
            _torch.storage_of(tensor)
            for tensor in _torch.tensor_leaves(written)
            if tensor.layout is torch.strided
        )
        draws = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        # Attention draws for its dropout alone, which is 0 where it is left out.
        self.drew |= draws and ("dropout_p" not in values or bool(values["dropout_p"]))
        return func(*args, **(kwargs or {}))


# --- on real tensors ----------------------------------------------------------------------------


_LARGE = 2**25
"""The bytes from which on a tensor is not copied, but known by the sum of its memory."""


class Snapshot:
    """The memory of operands and the states of random generators before a run.

    Args:
        operands: The operands. Sparse tensors and tensors of subclasses are not watched.
    """

    def __init__(self, operands: Sequence[object]) -> None:
        self._operands = operands
        self._versions = versions(operands)
        watched: dict[int, Any] = {i: v for i, v in enumerate(operands) if _is_plain(v)}
        self._memory = {i: memory_of(v).clone() for i, v in watched.items() if v.nbytes < _LARGE}
        self._sums = {i: _sum(v) for i, v in watched.items() if v.nbytes >= _LARGE}
        self.generators = Generators({v.device for v in operands if isinstance(v, Tensor)})

    def written(self) -> set[int]:
        """Return the numbers of the operands that were written into, if only with what they held,
        as autograd counts it."""
        pairs = zip(self._versions, versions(self._operands), strict=True)
        counted = {i for i, (old, new) in enumerate(pairs) if old != new}
        small = {i for i, old in self._memory.items() if not same_bits(self._now(i), old)}
        large = {i for i, old in self._sums.items() if _sum(self._operand(i)) != old}
        return counted | small | large

    def restore(self, numbers: Iterable[int]) -> None:
        """Give these operands the memory that they had.

        Raises:
            RuntimeError: If one is too large to have been copied.
        """
        numbers = set(numbers)
        if numbers & self._sums.keys():
            raise RuntimeError("it was written into an operand that is too large to be set back")
        # Inference tensors can be written in this mode alone.
        with torch.inference_mode():
            for i in self._memory.keys() & numbers:
                self._now(i).copy_(self._memory[i])

    def _now(self, number: int) -> Tensor:
        return memory_of(self._operand(number))

    def _operand(self, number: int) -> Tensor:
        operand = self._operands[number]
        assert isinstance(operand, Tensor)
        return operand


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter, nn.Buffer)
        and value.layout is torch.strided
        and value.device.type != "meta"
        and value.numel() > 0
    )


def _sum(tensor: Tensor) -> int:
    """Return the sum of a tensor's memory as integers, which takes little memory."""
    integers = {16: torch.int64, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    memory = memory_of(tensor)
    # In parts, since torch widens what it sums.
    parts: tuple[Tensor, ...] = torch.split(memory.view(integers[memory.itemsize]), 2**20)
    return int(torch.stack([part.sum() for part in parts]).sum())


class Generators:
    """The states of torch's generators, and of Python's.

    Args:
        devices: The devices whose generators count, beside that of the CPU; none for a run on
            fakes, which draws nothing of torch.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        modules = {"cuda": torch.cuda, "xpu": torch.xpu}
        self._torch: list[tuple[Any, Any, Tensor]] = []
        for device in devices:
            if device.type in modules:
                module: Any = modules[device.type]
                self._torch.append((module, device, module.get_rng_state(device)))
        self._cpu = torch.get_rng_state() if devices else None
        self._python = random.getstate()

    def changed(self) -> bool:
        """Whether something was drawn."""
        return (
            any(not torch.equal(m.get_rng_state(d), state) for m, d, state in self._torch)
            or (self._cpu is not None and not torch.equal(torch.get_rng_state(), self._cpu))
            or random.getstate() != self._python
        )

    def restore(self) -> None:
        """Set the generators back."""
        for module, device, state in self._torch:
            module.set_rng_state(state, device)
        if self._cpu is not None:
            torch.set_rng_state(self._cpu)
        random.setstate(self._python)
