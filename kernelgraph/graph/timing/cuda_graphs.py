"""Which ops cannot be in a CUDA graph: those that synchronize with the device.

To ask for a value on the host while a graph is captured is an error that also leaves the CUDA
generator of random numbers in an invalid state. So where Inductor will make CUDA graphs, each op
is run before, outside of any graph, with torch set to raise where the op synchronizes. Inductor
then cuts the graph around it. Kernels that tune themselves have done so by then. A kernel that
synchronizes without torch is not seen. The setting is the whole process's: another thread that
synchronizes just then gets the error, too.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernelgraph.graph.calls import Call
from kernelgraph.graph.infer import Operands
from kernelgraph.graph.ops import NAMESPACE, results_of
from kernelgraph.report import error_text

logger = logging.getLogger("kernelgraph")


class InferenceCall(NamedTuple):
    """A call of an op for inference, which a trial run can make again."""

    module: nn.Module
    call: Call
    operands: Sequence[object]
    packed: Sequence[int]
    """The operands that the op takes as one list, as in `Lowered`."""


_synchronizes: dict[str, bool] = {}
"""For each op that was run, whether it synchronizes with the device."""


def ops_that_synchronize(calls: Mapping[str, InferenceCall]) -> list[str]:
    """Return the ops that CUDA graphs have to be cut around, by their names in graphs.

    Args:
        calls: A call of each op.
    """
    for name, call in calls.items():
        devices = {v.device.type for v in call.operands if isinstance(v, Tensor)}
        if name not in _synchronizes and "cuda" in devices:
            _synchronizes[name] = _op_synchronizes(name, call)
    return sorted(f"{NAMESPACE}::{name}" for name in calls if _synchronizes.get(name))


def _op_synchronizes(name: str, call: InferenceCall) -> bool:
    try:
        maker = Operands(call.call, call.operands, call.module)
        with maker.apart(0):
            operands = maker.make(0)
            return synchronizes(lambda: results_of(name, call.packed, operands))
    except Exception as error:  # the kernel may fail on operands that are made up
        logger.debug("op %s cannot be tried: %s", name, error_text(error))
        return False


def synchronizes(run: Callable[[], object]) -> bool:
    """Whether code synchronizes with a CUDA device, once it has run twice.

    Raises:
        Exception: Whatever the code raises by itself.
    """
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    try:
        with _synchronizing_raises():
            run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    return False


@contextlib.contextmanager
def _synchronizing_raises() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch warns that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
