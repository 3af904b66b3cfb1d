"""TODO."""

from kernelgraph.selection.devices import (
    DEVICE_TYPES,
    CUDAProperties,
    Device,
    ROCMProperties,
    Target,
    device_name,
    driver_version,
    target_of,
    type_name,
)
from kernelgraph.selection.mapping import (
    KernelMapping,
    Rejection,
    Selection,
    current_mapping,
    register_kernel_mapping,
    selections,
    use_kernel_mapping,
)
from kernelgraph.selection.modes import KernelizeFallback, Mode, tried

__all__ = [
    "DEVICE_TYPES",
    "CUDAProperties",
    "Device",
    "KernelMapping",
    "KernelizeFallback",
    "Mode",
    "ROCMProperties",
    "Rejection",
    "Selection",
    "Target",
    "current_mapping",
    "device_name",
    "driver_version",
    "register_kernel_mapping",
    "selections",
    "target_of",
    "tried",
    "type_name",
    "use_kernel_mapping",
]
