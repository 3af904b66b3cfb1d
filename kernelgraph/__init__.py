"""Hub compute kernels for PyTorch models: eager, compiled and exported.

Importing this package imports neither torch nor huggingface_hub: the names below are loaded
at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelgraph.devices import CUDAProperties, Device, ROCMProperties
    from kernelgraph.eager import kernelize
    from kernelgraph.graph.archive import aot_compile, aot_load, load, save
    from kernelgraph.graph.export import export
    from kernelgraph.graph.rewrite import rewrite
    from kernelgraph.graph.tracer import Tracer
    from kernelgraph.hub.importing import get_kernel_dep
    from kernelgraph.hub.kernels import (
        get_kernel,
        get_local_kernel,
        get_locked_kernel,
        has_kernel,
    )
    from kernelgraph.hub.repositories import (
        FuncRepository,
        LayerRepository,
        LocalFuncRepository,
        LocalLayerRepository,
        LockedLayerRepository,
    )
    from kernelgraph.layers import (
        replace_kernel_forward_from_hub,
        use_kernel_forward_from_hub,
        use_kernelized_func,
    )
    from kernelgraph.mapping import register_kernel_mapping, use_kernel_mapping
    from kernelgraph.modes import KernelizeFallback, Mode
    from kernelgraph.report import last_report

_HOMES = {
    "CUDAProperties": "devices",
    "Device": "devices",
    "FuncRepository": "hub.repositories",
    "KernelizeFallback": "modes",
    "LayerRepository": "hub.repositories",
    "LocalFuncRepository": "hub.repositories",
    "LocalLayerRepository": "hub.repositories",
    "LockedLayerRepository": "hub.repositories",
    "Mode": "modes",
    "ROCMProperties": "devices",
    "Tracer": "graph.tracer",
    "aot_compile": "graph.archive",
    "aot_load": "graph.archive",
    "export": "graph.export",
    "get_kernel": "hub.kernels",
    "get_kernel_dep": "hub.importing",
    "get_local_kernel": "hub.kernels",
    "get_locked_kernel": "hub.kernels",
    "has_kernel": "hub.kernels",
    "kernelize": "eager",
    "last_report": "report",
    "load": "graph.archive",
    "register_kernel_mapping": "mapping",
    "replace_kernel_forward_from_hub": "layers",
    "rewrite": "graph.rewrite",
    "save": "graph.archive",
    "use_kernel_forward_from_hub": "layers",
    "use_kernel_mapping": "mapping",
    "use_kernelized_func": "layers",
}

__version__ = "0.1.0"
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
