"""Nested values as PyTorch's own pytree takes them apart, with every registered container.

``torch.utils._pytree`` has no public name for its functions. Tried on 2.11, 2.13, 2.14.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils import _pytree

T = TypeVar("T")


def tree_leaves(value: object) -> list[object]:
    """Return the leaves of a nested value."""
    return _pytree.tree_leaves(value)


def tensor_leaves(value: object) -> list[Tensor]:
    """Return the tensors among the leaves of a nested value."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], value: T) -> T:
    """Return ``value`` with ``function`` applied to each tensor in it."""
    mapped: T = _pytree.tree_map_only(Tensor, function, value)
    return mapped
