"""What a model is about to be used for, and which registered kernels may then serve it."""

from __future__ import annotations

import enum
import functools
import operator
from typing import Any, TypeVar

F = TypeVar("F", bound=enum.Flag)


class Mode(enum.Flag):
    """What a kernel is registered for, and what a model is kernelized for.

    ``|`` joins ``INFERENCE`` or ``TRAINING`` with ``TORCH_COMPILE``.

    Raises:
        ValueError: at a union of ``INFERENCE`` with ``TRAINING``, or of ``FALLBACK`` with
            another mode.
    """

    INFERENCE = enum.auto()
    TRAINING = enum.auto()
    TORCH_COMPILE = enum.auto()
    FALLBACK = enum.auto()
    """For mappings only: the kernel of last resort, whatever the mode that is asked for."""

    @classmethod
    def _missing_(cls, value: object) -> Any:
        # Python makes each combination once, and asks here first, whether it comes from ``|``,
        # ``^``, ``~``, ``Mode(3)`` or a pickle: what is refused here exists nowhere.
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
        """``mode`` itself, or the mode that another package's ``Mode`` stands for.

        Raises:
            TypeError: ``mode`` is neither.
        """
        if (found := _counterpart(cls, mode)) is None:
            raise TypeError(f"mode: expected a kernelgraph Mode, got {mode!r}")
        return found

    def __str__(self) -> str:
        return _names(self.value)


def _counterpart(kind: type[F], flag: object) -> F | None:
    """The flag of ``kind`` that ``flag`` is or, by its names, stands for.

    The ``kernels`` package has flags of the same names, whose bits are others.
    """
    if isinstance(flag, kind):
        return flag
    if not isinstance(flag, enum.Flag) or type(flag).__name__ != kind.__name__:
        return None
    bits = {name: member.value for name, member in type(flag).__members__.items()}
    # Members that join others (DEFAULT, ALL) are told by those that they join.
    names = [name for name, bit in bits.items() if bit & flag.value and not bit & (bit - 1)]
    if not kind.__members__.keys() >= set(names):
        return None
    return functools.reduce(operator.or_, (kind[name] for name in names), kind(0))


def _names(bits: int) -> str:
    # Not ``Flag.name`` nor iteration over a flag: Python 3.10 and 3.11 differ in both.
    names = (name for name, member in Mode.__members__.items() if member.value & bits)
    return " | ".join(names) or "NONE"


_INFERENCE, _TRAINING, _FALLBACK = Mode.INFERENCE, Mode.TRAINING, Mode.FALLBACK
_INFERENCE_COMPILE = Mode.INFERENCE | Mode.TORCH_COMPILE
_TRAINING_COMPILE = Mode.TRAINING | Mode.TORCH_COMPILE

_TRIED: dict[Mode, tuple[Mode, ...]] = {
    _INFERENCE: (_INFERENCE, _INFERENCE_COMPILE, _TRAINING, _TRAINING_COMPILE, _FALLBACK),
    _INFERENCE_COMPILE: (_INFERENCE_COMPILE, _TRAINING_COMPILE, _FALLBACK),
    _TRAINING: (_TRAINING, _TRAINING_COMPILE, _FALLBACK),
    _TRAINING_COMPILE: (_TRAINING_COMPILE, _FALLBACK),
}

REGISTRABLE: frozenset[Mode] = frozenset(mode for row in _TRIED.values() for mode in row)
"""The modes under which a kernel can be found at all."""


def tried(mode: Mode) -> tuple[Mode, ...]:
    """The modes whose kernels serve ``mode``, the best first.

    Raises:
        TypeError: ``mode`` is not a ``Mode``.
        ValueError: ``mode`` has neither ``INFERENCE`` nor ``TRAINING``.
    """
    if not isinstance(mode, Mode):
        raise TypeError(f"mode: expected a kernelgraph Mode, got {mode!r}")
    if mode not in _TRIED:
        raise ValueError(
            f"mode must contain INFERENCE or TRAINING (FALLBACK is for mappings only), got {mode}"
        )
    return _TRIED[mode]


class KernelizeFallback(enum.Flag):
    """The cases in which a layer may keep its reference; without the case's flag it raises."""

    NONE = 0
    NO_LAYER = enum.auto()
    """No kernel is registered under the layer's name."""
    NO_DEVICE = enum.auto()
    """None is registered for the device type."""
    NO_COMPATIBLE_PROPERTIES = enum.auto()
    """None is registered for the device's capability."""
    NO_COMPATIBLE_MODE = enum.auto()
    """None is registered for the mode, or the kernel lacks the backward that the mode needs."""
    CANNOT_LOAD = enum.auto()
    """The kernel could not be loaded."""
    DEFAULT = NO_LAYER | NO_DEVICE | NO_COMPATIBLE_PROPERTIES | NO_COMPATIBLE_MODE
    ALL = DEFAULT | CANNOT_LOAD

    @classmethod
    def parse(cls, use_fallback: object) -> KernelizeFallback:
        """The cases that a ``use_fallback`` argument allows.

        Args:
            use_fallback: a ``KernelizeFallback``, of this package or of another one; or True for
                ``DEFAULT``, False for ``NONE``.

        Raises:
            TypeError: it is neither.
        """
        if isinstance(use_fallback, bool):
            return cls.DEFAULT if use_fallback else cls.NONE
        if (found := _counterpart(cls, use_fallback)) is None:
            raise TypeError(f"use_fallback is a bool or a KernelizeFallback, not {use_fallback!r}")
        return found
