"""Hub compute kernels for PyTorch models: eager, compiled and exported.

Importing this package imports neither torch nor huggingface_hub: each public name is loaded at
its first use, from the part of the package that ``_HOMES`` gives for it.

Names that follow one another in most programs: a layer class is made extensible
(`use_kernel_forward_from_hub`), a kernel is registered for it (`register_kernel_mapping` with a
`LayerRepository`), and then a model is kernelized (`kernelize`), compiled
(``torch.compile(model, backend="hubkernels")``) or exported (`export`, `save`, `load`).
`last_report` says which layers run on a kernel, and why the others do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kernelgraph._version import __version__ as __version__

# For type checkers and editors alone. "X as X" makes a name public to them without a literal
# ``__all__``. tests/test_package.py holds these imports and ``_HOMES`` equal.
if TYPE_CHECKING:
    from kernelgraph.archive import aot_compile as aot_compile
    from kernelgraph.archive import aot_load as aot_load
    from kernelgraph.archive import load as load
    from kernelgraph.archive import save as save
    from kernelgraph.builds import get_kernel_dep as get_kernel_dep
    from kernelgraph.eager import kernelize as kernelize
    from kernelgraph.graph.fx import Tracer as Tracer
    from kernelgraph.graph.fx import rewrite as rewrite
    from kernelgraph.hub import FuncRepository as FuncRepository
    from kernelgraph.hub import LayerRepository as LayerRepository
    from kernelgraph.hub import LocalFuncRepository as LocalFuncRepository
    from kernelgraph.hub import LocalLayerRepository as LocalLayerRepository
    from kernelgraph.hub import LockedLayerRepository as LockedLayerRepository
    from kernelgraph.hub import get_kernel as get_kernel
    from kernelgraph.hub import get_local_kernel as get_local_kernel
    from kernelgraph.hub import get_locked_kernel as get_locked_kernel
    from kernelgraph.hub import has_kernel as has_kernel
    from kernelgraph.layers import (
        replace_kernel_forward_from_hub as replace_kernel_forward_from_hub,
    )
    from kernelgraph.layers import use_kernel_forward_from_hub as use_kernel_forward_from_hub
    from kernelgraph.layers import use_kernelized_func as use_kernelized_func
    from kernelgraph.programs import export as export
    from kernelgraph.report import last_report as last_report
    from kernelgraph.selection import CUDAProperties as CUDAProperties
    from kernelgraph.selection import Device as Device
    from kernelgraph.selection import KernelizeFallback as KernelizeFallback
    from kernelgraph.selection import Mode as Mode
    from kernelgraph.selection import ROCMProperties as ROCMProperties
    from kernelgraph.selection import register_kernel_mapping as register_kernel_mapping
    from kernelgraph.selection import use_kernel_mapping as use_kernel_mapping

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
"""The public names, each with the sub-package or module that it is loaded from."""

# A type checker that met this, which it cannot evaluate, would take no name for public.
if not TYPE_CHECKING:
    __all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kernelgraph' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"kernelgraph.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
