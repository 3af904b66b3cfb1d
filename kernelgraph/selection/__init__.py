"""Selection: which registered kernel serves a layer on a device in a mode.

`devices` has what a kernel is registered for (`Device`) and what it is sought for (`Target`), and
`modes` what a model is about to be used for (`Mode`). A `KernelMapping` (`mapping`) holds all that
is registered, for the process or in a scope (`scopes`), and `matching` chooses among it. `choices`
tells whether another mapping chooses the same. Nothing here loads a kernel, and torch is imported
only to ask for its devices.

Invariants:

- A `KernelMapping` never changes: registering makes a new one, so it is read without a lock.
- A caller's dicts are checked as a whole: after an error the mapping is the one before.
- A `Device` has properties only if its type has capabilities (``cuda``, ``rocm``), and only those
  of its own type; the same holds for the capability of a `Target`.
- No `Mode` joins ``INFERENCE`` with ``TRAINING``, or ``FALLBACK`` with another mode.
- `selections` is a pure function: equal mappings, names, targets and modes give equal results.
- The objects of the ``kernels`` package (its ``Mode``, ``Device``, properties, repositories) are
  taken wherever those of this package are.
"""

from kernelgraph.selection.choices import Choices
from kernelgraph.selection.devices import (
    DEVICE_TYPES,
    CUDAProperties,
    Device,
    ROCMProperties,
    Target,
    device_name,
    driver_version,
    first_device,
    target_of,
    type_name,
)
from kernelgraph.selection.mapping import KernelMapping
from kernelgraph.selection.matching import Rejection, Selection, selections
from kernelgraph.selection.modes import KernelizeFallback, Mode, serving_modes
from kernelgraph.selection.scopes import (
    current_mapping,
    register_kernel_mapping,
    use_kernel_mapping,
)

__all__ = [
    "DEVICE_TYPES",
    "CUDAProperties",
    "Choices",
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
    "first_device",
    "register_kernel_mapping",
    "selections",
    "serving_modes",
    "target_of",
    "type_name",
    "use_kernel_mapping",
]
