"""The cache directory and the input of these tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4)
