"""Fixtures of all tests of autotuning."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernelgraph.graph.autotune import records
from kernelgraph.graph.timing import samplers
from tests.support.costs import CLOCK


@pytest.fixture(autouse=True)
def fresh_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without winners, in the process and on disk."""
    monkeypatch.setenv("KERNELGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    records.forget()


@pytest.fixture(autouse=True)
def toy_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are timed by the clock that only toys move; on a device, by that of the device."""
    if request.node.get_closest_marker("cuda") is None:
        monkeypatch.setattr(samplers, "clock", CLOCK)
