"""Fixtures: the kernel repository of ``examples/kernels``, built once in a test run."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from kernelgraph import get_local_kernel
from tests.support.sources import import_example


@pytest.fixture(scope="session")
def repository() -> Path:
    """The kernel repository, built if it is out of date."""
    root: Path = import_example("kernels/build").build()
    return root


@pytest.fixture(scope="session")
def cpu(repository: Path) -> ModuleType:
    """The kernel that is built for the CPU."""
    return get_local_kernel(repository, backend="cpu")
