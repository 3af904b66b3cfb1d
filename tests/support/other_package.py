"""A stand-in for the ``kernels`` package, with all of that package that ours meets.

It has the names of the ``kernels`` package and its behaviour: a function becomes a new class
without a name of its own at each load, and every layer gets a condition. Its flags have other bits.
"""

from __future__ import annotations

import enum
import importlib.util
import inspect
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tests.support.toy_repository import METADATA, layer_files, write_repository


class Mode(enum.Flag):
    FALLBACK = enum.auto()
    TRAINING = enum.auto()
    INFERENCE = enum.auto()
    TORCH_COMPILE = enum.auto()


class KernelizeFallback(enum.Flag):
    NONE = 0
    CANNOT_LOAD = enum.auto()
    NO_LAYER = enum.auto()
    NO_DEVICE = enum.auto()
    NO_COMPATIBLE_PROPERTIES = enum.auto()
    NO_COMPATIBLE_MODE = enum.auto()
    DEFAULT = NO_LAYER | NO_DEVICE | NO_COMPATIBLE_PROPERTIES | NO_COMPATIBLE_MODE
    ALL = DEFAULT | CANNOT_LOAD


@dataclass(frozen=True)
class CUDAProperties:
    min_capability: int
    max_capability: int


@dataclass(frozen=True)
class ROCMProperties:
    min_capability: int
    max_capability: int


@dataclass(frozen=True)
class Device:
    type: str
    properties: CUDAProperties | ROCMProperties | None = None


@dataclass(frozen=True)
class LocalLayerRepository:
    repo_path: Path
    layer_name: str

    def load(self) -> type[nn.Module]:
        layer: type[nn.Module] = getattr(_import(self.repo_path).layers, self.layer_name)
        return layer


@dataclass(frozen=True)
class LocalFuncRepository:
    repo_path: Path
    func_name: str

    def load(self) -> type[nn.Module]:
        return _function_class(getattr(_import(self.repo_path), self.func_name))


@dataclass(frozen=True)
class LoadedKernel:
    module: ModuleType


_loaded: dict[Path, LoadedKernel] = {}


def get_loaded_kernels() -> list[LoadedKernel]:
    return list(_loaded.values())


def _import(path: Path) -> ModuleType:
    (variant,) = (path / "build").iterdir()
    if variant in _loaded:
        return _loaded[variant].module
    name = json.loads((variant / "metadata.json").read_text())["id"]
    file = variant / "__init__.py"
    if not file.is_file():  # the older layout
        file = variant / "toy" / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _loaded[variant] = LoadedKernel(module)
    return module


def replace_kernel_forward_from_hub(cls: Any, layer_name: str) -> None:
    cls.kernel_layer_name = layer_name
    cls.kernel_condition = staticmethod(lambda module: True)


def use_kernel_forward_from_hub(layer_name: str) -> Callable[[Any], Any]:
    def decorate(target: Any) -> Any:
        cls = target if isinstance(target, type) else _function_class(target)
        replace_kernel_forward_from_hub(cls, layer_name)
        return cls if cls is target else cls()

    return decorate


def use_kernelized_func(*functions: Any) -> Callable[[Any], Any]:
    def decorate(cls: Any) -> Any:
        init = cls.__init__

        def with_functions(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            for function in functions:
                vars(self).setdefault("_kernel_funcs", {})[function.kernel_layer_name] = function

        cls.__init__ = with_functions
        return cls

    return decorate


def _function_class(function: Callable[..., Any]) -> type[nn.Module]:
    class Func(nn.Module):
        can_torch_compile = getattr(function, "can_torch_compile", False)
        has_backward = getattr(function, "has_backward", True)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    Func.forward.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
    return Func


# --- kernels that the package and ours load -----------------------------------------------------

FUNCTIONS = """
import statistics
import torch

def shifted(x):
    return x + {result}
shifted.can_torch_compile = True

def plain(x):
    return x - {result}

relu = torch.ops.aten.relu
mean = statistics.mean
"""

_count = itertools.count()


def write_kernel(path: Path, result: int = 1, layers: str | None = None) -> Path:
    """Write a kernel that the ``kernels`` package loads too, with layers and functions."""
    files = layer_files(result=result)
    files["__init__.py"] = f"{files['__init__.py']}{FUNCTIONS.format(result=result)}"
    files["layers.py"] = layers or files["layers.py"]
    # Each has another id, because it is the name of the module.
    changes = {
        "id": f"_toy_foreign_{next(_count)}",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    write_repository(path, files, metadata=METADATA | changes)
    return path
