"""Autograd below its public API: dispatch keys, nodes, transforms and autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake as is_fake
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols as free_unbacked_symbols

_AUTOGRAD = (
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.ADInplaceOrView,
)
_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded


def begin_recording(enabled: bool = True) -> tuple[bool, ...]:
    """Have autograd record what follows, even where the dispatcher is past it; what was before.

    It is in a graph compiled for inference, which a gradient that is computed inside a compiled
    function ends up in; the results of the reference would not depend on anything, and the
    gradients be zero. Not a context manager: this is on the way of each call of a kernel. Tried on
    2.11, 2.13, 2.14.

    Args:
        enabled: Whether gradients are enabled; without, this is for code that enables them.
    """
    before = torch.is_grad_enabled(), *map(_excluded, _AUTOGRAD)
    torch._C._set_grad_enabled(enabled)
    if True in before[1:]:
        for key in _AUTOGRAD:
            _exclude(key, False)
    return before


def end_recording(before: tuple[bool, ...]) -> None:
    """As it was before `begin_recording`."""
    torch._C._set_grad_enabled(before[0])
    if True in before[1:]:
        for key, was in zip(_AUTOGRAD, before[1:], strict=True):
            _exclude(key, was)


set_grad_enabled = torch._C._set_grad_enabled
"""``torch.set_grad_enabled`` without its object, which takes as long as a call of an op."""


def function_of(node: Any) -> type[torch.autograd.Function]:
    """The function whose results have ``node`` for their ``grad_fn``. Tried on 2.11, 2.13, 2.14."""
    function: type[torch.autograd.Function] = type(node)._forward_cls
    return function


def count_of_results(node: Any) -> int:
    """How many results have ``node`` for their ``grad_fn``. Tried on 2.11, 2.13, 2.14."""
    return len(node._input_metadata)


def splits_forward(function: type[torch.autograd.Function]) -> bool:
    """Whether a function's forward gets no context. Tried on 2.11, 2.13, 2.14."""
    return function.setup_context is not torch.autograd.Function.setup_context


def is_of_op(function: type[torch.autograd.Function]) -> bool:
    """Whether a function is what ``torch.library.register_autograd`` has made of a formula. Tried
    on 2.11, 2.13, 2.14."""
    return function.__module__ == "torch._library.autograd"


class recording_gradients:  # noqa: N801 (a context manager)
    """`begin_recording`, and `end_recording`."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled

    def __enter__(self) -> None:
        self._before = begin_recording(self._enabled)

    def __exit__(self, *_: object) -> None:
        end_recording(self._before)


def version_of(tensor: torch.Tensor) -> int:
    """Return how often autograd has seen ``tensor`` written into. Tried on 2.11, 2.13, 2.14."""
    return tensor._version


def transforming() -> bool:
    """Whether the code that runs is differentiated or batched by ``torch.func``, or in forward
    mode. Tried on 2.11, 2.13, 2.14."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


_AUTOCAST_KINDS = tuple(
    kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)
)


any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether there is an autocast region around the code that runs. Tried on 2.11, 2.13, 2.14."""


def autocast_regions() -> tuple[tuple[str, torch.dtype], ...]:
    """The device types and dtypes of these regions."""
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in _AUTOCAST_KINDS
        if torch.is_autocast_enabled(kind)
    )
