"""Ops and their dispatch: schemas, higher-order ops, and modes that see every op."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode


def schema_text(overload: torch._ops.OpOverload) -> str:
    """Return the schema of an op's overload. Tried on 2.11, 2.13, 2.14."""
    return str(overload._schema)


def is_higher_order(target: object) -> bool:
    """Whether the target of a node is a higher-order op, such as ``torch.cond``. Tried on 2.11,
    2.13, 2.14."""
    return isinstance(target, torch._ops.HigherOrderOperator)
