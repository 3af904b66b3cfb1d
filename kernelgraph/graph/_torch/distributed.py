"""State of the process: the store of the default process group, the cache of parametrizations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.utils import parametrize


def store_of_group() -> Any:
    """Return the store of the default process group, or None without other processes. Tried on
    2.11, 2.13, 2.14."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    if torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.distributed_c10d._get_default_store()


@contextlib.contextmanager
def parametrizations_uncached() -> Iterator[None]:
    """Run code outside of ``parametrize.cached()``.

    The cache is by the id of a module, so that a value of one that is gone would be found for
    another. Tried on 2.13.
    """
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before
