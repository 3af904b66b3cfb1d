from __future__ import annotations

import pytest

from kernelgraph import cache
from tests.support.trials import forget_verdicts


@pytest.fixture(autouse=True)
def no_verdict_is_known() -> None:
    """Start each test without verdicts, in the process and on disk."""
    forget_verdicts()
    cache.clear()
