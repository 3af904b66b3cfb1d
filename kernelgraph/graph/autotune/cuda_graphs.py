"""Which kernels cannot be in a CUDA graph: those that wait for the device.

To ask for a value on the host while a graph is captured is an error, and one that leaves torch's
random numbers in disorder. So where Inductor will make CUDA graphs, each op is run before, outside
of any, with torch told to raise where it waits. Inductor cuts the graph around an op that does.
Kernels that tune themselves have done so by then. What a kernel does past torch is not seen. The
setting is the whole process's: another thread that waits just then gets the error, too.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernelgraph.graph.calls import Call
from kernelgraph.graph.infer import Operands
from kernelgraph.graph.ops import NAMESPACE, results_of
from kernelgraph.report import error_text

logger = logging.getLogger("kernelgraph")


class OpCall(NamedTuple):
    """A call of an op for inference."""

    module: nn.Module
    call: Call
    operands: Sequence[Any]
    packed: Sequence[int]


_waits: dict[str, bool] = {}
"""Of each op that was run, whether it waits for the device."""


def cut_around(calls: Mapping[str, OpCall]) -> list[str]:
    """The ops that CUDA graphs have to be cut around, by the names that graphs have them under.

    Args:
        calls: A call of each op.
    """
    for name, call in calls.items():
        devices = {v.device.type for v in call.operands if isinstance(v, Tensor)}
        if name not in _waits and "cuda" in devices:
            _waits[name] = _op_waits(name, call)
    return sorted(f"{NAMESPACE}::{name}" for name in calls if _waits.get(name))


def _op_waits(name: str, call: OpCall) -> bool:
    try:
        maker = Operands(call.call, call.operands, call.module)
        with maker.apart(0):
            operands = maker.make(0)
            return waits(lambda: results_of(name, call.packed, operands))
    except Exception as error:  # of the kernel, on operands that are made up
        logger.debug("op %s cannot be tried: %s", name, error_text(error))
        return False


def waits(run: Callable[[], Any]) -> bool:
    """Whether code waits for a CUDA device, once it has run twice.

    Raises:
        Exception: What it raises by itself.
    """
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    try:
        with _no_waiting():
            run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    return False


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # the mode is new, it says
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
