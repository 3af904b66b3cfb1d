"""Where in a model an op is called from, for the errors of its kernel."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable

from torch import Tensor, nn


class Places:
    """The paths of the layers that call one op. Layers that are alike share an op."""

    def __init__(self) -> None:
        self._paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

    def add(self, module: nn.Module, path: str) -> None:
        """Note that the op is called for ``module``, which the model has at ``path``."""
        self._paths[module] = path

    def describe(self, operands: Iterable[object]) -> str:
        """Words for the layer that is called with ``operands``: those of its places whose weights
        are among them, or if none can be told by its weights, all."""
        given = {v.data_ptr() for v in operands if isinstance(v, Tensor)} - {0}
        paths = [path for module, path in self._paths.items() if _holds_any(module, given)]
        paths = paths or list(self._paths.values())
        paths = [path or "(model)" for path in dict.fromkeys(paths)]
        if len(paths) < 2:
            return "".join(f" at {path}" for path in paths)
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        return f" at one of {', '.join(paths[:3])}{more}"


def _holds_any(module: nn.Module, addresses: set[int]) -> bool:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return any(tensor.data_ptr() in addresses for tensor in tensors)
