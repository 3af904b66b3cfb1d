"""The examination of a kernel: whether its calls have the effects that the layer's have.

At the first call of a form the kernel and the layer's reference are each run on copies of the layer
and of the arguments (`Effects`). Memory and generators are compared with what they were before:
torch does not count all writes. What they differ in makes the `Fit` of the kernel.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from kernelgraph.eager.effects import Effects, Result, alike
from kernelgraph.graph import _torch
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible, program_data_kept


@dataclass(frozen=True)
class Fit:
    """How the calls of one form are made with a kernel."""

    why_not: str = ""
    """The reason why they are made with the layer's reference; empty if they are not."""
    private: tuple[str, ...] = ()
    """The arguments, by position or name, that the kernel receives copies of: it writes into them,
    and the layer does not."""
    strides: dict[int, tuple[int, ...] | None] = field(default_factory=dict)
    """The results, by number, that are copied, with the strides that the copies have; None: those
    of the result."""
    layouts: tuple[tuple[int, ...], ...] = ()
    """The strides of the layer's results, without gaps."""
    writes: bool = False
    """Whether the layer writes into tensors."""
    once: str = ""
    """The reason why the reference must not be run again for a gradient; empty if it may."""


_examining = threading.RLock()

AS_IT_IS = Fit()
"""The fit of a kernel that is called as it is."""


def examine(
    layer: Extensible,
    kernel: Kernel,
    module: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> Fit:
    """Examine a kernel in a call. What cannot be copied or run on copies is called as it is."""
    if hooked := [name for name, part in module.named_modules() if name and _has_hooks(part)]:
        return Fit(f"hooks of {_list(hooked)} run in a call of the layer")
    names = argument_names(layer.reference, len(args))
    with _aside(layer, kernel, module):
        try:
            wanted = Effects.of(layer.reference, module, args, kwargs, names)
            made = Effects.of(kernel.forward, module, args, kwargs, names)
        except Exception:  # a call that raises says itself what is wrong
            return AS_IT_IS
    return _compare(made, wanted, {*names, *kwargs})


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextlib.contextmanager
def _aside(layer: Extensible, kernel: Kernel, module: nn.Module) -> Iterator[None]:
    """Run code in the middle of a program that leaves no trace in it."""
    classes = [kernel.layer, *(type(part) for part in module.modules())]
    cached = torch.is_autocast_cache_enabled()
    with (
        _examining,
        program_data_kept(classes, [layer.reference]),
        _torch.for_real(),
        _torch.parametrizations_uncached(),
        torch.no_grad(),
    ):
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


def argument_names(forward: Callable[..., object], count: int) -> list[str]:
    """Return names for ``count`` positional arguments of a forward, the ``self`` not among them."""
    names = _positional(forward)[:count]
    return [*names, *(f"args[{i}]" for i in range(count - len(names)))]


@functools.cache
def _positional(forward: Callable[..., object]) -> tuple[str, ...]:
    found = inspect.signature(forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in found if p.kind in kinds)[1:]


# --- comparing ----------------------------------------------------------------------------------


def _compare(made: Effects, wanted: Effects, arguments: set[str]) -> Fit:
    """Find how the kernel, which ``made`` effects, can have those that are ``wanted``."""
    if wanted.draws or made.draws:
        who = "the layer" if wanted.draws else "the kernel"
        return Fit(f"{who} draws random numbers, and a kernel would draw others")
    if missing := wanted.changed - made.written:
        return Fit(f"the kernel does not write into {_list(missing)}, and the layer does")
    alone = made.written - wanted.written
    if inside := alone - arguments:
        return Fit(f"the kernel writes into {_list(inside)}, and the layer does not")
    if why := _difference(made, wanted):
        return Fit(why)
    strides: dict[int, tuple[int, ...] | None] = {}
    for number, (ours, theirs) in enumerate(zip(made.results, wanted.results, strict=True)):
        if lost := theirs.shares - ours.shares:
            return Fit(f"the layer returns memory of {_list(lost)}, and the kernel does not")
        if not _has_strides(ours, theirs):
            strides[number] = theirs.dense_strides
        elif ours.shares - theirs.shares - alone:
            strides[number] = None
    if strides and not made.plain:
        return Fit("the memory of what the kernel returns differs, inside of an object")
    once = wanted.written | wanted.changes.keys()
    shared = {path for result in wanted.results for path in result.shares}
    return Fit(
        private=tuple(sorted(alone)),
        strides=strides,
        layouts=tuple(result.dense_strides for result in wanted.results),
        writes=bool(wanted.written),
        once=f"the layer changes {_list(once)}"
        if once
        else f"the layer returns memory of {_list(shared)}"
        if shared
        else "",
    )


def _difference(made: Effects, wanted: Effects) -> str:
    """Tell in what the kernel changes or returns other things than the layer."""
    ours, theirs = made.changes, wanted.changes
    for path in sorted(ours.keys() | theirs.keys()):
        # What a kernel keeps on the layer beside what there is disturbs nobody.
        is_new = path.startswith("self.") and path not in wanted.before and path not in theirs
        if not (is_new or alike(made.after.get(path), wanted.after.get(path))):
            return f"{path} is not the same after a call of the kernel as after one of the layer"
    for path in sorted(made.output.keys() | wanted.output.keys()):
        one, other = made.output.get(path), wanted.output.get(path)
        if not (alike(one, other) or (type(one) is type(other) is float)):
            return f"the kernel returns {_text(one)}, and the layer {_text(other)}"
    return ""


def _text(entry: object) -> str:
    if isinstance(entry, tuple) and len(entry) == 3:
        shape, dtype, device = entry[1]
        return f"a {dtype} tensor of shape {shape} on {device.type}"
    if isinstance(entry, tuple):
        return f"a {entry[0].__name__}"
    return repr(entry)


def _has_strides(made: Result, wanted: Result) -> bool:
    """Whether a result can be viewed as the layer's can."""
    return made.strides in (wanted.strides, wanted.dense_strides)


def _list(paths: Iterable[str]) -> str:
    return ", ".join(sorted(paths))
