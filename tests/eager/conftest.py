"""Fixtures of the tests of eager use: what kernelgraph logs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from kernelgraph import report


@pytest.fixture
def warnings(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[str]]:
    """The warnings of this test so far, also those that another test has caused before."""
    caplog.set_level(logging.WARNING, logger="kernelgraph")
    monkeypatch.setattr(report, "_warned", set())
    return lambda: caplog.messages


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The log records so far, from INFO on."""
    caplog.set_level(logging.INFO, logger="kernelgraph")
    return lambda: caplog.messages
