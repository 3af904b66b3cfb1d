"""Ops and their dispatch: schemas, higher-order ops, and modes that see every op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
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


# --- transforms and batches of gradients --------------------------------------------------------


def under_transforms(library: Any, name: str, function: Callable[..., object]) -> None:
    """Make an op call ``function`` while a transform of ``torch.func`` is active.

    The key is looked at under a transform only, and costs nothing elsewhere. What the function
    calls is transformed. Without it ``grad`` and ``jvp`` would give zeros. Tried on 2.13.
    """
    library.impl(name, function, "FuncTorchDynamicLayerFrontMode")


def batch_by_loop(library: Any, op: Any) -> None:
    """Make ``vmap``, and ``is_grads_batched``, call an op that returns a list for each item.

    Torch does this itself for ops that return tensors. The gradients of a batch of gradients have
    a dispatch key of their own, from before ``torch.func``. Tried on 2.13.
    """

    def batched(info: Any, dims: Any, *arguments: Any) -> tuple[list[Tensor], list[int]]:
        results = _loop(op, arguments, dims, info.batch_size)
        return results, [0] * len(results)

    def for_gradients(*arguments: Any) -> list[Tensor]:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        inside = [v for v in arguments if _is_batched(v)]
        size = max(torch._remove_batch_dim(v, level, 1, 0).shape[0] for v in inside)
        dims = [0 if _is_batched(v) else None for v in arguments]
        given = [
            torch._remove_batch_dim(v, level, size, 0) if _is_batched(v) else v for v in arguments
        ]
        return [torch._add_batch_dim(v, 0, level) for v in _loop(op, given, dims, size)]

    torch.library.register_vmap(op.name(), batched, lib=library)
    library.impl(op, for_gradients, "Batched")


_BATCHED: Any = torch._C._parse_dispatch_key("Batched")


def _is_batched(value: object) -> bool:
    return isinstance(value, Tensor) and torch._C._dispatch_keys(value).has(_BATCHED)


def _loop(op: Any, arguments: Any, dims: Any, size: int) -> list[Tensor]:
    made = [
        op(*[_item(v, dim, number) for v, dim in zip(arguments, dims, strict=True)])
        for number in range(size)
    ]
    return [torch.stack(tensors) for tensors in zip(*made, strict=True)]


def _item(value: Any, dim: Any, number: int) -> Any:
    """Return one item of an argument that is batched along ``dim``; None: one that is not."""
    if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_item(part, at, number) for part, at in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, number)
