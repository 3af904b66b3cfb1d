"""The keys under which findings about kernels are kept: versions, kernel, layer and source."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sys
from pathlib import Path

import torch

from kernelgraph import _version
from kernelgraph.fingerprint import code_hash
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible


def versions() -> tuple[str, str, str]:
    """Of kernelgraph, torch and triton: by others what was found out about kernels may be wrong."""
    return _version.__version__, torch.__version__, _triton_version()


def kernel_key(kernel: Kernel) -> tuple[tuple[str, str, str], tuple[str, str]]:
    """What tells a kernel from all others, and one commit of it from another, in any process."""
    origin = kernel.origin
    code = kernel.layer.__name__, code_hash(kernel.forward)
    return (origin.name, origin.revision, origin.variant), code


def layer_key(layer: Extensible) -> tuple[str, str]:
    """What tells a layer from all others, and from itself with other code, in any process."""
    return f"{layer.owner.__module__}.{layer.owner.__qualname__}", code_hash(layer.reference)


def source_of(layer: Extensible, kernel: Kernel) -> str:
    """A hash of all the code that a verdict is of; empty where there is none that tells.

    A kernel's revision is one, but for a class that is in no kernel: what its ``forward`` calls
    may change. Of a layer it is that of the file that it is in.
    """
    return _file_hash(layer.owner.__module__) if kernel.origin.variant else ""


@functools.cache
def _file_hash(module: str) -> str:
    try:
        return hashlib.sha256(Path(sys.modules[module].__file__ or "").read_bytes()).hexdigest()
    except (KeyError, AttributeError, OSError):
        return ""


@functools.cache
def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""
