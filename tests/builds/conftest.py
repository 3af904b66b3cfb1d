"""Fixtures of the tests of builds: a small repository, and a process without its kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.toy_repository import write_repository


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    write_repository(tmp_path / "repo")
    return tmp_path / "repo"


@pytest.fixture(autouse=True)
def no_kernels_left() -> Iterator[None]:
    """Each test starts and ends without a toy kernel of ours in ``sys.modules``."""
    yield
    for name in [n for n in sys.modules if n.startswith("kernelgraph_")]:
        del sys.modules[name]
