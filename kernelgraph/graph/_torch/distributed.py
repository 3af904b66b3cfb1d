"""The store of the default process group."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake as is_fake
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols as free_unbacked_symbols


def store_of_group() -> Any:
    """The store of the default process group; None where there is no other process in one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    if torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.distributed_c10d._get_default_store()
