"""The mapping in force: what is registered for the process, and in scopes.

Registering and entering a scope make a new ``KernelMapping`` and replace a reference to it, so the
mapping in force may be read without a lock.
"""

from __future__ import annotations

import contextlib
import threading
from contextvars import ContextVar
from types import TracebackType

from kernelgraph.selection.mapping import KernelMapping, MappingLike

# The mapping in force is that of the context's innermost scope or, outside any, the process's own.
# ``_LOCK`` is held where ``_process_mapping`` is replaced, so that no registration gets lost.
_LOCK = threading.Lock()
_process_mapping = KernelMapping()
_SCOPES: ContextVar[tuple[tuple[use_kernel_mapping, KernelMapping], ...]] = ContextVar(
    "kernelgraph_mapping_scopes", default=()
)


def current_mapping() -> KernelMapping:
    """The mapping in force in this thread or asyncio task."""
    scopes = _SCOPES.get()
    return scopes[-1][1] if scopes else _process_mapping


def register_kernel_mapping(mapping: MappingLike, inherit_mapping: bool = True) -> None:
    """Register kernels in the innermost `use_kernel_mapping` or, outside any, for the process.

    The whole mapping is checked first: after an error nothing is registered. Models that are
    kernelized already keep their kernels until the next ``kernelize``. Compiled models are
    compiled again at their next call, if their layers now have other kernels.

    Args:
        mapping: layer name -> ``Device`` or device type -> a repository, or a dict from
            ``Mode`` to repository.
        inherit_mapping: Whether ``mapping`` is added to what is registered; False replaces all
            of it.

    Raises:
        TypeError: If a key or a value of ``mapping`` has the wrong type; the message says which.
        ValueError: If a device type or a mode in ``mapping`` cannot be registered for.

    Example:
        >>> kg.register_kernel_mapping({
        ...     "SiluAndMul": {
        ...         "cpu": kg.LocalLayerRepository("examples/kernels", layer_name="SiluAndMul"),
        ...         "cuda": {
        ...             kg.Mode.INFERENCE: kg.LayerRepository(
        ...                 "kernels-community/activation", layer_name="SiluAndMul", version=1
        ...             ),
        ...         },
        ...     },
        ... })
    """
    global _process_mapping
    newer = KernelMapping.parse(mapping)
    scopes = _SCOPES.get()
    if scopes:
        owner, base = scopes[-1]
        merged = base.merge(newer) if inherit_mapping else newer
        _SCOPES.set((*scopes[:-1], (owner, merged)))
        return
    with _LOCK:
        _process_mapping = _process_mapping.merge(newer) if inherit_mapping else newer


class use_kernel_mapping(contextlib.ContextDecorator):  # noqa: N801
    """A scope with kernels of its own, for a ``with`` statement or a decorated function.

    Scopes nest. A scope holds in its own thread or asyncio task, and in tasks created inside it.
    One object may be entered many times, and from several threads at once. A model that is
    kernelized inside keeps its kernels outside, and the other way round. A compiled model has the
    kernels of the scope that it is called in.

    Args:
        mapping: layer name -> ``Device`` or device type -> a repository, or a dict from
            ``Mode`` to repository. It is read when the object is made, once.
        inherit_mapping: Whether ``mapping`` is added to what is registered where the scope is
            entered; False replaces all of it.

    Raises:
        TypeError: If a key or a value of ``mapping`` has the wrong type; the message says which.
        ValueError: If a device type or a mode in ``mapping`` cannot be registered for.
        RuntimeError: On leaving, in a context where the scope was not entered.

    Example:
        >>> @kg.use_kernel_forward_from_hub("SiluAndMul")
        ... class SiluAndMul(torch.nn.Module):
        ...     def forward(self, x):
        ...         gate, up = x.chunk(2, dim=-1)
        ...         return torch.nn.functional.silu(gate) * up
        >>> kernel = kg.LocalLayerRepository("examples/kernels", layer_name="SiluAndMul")
        >>> with kg.use_kernel_mapping({"SiluAndMul": {"cpu": kernel}}):
        ...     model = kg.kernelize(SiluAndMul(), mode=kg.Mode.INFERENCE, device="cpu")
        >>> len(kg.last_report().kernels)
        1
    """

    def __init__(self, mapping: MappingLike, inherit_mapping: bool = True) -> None:
        self._mapping = KernelMapping.parse(mapping)
        self._inherit = inherit_mapping

    def __enter__(self) -> None:
        mapping = current_mapping().merge(self._mapping) if self._inherit else self._mapping
        _SCOPES.set((*_SCOPES.get(), (self, mapping)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # This scope is removed and not just the innermost: generators that hold scopes may be
        # closed in another order than they were opened in.
        scopes = _SCOPES.get()
        for i in reversed(range(len(scopes))):
            if scopes[i][0] is self:
                _SCOPES.set(scopes[:i] + scopes[i + 1 :])
                return
        raise RuntimeError("use_kernel_mapping: left in a context where it was not entered")
