"""Hub compute kernels for PyTorch models: eager, compiled and exported.

Importing this package imports neither torch nor huggingface_hub: the names below are loaded
at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kernelgraph._version import __version__ as __version__

if TYPE_CHECKING:
    from kernelgraph.archive import aot_compile, aot_load, load, save
    from kernelgraph.builds import get_kernel_dep
    from kernelgraph.eager import kernelize
    from kernelgraph.graph.fx import Tracer, rewrite
    from kernelgraph.hub import (
        FuncRepository,
        LayerRepository,
        LocalFuncRepository,
        LocalLayerRepository,
        LockedLayerRepository,
        get_kernel,
        get_local_kernel,
        get_locked_kernel,
        has_kernel,
    )
    from kernelgraph.layers import (
        replace_kernel_forward_from_hub,
        use_kernel_forward_from_hub,
        use_kernelized_func,
    )
    from kernelgraph.programs import export
    from kernelgraph.report import last_report
    from kernelgraph.selection import (
        CUDAProperties,
        Device,
        KernelizeFallback,
        Mode,
        ROCMProperties,
        register_kernel_mapping,
        use_kernel_mapping,
    )

_HOMES = {
    "CUDAProperties": "selection",
    "Device": "selection",
    "FuncRepository": "hub",
    "KernelizeFallback": "selection",
    "LayerRepository": "hub",
    "LocalFuncRepository": "hub",
    "LocalLayerRepository": "hub",
    "LockedLayerRepository": "hub",
    "Mode": "selection",
    "ROCMProperties": "selection",
    "Tracer": "graph.fx",
    "aot_compile": "archive",
    "aot_load": "archive",
    "export": "programs",
    "get_kernel": "hub",
    "get_kernel_dep": "builds",
    "get_local_kernel": "hub",
    "get_locked_kernel": "hub",
    "has_kernel": "hub",
    "kernelize": "eager",
    "last_report": "report",
    "load": "archive",
    "register_kernel_mapping": "selection",
    "replace_kernel_forward_from_hub": "layers",
    "rewrite": "graph.fx",
    "save": "archive",
    "use_kernel_forward_from_hub": "layers",
    "use_kernel_mapping": "selection",
    "use_kernelized_func": "layers",
}

__all__ = [
    "CUDAProperties",
    "Device",
    "FuncRepository",
    "KernelizeFallback",
    "LayerRepository",
    "LocalFuncRepository",
    "LocalLayerRepository",
    "LockedLayerRepository",
    "Mode",
    "ROCMProperties",
    "Tracer",
    "aot_compile",
    "aot_load",
    "export",
    "get_kernel",
    "get_kernel_dep",
    "get_local_kernel",
    "get_locked_kernel",
    "has_kernel",
    "kernelize",
    "last_report",
    "load",
    "register_kernel_mapping",
    "replace_kernel_forward_from_hub",
    "rewrite",
    "save",
    "use_kernel_forward_from_hub",
    "use_kernel_mapping",
    "use_kernelized_func",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kernelgraph' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kernelgraph.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
