"""Ops and their dispatch: schemas, higher-order ops, and modes that see every op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode


def schema_text(overload: torch._ops.OpOverload) -> str:
    """Return the schema of an op's overload. Tried on 2.11, 2.13, 2.14."""
    return str(overload._schema)


def is_higher_order(target: object) -> bool:
    """Whether the target of a node is a higher-order op, such as ``torch.cond``. Tried on 2.11,
    2.13, 2.14."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def arguments_of(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[Any, bool]]:
    """Return the arguments of an op's call by name, and for each whether the op writes into it.

    Empty for a higher-order op, which has no schema. Tried on 2.13.
    """
    schema = getattr(func, "_schema", None)
    if schema is None:
        return {}
    found = {}
    for number, argument in enumerate(schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        found[argument.name] = (value, writes)
    return found


def storage_of(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's memory, also of a fake's, which has no address. Tried on
    2.13."""
    storage = tensor.untyped_storage()
    identity: int = storage._cdata if is_fake(tensor) else storage.data_ptr()
    return identity
