"""Devices: those that kernels are registered for, and the one that a kernel is sought for.

A `Device` may have an interval of capabilities; a `Target` is one device with one capability.
"""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeGuard

if TYPE_CHECKING:
    import torch
    from torch import nn

DEVICE_TYPES = ("cpu", "cuda", "rocm", "mps", "npu", "xpu", "neuron", "tpu")
"""The device types that kernels may be built for, in the Hub's words."""

_ALIASES = {"metal": "mps"}

_INDEXED = re.compile(r"([^:]*)(?::(0|[1-9][0-9]*))?")


def type_name(value: object) -> str:
    """The type of ``value`` as error messages show it, with its module: more than one package
    has a class ``Device``."""
    cls = type(value)
    in_builtins = cls.__module__ == "builtins"
    return cls.__qualname__ if in_builtins else f"{cls.__module__}.{cls.__qualname__}"


def _device_type(name: object, given: object = None) -> str:
    """The device type called ``name``; an error shows ``given``, of which it was a part."""
    if not isinstance(name, str):
        raise TypeError(f"device type: expected a str, got {type_name(name)}")
    device_type = _ALIASES.get(name, name)
    if device_type not in DEVICE_TYPES:
        types = ", ".join(DEVICE_TYPES)
        raise ValueError(
            f'unknown device type "{given or name}": there are {types} (metal means mps)'
        )
    return device_type


def _check_capability(field: str, value: object) -> None:
    # Python takes a bool for an int, and True is no capability.
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{field}: expected an int (8.6 is written 86), got {type_name(value)}")
    if value < 0:
        raise ValueError(f"{field} must not be negative, got {value}")


@dataclass(frozen=True)
class _CapabilityBounds:
    """An interval of capabilities, both bounds included."""

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
    """The interval of CUDA compute capabilities that a kernel is registered for.

    Args:
        min_capability: The lowest; compute capability 8.6 is written 86.
        max_capability: The highest, itself included.

    Raises:
        TypeError: If a bound is not an int.
        ValueError: If a bound is negative, or ``min_capability`` exceeds ``max_capability``.

    Example:
        >>> ampere_to_hopper = kg.CUDAProperties(min_capability=80, max_capability=90)
        >>> 86 in ampere_to_hopper, 100 in ampere_to_hopper
        (True, False)
    """


class ROCMProperties(_CapabilityBounds):
    """The interval of ROCm capabilities that a kernel is registered for, as torch numbers them.

    Args:
        min_capability: The lowest; ``torch.cuda.get_device_capability() == (9, 4)`` is
            written 94.
        max_capability: The highest, itself included.

    Raises:
        TypeError: If a bound is not an int.
        ValueError: If a bound is negative, or ``min_capability`` exceeds ``max_capability``.

    Example:
        >>> print(kg.Device("rocm", kg.ROCMProperties(90, 94)))
        rocm 90-94
    """


# The device types that have capabilities; the others take no properties.
_PROPERTIES: dict[str, type[_CapabilityBounds]] = {"cuda": CUDAProperties, "rocm": ROCMProperties}


class _HasBounds(Protocol):
    """Another package's properties."""

    @property
    def min_capability(self) -> int: ...
    @property
    def max_capability(self) -> int: ...


class _HasDeviceFields(Protocol):
    """A ``Device``, or another package's, whose properties `Device` converts."""

    @property
    def type(self) -> str: ...
    @property
    def properties(self) -> CUDAProperties | ROCMProperties | None: ...


def _properties(given: object) -> _CapabilityBounds:
    """Return ``given`` itself, or the counterpart of another package's properties."""
    if isinstance(given, _CapabilityBounds):
        return given
    for cls in _PROPERTIES.values():
        if _is_named(given, cls.__name__):
            return cls(given.min_capability, given.max_capability)
    raise TypeError(
        f"properties: expected CUDAProperties, ROCMProperties or None, got {type_name(given)}"
    )


def _is_named(properties: object, name: str) -> TypeGuard[_HasBounds]:
    """Whether ``properties`` is of a class called ``name``, in whichever package."""
    return type(properties).__name__ == name


def _is_device(value: object) -> TypeGuard[_HasDeviceFields]:
    """Whether ``value`` is a ``Device``, or has the fields of the ``kernels`` package's."""
    return hasattr(value, "type") and hasattr(value, "properties")


@dataclass(frozen=True)
class Device:
    """A kind of device that a kernel is registered for.

    Args:
        type: cpu, cuda, rocm, mps (or metal, which means mps), npu, xpu, neuron or tpu.
        properties: The capabilities that the kernel is for, with ``cuda`` and ``rocm`` only;
            None means every capability.

    Raises:
        TypeError: If ``type`` is not a str, or ``properties`` is no properties object.
        ValueError: If there is no such type, or the properties are those of another type.

    Example:
        >>> hopper = kg.Device("cuda", kg.CUDAProperties(90, 90))
        >>> kernel = kg.LayerRepository(
        ...     "kernels-community/activation", layer_name="SiluAndMul", version=1
        ... )
        >>> kg.register_kernel_mapping({"SiluAndMul": {hopper: kernel}})
        >>> kg.Device("metal") == kg.Device("mps")
        True
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
    def parse(cls, device: object) -> Device:
        """Return ``device`` itself, the device of a type's name, or another package's as this one.

        Raises:
            TypeError: If ``device`` is none of these.
            ValueError: If there is no such type, or the properties are those of another type.
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
        type: As for ``Device``.
        capability: Its capability, 8.6 written 86; None where the type has none or it is unknown.

    Raises:
        TypeError: If ``type`` is not a str, or ``capability`` neither an int nor None.
        ValueError: If there is no such type, or the type has no capabilities.
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
        device: A device type, with an index (``"cuda:1"``) or without (the current device), a
            ``torch.device``, a ``Device`` (of this package or of another one that has its
            fields), or a ``Target``, which stands for itself.

    Returns:
        The device. torch's ``cuda`` is ``rocm`` where torch is built for HIP. The capability is
        that of the device with that index; it is None where torch sees no device of the type.

    Raises:
        TypeError: If ``device`` is none of these.
        ValueError: If there is no such type, torch sees devices but none with that index, or a
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

    device_type = _device_type(name, given=device)
    return _gpu_target(device_type, index) if device_type in _PROPERTIES else Target(device_type)


def _gpu_target(device_type: str, index: int | None) -> Target:
    import torch

    own_type = "cuda" if torch.version.hip is None else "rocm"
    if device_type == "cuda":  # torch calls the devices of a HIP build so, too
        device_type = own_type
    if device_type != own_type or not torch.cuda.is_available():
        return Target(device_type)
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        raise ValueError(f'there is no device "{device_type}:{index}": torch sees {count}, from 0')
    major, minor = torch.cuda.get_device_capability(index)
    return Target(device_type, major * 10 + minor)


def first_device(module: nn.Module) -> torch.device | None:
    """The device of the first parameter of ``module``, else of its first buffer, if it has any."""
    tensor: torch.Tensor | None = next(module.parameters(), None)
    if tensor is None:
        tensor = next(module.buffers(), None)
    return None if tensor is None else tensor.device


NVML = "libnvidia-ml.so.1"
"""NVIDIA's management library, a part of the driver."""


@functools.cache
def driver_version() -> str:
    """The version of NVIDIA's driver, such as 580.159.04; empty if there is no such driver.

    It comes from NVML (``nvmlSystemGetDriverVersion``), because torch does not have it.
    """
    text = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    try:
        nvml = ctypes.CDLL(NVML)
        failed = nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text))
    except (OSError, AttributeError):  # no such library, or one without these
        return ""
    return "" if failed else text.value.decode()


def device_name(device: torch.device) -> str:
    """The model of a GPU, else the device type: all that times and results depend on."""
    if device.type in ("cuda", "xpu"):
        import torch

        return str(getattr(torch, device.type).get_device_name(device))
    return device.type
