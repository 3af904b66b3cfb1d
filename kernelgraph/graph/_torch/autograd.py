"""Autograd below its public API: dispatch keys, graph nodes, transforms, autocast, versions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_AUTOGRAD = (
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.ADInplaceOrView,
)
_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded


def begin_recording(enabled: bool = True) -> tuple[bool, ...]:
    """Make autograd record the calls that follow, even below autograd in the dispatcher.

    A graph compiled for inference runs its ops below autograd, and a gradient that is computed
    inside a compiled function ends up in one: there the results of the reference would not depend
    on anything, and the gradients would be zero. This is no context manager because it runs at
    each call of a kernel. Tried on 2.11, 2.13, 2.14.

    Args:
        enabled: Whether to enable gradients; False is for code that enables them itself.

    Returns:
        The state before, for `end_recording`.
    """
    before = torch.is_grad_enabled(), *map(_excluded, _AUTOGRAD)
    torch._C._set_grad_enabled(enabled)
    if True in before[1:]:
        for key in _AUTOGRAD:
            _exclude(key, False)
    return before


def end_recording(before: tuple[bool, ...]) -> None:
    """Restore the state that `begin_recording` returned."""
    torch._C._set_grad_enabled(before[0])
    if True in before[1:]:
        for key, was in zip(_AUTOGRAD, before[1:], strict=True):
            _exclude(key, was)


set_grad_enabled = torch._C._set_grad_enabled
"""``torch.set_grad_enabled`` without the context manager, which costs as much as a call of an
op. Tried on 2.11, 2.13, 2.14."""


def function_of(node: Any) -> type[torch.autograd.Function]:
    """Return the class of the function whose results have ``node`` as their ``grad_fn``. Tried on
    2.11, 2.13, 2.14."""
    function: type[torch.autograd.Function] = type(node)._forward_cls
    return function


def count_of_results(node: Any) -> int:
    """Return how many results have ``node`` as their ``grad_fn``. Tried on 2.11, 2.13, 2.14."""
    return len(node._input_metadata)


def splits_forward(function: type[torch.autograd.Function]) -> bool:
    """Whether a function has a ``setup_context``, so that its forward gets no context. Tried on
    2.11, 2.13, 2.14."""
    return function.setup_context is not torch.autograd.Function.setup_context


def is_of_op(function: type[torch.autograd.Function]) -> bool:
    """Whether ``torch.library.register_autograd`` made a function from a formula. Tried on 2.11,
    2.13, 2.14."""
    return function.__module__ == "torch._library.autograd"


class recording_gradients:  # noqa: N801 (a context manager)
    """A context manager of `begin_recording` and `end_recording`."""

    def __init__(self, *, enabled: bool = True, below: bool = False) -> None:
        self._enabled = enabled
        self._below = below
        """Whether to record nothing at all, as below autograd in the dispatcher."""

    def __enter__(self) -> None:
        self._before = begin_recording(self._enabled)
        if self._below:
            for key in _AUTOGRAD:
                _exclude(key, True)

    def __exit__(self, *_: object) -> None:
        if self._below:
            for key in _AUTOGRAD:
                _exclude(key, False)
        end_recording(self._before)


def recording(forward: Callable[..., object]) -> Callable[..., object]:
    """Return ``forward`` as a function in which autograd can record, where it enables gradients."""

    @functools.wraps(forward)
    def inside(*args: object, **kwargs: object) -> object:
        with recording_gradients(enabled=False):
            return forward(*args, **kwargs)

    return inside


def version_of(tensor: torch.Tensor) -> int:
    """Return how often autograd has seen ``tensor`` written into. Tried on 2.11, 2.13, 2.14."""
    return tensor._version


def transforming() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is active. Tried on
    2.11, 2.13, 2.14."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


_AUTOCAST_KINDS = tuple(
    kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)
)


any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether an autocast region is active. Tried on 2.11, 2.13, 2.14."""


def autocast_regions() -> tuple[tuple[str, torch.dtype], ...]:
    """Return the device types and dtypes of the active autocast regions."""
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in _AUTOCAST_KINDS
        if torch.is_autocast_enabled(kind)
    )
