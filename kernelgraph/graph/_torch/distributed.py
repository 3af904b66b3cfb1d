"""Process groups: the store of the default one."""

from __future__ import annotations

from typing import Any

import torch


def store_of_group() -> Any:
    """Return the store of the default process group, or None without other processes. Tried on
    2.11, 2.13, 2.14."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    if torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.distributed_c10d._get_default_store()
