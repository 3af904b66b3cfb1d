"""The settings and fixtures of all tests."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

_cache = tempfile.TemporaryDirectory(prefix="kernelgraph-inductor-")
# Set before any test module is imported: torch reads the directory once.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _cache.name)
# Tests run in parallel, and tiny models are faster on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test reads or writes the cache of the user's own programs.
_findings = tempfile.TemporaryDirectory(prefix="kernelgraph-cache-")
os.environ["KERNELGRAPH_CACHE_DIR"] = _findings.name
# Kernels are used however long they take; tests of what is fastest set another policy.
os.environ["KERNELGRAPH_POLICY"] = "always"
# torch is stricter if this is set; tests of that set it themselves, on every machine.
os.environ.pop("CI", None)

import torch  # noqa: E402 (it reads some of these as it is imported)

pytest_plugins = ["tests.support.example_kernels", "tests.support.hub"]

# Each run tries the same examples, however slow the machine is: only a change makes a run fail.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", derandomize=False, deadline=None)
hypothesis.settings.load_profile("same")


class _Random:
    """torch's random numbers, for Hypothesis to seed: an example that fails will fail again."""

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.default_generator.get_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.default_generator.set_state(state)


_random = _Random()
hypothesis.register_random(_random)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No test runs code that another one compiled."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    # The last DistributedDataParallel to hold the group waits for the group's threads, while it has
    # a lock that they may wait for.
    torch.compiler.reset()
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for the ``kernels`` package, in the place of that package."""
    from tests.support import other_package

    monkeypatch.setitem(sys.modules, "kernels", other_package)
    return other_package


@pytest.fixture(params=["stand-in", "kernels"])
def theirs(request: pytest.FixtureRequest) -> Any:
    """Another package that tags layers: a stand-in and, where it is installed, ``kernels``."""
    if request.param == "kernels":
        return pytest.importorskip("kernels")
    return request.getfixturevalue("stand_in")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a CUDA device where there is none."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
