"""Fixtures for tests with the real client and a Hub on loopback, in the process of the tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import _tree_cache, close_session, constants

from kernelgraph.hub import fetcher
from tests.support.loopback import LoopbackHub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub for this test alone, and an empty cache."""
    with LoopbackHub() as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # for processes that a test starts
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "default-cache"))
        monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("LOCAL_KERNELS", raising=False)
        close_session()
        yield hub
        close_session()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that sets the process offline from its call on, as ``HF_HUB_OFFLINE=1`` does."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def as_a_new_process() -> Callable[[], None]:
    """A function that forgets the listings that the process has read."""

    def forget() -> None:
        fetcher._listings.clear()
        _tree_cache._IN_MEMORY_TREE_CACHE.clear()

    return forget


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The list of the client's pauses between its attempts, which take no time."""
    pauses: list[float] = []
    clock = SimpleNamespace(sleep=pauses.append, time=time.time, perf_counter=time.perf_counter)
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)
    return pauses
