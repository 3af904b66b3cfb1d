"""Keys under which findings about kernels are kept: a key is the same in every process.

Two wings keep findings, and put their keys together from these parts: `graph.verify` keeps whether
a kernel may train, and `graph.autotune` keeps which program is fastest.

- `versions` is part of every key, so that another kernelgraph, torch or triton finds nothing.
- `kernel_key` identifies a kernel: its repository, revision and build, and its code.
- `layer_key` identifies the layer that a kernel replaces: its name and its code.
- `source_of` is a hash of the file that the layer is in. `graph.verify` writes no verdict to the
  disk without it, and `graph.autotune` traces no kernel for training without it.
"""

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


def software_versions() -> tuple[str, str, str]:
    """The versions of kernelgraph, torch and triton: under others a finding may be wrong."""
    return _version.__version__, torch.__version__, _triton_version()


def kernel_key(kernel: Kernel) -> tuple[tuple[str, str, str], tuple[str, str]]:
    """The key of a kernel: different for every other kernel, and for another commit of it."""
    origin = kernel.origin
    code = kernel.layer.__name__, code_hash(kernel.forward)
    return (origin.name, origin.revision, origin.variant), code


def layer_key(layer: Extensible) -> tuple[str, str]:
    """The key of a layer: different for every other layer, and for the same one with other code."""
    return f"{layer.owner.__module__}.{layer.owner.__qualname__}", code_hash(layer.reference)


def source_of(layer: Extensible, kernel: Kernel) -> str:
    """A hash of all code that a verdict on ``kernel`` depends on; empty if there is no such hash.

    The code of a kernel in a repository is identified by its revision. For a class that is in no
    repository there is no hash, since the code that its ``forward`` calls may change. The code of
    the layer is identified by a hash of the file that defines it.
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
