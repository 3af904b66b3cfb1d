"""Modes: what a model is about to be used for, and which registered kernels may serve it then."""

from __future__ import annotations

import enum
import functools
import operator
from typing import TypeVar

F = TypeVar("F", bound=enum.Flag)


class Mode(enum.Flag):
    """The use that a kernel is registered for, and that a model is kernelized for.

    ``|`` joins ``INFERENCE`` or ``TRAINING`` with ``TORCH_COMPILE``. A kernel also serves uses that
    demand less than the one it is registered for: see `serving_modes` for the whole table.

    Raises:
        ValueError: At a union of ``INFERENCE`` with ``TRAINING``, or of ``FALLBACK`` with
            another mode.

    Example:
        >>> print(kg.Mode.TRAINING | kg.Mode.TORCH_COMPILE)
        TRAINING | TORCH_COMPILE
        >>> kg.Mode.INFERENCE | kg.Mode.TRAINING
        Traceback (most recent call last):
        ValueError: INFERENCE and TRAINING exclude each other, got INFERENCE | TRAINING
    """

    INFERENCE = enum.auto()
    """Forward passes without gradients."""
    TRAINING = enum.auto()
    """Forward and backward passes; a kernel for training also serves inference."""
    TORCH_COMPILE = enum.auto()
    """The layer is part of a graph that ``torch.compile`` makes."""
    FALLBACK = enum.auto()
    """For mappings only: the kernel of last resort, in whatever mode a kernel is sought."""

    @classmethod
    def _missing_(cls, value: object) -> object:
        # Python makes each combination once, and calls this first, whether it comes from ``|``,
        # ``^``, ``~``, ``Mode(3)`` or a pickle: a combination that is refused here cannot exist.
        if isinstance(value, int):
            bits = value & sum(member.value for member in cls.__members__.values())
            both = cls.INFERENCE.value | cls.TRAINING.value
            if bits & both == both:
                raise ValueError(f"INFERENCE and TRAINING exclude each other, got {_names(bits)}")
            if bits & cls.FALLBACK.value and bits != cls.FALLBACK.value:
                raise ValueError(f"FALLBACK does not join with other modes, got {_names(bits)}")
        return super()._missing_(value)

    @classmethod
    def parse(cls, mode: object) -> Mode:
        """Return ``mode`` itself, or the mode with the names of another package's ``Mode``.

        Raises:
            TypeError: If ``mode`` is neither.
        """
        if (found := _counterpart(cls, mode)) is None:
            raise TypeError(f"mode: expected a kernelgraph Mode, got {mode!r}")
        return found

    def __str__(self) -> str:
        return _names(self.value)


def _counterpart(cls: type[F], flag: object) -> F | None:
    """The flag of ``cls`` that ``flag`` is, or that has the same names; None if there is none.

    The ``kernels`` package has flags with the same names and other bits.
    """
    if isinstance(flag, cls):
        return flag
    if not isinstance(flag, enum.Flag) or type(flag).__name__ != cls.__name__:
        return None
    bits = {name: member.value for name, member in type(flag).__members__.items()}
    # Members that join others (DEFAULT, ALL) are expressed by those that they join.
    names = [name for name, bit in bits.items() if bit & flag.value and not bit & (bit - 1)]
    if not cls.__members__.keys() >= set(names):
        return None
    return functools.reduce(operator.or_, (cls[name] for name in names), cls(0))


def _names(bits: int) -> str:
    """The names of the modes in ``bits``, joined with ``|``."""
    # Not ``Flag.name`` nor iteration over a flag: Python 3.10 and 3.11 differ in both.
    names = (name for name, member in Mode.__members__.items() if member.value & bits)
    return " | ".join(names) or "NONE"


_INFERENCE, _TRAINING, _FALLBACK = Mode.INFERENCE, Mode.TRAINING, Mode.FALLBACK
_INFERENCE_COMPILE = Mode.INFERENCE | Mode.TORCH_COMPILE
_TRAINING_COMPILE = Mode.TRAINING | Mode.TORCH_COMPILE

_SERVING: dict[Mode, tuple[Mode, ...]] = {
    _INFERENCE: (_INFERENCE, _INFERENCE_COMPILE, _TRAINING, _TRAINING_COMPILE, _FALLBACK),
    _INFERENCE_COMPILE: (_INFERENCE_COMPILE, _TRAINING_COMPILE, _FALLBACK),
    _TRAINING: (_TRAINING, _TRAINING_COMPILE, _FALLBACK),
    _TRAINING_COMPILE: (_TRAINING_COMPILE, _FALLBACK),
}

REGISTRABLE: frozenset[Mode] = frozenset(mode for row in _SERVING.values() for mode in row)
"""The modes under which a kernel can be found at all."""


def serving_modes(mode: Mode) -> tuple[Mode, ...]:
    """The modes whose kernels serve ``mode``, the best first.

    A kernel for ``TORCH_COMPILE`` also serves without it, and one for ``TRAINING`` also serves
    inference; one for ``FALLBACK`` comes last.

    Raises:
        TypeError: If ``mode`` is not a ``Mode``.
        ValueError: If ``mode`` has neither ``INFERENCE`` nor ``TRAINING``.
    """
    if not isinstance(mode, Mode):
        raise TypeError(f"mode: expected a kernelgraph Mode, got {mode!r}")
    if mode not in _SERVING:
        raise ValueError(
            f"mode must contain INFERENCE or TRAINING (FALLBACK is for mappings only), got {mode}"
        )
    return _SERVING[mode]


class KernelizeFallback(enum.Flag):
    """The cases in which a layer may keep its reference; in all others `kernelize` raises.

    `kernelize` takes it as ``use_fallback``, where True means ``DEFAULT`` and False ``NONE``.

    Example:
        >>> kg.KernelizeFallback.CANNOT_LOAD in kg.KernelizeFallback.DEFAULT
        False
        >>> allowed = kg.KernelizeFallback.ALL & ~kg.KernelizeFallback.NO_LAYER
        >>> kg.KernelizeFallback.NO_DEVICE in allowed
        True
    """

    NONE = 0
    """None: every extensible layer gets a kernel."""
    NO_LAYER = enum.auto()
    """No kernel is registered under the layer's name."""
    NO_DEVICE = enum.auto()
    """No kernel is registered for the device type."""
    NO_COMPATIBLE_PROPERTIES = enum.auto()
    """No kernel is registered for the device's capability."""
    NO_COMPATIBLE_MODE = enum.auto()
    """No kernel is registered for the mode, or it lacks the backward that the mode needs."""
    CANNOT_LOAD = enum.auto()
    """The kernel could not be loaded."""
    DEFAULT = NO_LAYER | NO_DEVICE | NO_COMPATIBLE_PROPERTIES | NO_COMPATIBLE_MODE
    """All cases but ``CANNOT_LOAD``: a kernel that fits has to load."""
    ALL = DEFAULT | CANNOT_LOAD
    """All cases."""

    @classmethod
    def parse(cls, use_fallback: object) -> KernelizeFallback:
        """Return the cases that a ``use_fallback`` argument allows.

        Args:
            use_fallback: A ``KernelizeFallback``, of this package or of another one; or True for
                ``DEFAULT``, False for ``NONE``.

        Raises:
            TypeError: If it is none of these.
        """
        if isinstance(use_fallback, bool):
            return cls.DEFAULT if use_fallback else cls.NONE
        if (found := _counterpart(cls, use_fallback)) is None:
            raise TypeError(f"use_fallback is a bool or a KernelizeFallback, not {use_fallback!r}")
        return found
