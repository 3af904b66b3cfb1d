from __future__ import annotations

import pytest

from tests.support.norm_op import runs


@pytest.fixture(autouse=True)
def fresh_runs() -> None:
    """Start each test with no noted run."""
    runs.clear()
