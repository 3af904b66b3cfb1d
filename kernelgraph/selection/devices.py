"""Devices: those that kernels are registered for, and the one that a kernel is sought for."""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEVICE_TYPES = ("cpu", "cuda", "rocm", "mps", "npu", "xpu", "neuron", "tpu")

_ALIASES = {"metal": "mps"}

_INDEXED = re.compile(r"([^:]*)(?::(0|[1-9][0-9]*))?")


def type_name(value: object) -> str:
    """The type of ``value`` as error messages show it: two classes named ``Device`` differ."""
    kind = type(value)
    in_builtins = kind.__module__ == "builtins"
    return kind.__qualname__ if in_builtins else f"{kind.__module__}.{kind.__qualname__}"


def _device_type(name: object, given: object = None) -> str:
    """The device type called ``name``; an error shows ``given``, where that says more."""
    if not isinstance(name, str):
        raise TypeError(f"device type: expected a str, got {type_name(name)}")
    kind = _ALIASES.get(name, name)
    if kind not in DEVICE_TYPES:
        types = ", ".join(DEVICE_TYPES)
        raise ValueError(
            f'unknown device type "{given or name}": there are {types} (metal means mps)'
        )
    return kind


def _check_capability(field: str, value: object) -> None:
    # A bool is an int to Python, and True is nobody's capability.
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{field}: expected an int (8.6 is written 86), got {type_name(value)}")
    if value < 0:
        raise ValueError(f"{field} must not be negative, got {value}")


@dataclass(frozen=True)
class _CapabilityBounds:
    min_capability: int
    max_capability: int

    def __post_init__(self) -> None:
        _check_capability("min_capability", self.min_capability)
        _check_capability("max_capability", self.max_capability)
        if self.min_capability > self.max_capability:
            raise ValueError(
                f"min_capability {self.min_capability} exceeds max_capability {self.max_capability}"
            )

    def __contains__(self, capability: int) -> bool:
        return self.min_capability <= capability <= self.max_capability

    def __str__(self) -> str:
        if self.min_capability == self.max_capability:
            return str(self.min_capability)
        return f"{self.min_capability}-{self.max_capability}"


class CUDAProperties(_CapabilityBounds):
    """The CUDA compute capabilities that a kernel is registered for.

    Args:
        min_capability: the lowest; compute capability 8.6 is written 86.
        max_capability: the highest, itself included.

    Raises:
        TypeError: a bound is not an int.
        ValueError: a bound is negative, or ``min_capability`` exceeds ``max_capability``.
    """


class ROCMProperties(_CapabilityBounds):
    """The ROCm capabilities that a kernel is registered for, as torch numbers them.

    Args:
        min_capability: the lowest; ``torch.cuda.get_device_capability() == (9, 4)`` is
            written 94.
        max_capability: the highest, itself included.

    Raises:
        TypeError: a bound is not an int.
        ValueError: a bound is negative, or ``min_capability`` exceeds ``max_capability``.
    """


# The device types that have capabilities; the others take no properties.
_PROPERTIES: dict[str, type[_CapabilityBounds]] = {"cuda": CUDAProperties, "rocm": ROCMProperties}


def _properties(given: Any) -> _CapabilityBounds:
    """``given`` itself, or the properties that another package's class of that name stands for."""
    if isinstance(given, _CapabilityBounds):
        return given
    for kind in _PROPERTIES.values():
        if type(given).__name__ == kind.__name__:
            return kind(given.min_capability, given.max_capability)
    raise TypeError(
        f"properties: expected CUDAProperties, ROCMProperties or None, got {type_name(given)}"
    )


def _is_device(value: object) -> bool:
    """Whether ``value`` is a ``Device``, or has what the ``kernels`` package's has."""
    return hasattr(value, "type") and hasattr(value, "properties")


@dataclass(frozen=True)
class Device:
    """A device that a kernel is registered for.

    Args:
        type: cpu, cuda, rocm, mps (or metal, which means mps), npu, xpu, neuron or tpu.
        properties: the capabilities that the kernel is for, with ``cuda`` and ``rocm`` only;
            None means every capability.

    Raises:
        TypeError: ``type`` is not a str, or ``properties`` is no properties object.
        ValueError: there is no such type, or the properties are those of another type.
    """

    type: str
    properties: CUDAProperties | ROCMProperties | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", _device_type(self.type))
        if self.properties is None:
            return
        properties = _properties(self.properties)
        object.__setattr__(self, "properties", properties)
        fitting = _PROPERTIES.get(self.type)
        if fitting is None:
            raise ValueError(f'device type "{self.type}" takes no properties')
        if not isinstance(properties, fitting):
            raise ValueError(
                f'device type "{self.type}" takes {fitting.__name__},'
                f" not {type(properties).__name__}"
            )

    @classmethod
    def parse(cls, device: Any) -> Device:
        """``device`` itself; or that of a str, with no properties; or of another package's Device.

        Raises:
            TypeError: ``device`` is none of these.
            ValueError: there is no such type, or the properties are those of another type.
        """
        if isinstance(device, Device):
            return device
        if isinstance(device, str):
            return cls(device)
        if not _is_device(device):
            raise TypeError(f"expected a device type (str) or a Device, got {type_name(device)}")
        return cls(device.type, device.properties)

    def __str__(self) -> str:
        return self.type if self.properties is None else f"{self.type} {self.properties}"


@dataclass(frozen=True)
class Target:
    """The concrete device that a kernel is chosen for.

    Args:
        type: as for ``Device``.
        capability: its capability, 8.6 written 86; None where the type has none or it is unknown.

    Raises:
        TypeError: ``type`` is not a str, or ``capability`` neither an int nor None.
        ValueError: there is no such type, or it has no capabilities.
    """

    type: str
    capability: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", _device_type(self.type))
        if self.capability is None:
            return
        _check_capability("capability", self.capability)
        if self.type not in _PROPERTIES:
            raise ValueError(f'device type "{self.type}" has no capability')

    def __str__(self) -> str:
        return self.type if self.capability is None else f"{self.type} {self.capability}"


def target_of(device: str | torch.device | Device | Target) -> Target:
    """The concrete device that ``device`` stands for on this machine.

    Args:
        device: a device type, with an index (``"cuda:1"``) or without (the current device), a
            ``torch.device``, a ``Device`` (of this package or of another one that has its
            fields), or a ``Target``, which stands for itself. torch's
            ``cuda`` is ``rocm`` where torch is built for HIP. The capability is that of the
            device with that index; it is None where torch sees no such kind of device.

    Raises:
        TypeError: ``device`` is none of these.
        ValueError: there is no such type, torch sees devices but none with that index, or a
            ``Device`` with properties stands for several capabilities.
    """
    if isinstance(device, Target):
        return device
    index: int | None = None
    if _is_device(device):
        device = Device.parse(device)
        bounds = device.properties
        if bounds is not None:
            if bounds.min_capability != bounds.max_capability:
                raise ValueError(
                    f"{device} is an interval of capabilities, not one device:"
                    f' pass "{device.type}", or a Target with one capability'
                )
            return Target(device.type, bounds.min_capability)
        name = device.type
    elif isinstance(device, str):
        parts = _INDEXED.fullmatch(device)
        name = parts[1] if parts else device
        index = int(parts[2]) if parts and parts[2] else None
    else:
        import torch

        if not isinstance(device, torch.device):
            raise TypeError(
                "device: expected a str, a torch.device, a Device or a Target,"
                f" got {type_name(device)}"
            )
        name, index = device.type, device.index

    kind = _device_type(name, given=device)
    return _gpu_target(kind, index) if kind in _PROPERTIES else Target(kind)


def _gpu_target(kind: str, index: int | None) -> Target:
    import torch

    torch_cuda = "cuda" if torch.version.hip is None else "rocm"
    if kind == "cuda":
        kind = torch_cuda
    if kind != torch_cuda or not torch.cuda.is_available():
        return Target(kind)
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        raise ValueError(f'there is no device "{kind}:{index}": torch sees {count}, from 0')
    major, minor = torch.cuda.get_device_capability(index)
    return Target(kind, major * 10 + minor)


NVML = "libnvidia-ml.so.1"
"""NVIDIA's management library, a part of the driver."""


@functools.cache
def driver_version() -> str:
    """The version of NVIDIA's driver, such as 580.159.04; empty where none says so.

    From NVML (``nvmlSystemGetDriverVersion``), since torch does not tell.
    """
    text = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    try:
        nvml = ctypes.CDLL(NVML)
        failed = nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text))
    except (OSError, AttributeError):  # no such library, or one without these
        return ""
    return "" if failed else text.value.decode()


def device_name(device: torch.device) -> str:
    """The name of a device, as far as computing there depends on it."""
    if device.type in ("cuda", "xpu"):
        import torch

        return str(getattr(torch, device.type).get_device_name(device))
    return device.type
