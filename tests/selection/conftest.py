from __future__ import annotations

import pytest

from kernelgraph.selection.scopes import register_kernel_mapping


@pytest.fixture(autouse=True)
def nothing_registered():
    """No kernel is registered, before each test and after it."""
    register_kernel_mapping({}, inherit_mapping=False)
    yield
    register_kernel_mapping({}, inherit_mapping=False)
