"""The winner where nothing is measured: a guess by the ops of the layer's own forward.

Compilers fuse what is elementwise or a reduction with its neighbours, so such layers keep their
references, and others take their kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kernelgraph.graph import _torch
from kernelgraph.graph.autotune.candidates import UntunedCall
from kernelgraph.graph.autotune.records import Implementation, Winner
from kernelgraph.graph.calls import Runner
from kernelgraph.graph.infer import run_on_fakes


def winner_by_rule(untuned: UntunedCall, why: str) -> Winner:
    """Return what is right most often.

    Args:
        untuned: The call.
        why: The reason why nothing was measured, for people.
    """
    fused = _is_fused(untuned)
    implementation = Implementation.REFERENCE if fused else Implementation.OP
    return Winner(implementation, 0, f"not measured: {why}", measured=False)


def _is_fused(untuned: UntunedCall) -> bool:
    """Whether a compiler would compute the whole layer together with the nodes around it."""
    watcher = _OpWatcher()  # type: ignore[no-untyped-call]

    def reference(module: object, *args: object, **kwargs: object) -> object:
        with watcher:
            result: object = untuned.site.layer.reference(module, *args, **kwargs)
            return result

    try:
        run_on_fakes(Runner(reference, untuned.call), untuned.operands)
    except Exception:  # it depends on values
        return False
    return not watcher.found_unfused


class _OpWatcher(_torch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an op runs that is neither elementwise, nor a reduction, nor about memory."""

    found_unfused = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = func._opname
        tagged = {torch.Tag.pointwise, torch.Tag.reduction} & set(func.tags)
        is_query = func.namespace == "prim"  # of a tensor's device, for instance
        if not (tagged or is_query or func.is_view or name.removesuffix("_") in _UNTAGGED):
            self.found_unfused = True
        result: object = func(*args, **(kwargs or {}))
        return result


_UNTAGGED = frozenset(
    [
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "zeros",
        "zeros_like",
        "ones",
        "ones_like",
        "full",
        "full_like",
        "scalar_tensor",
        "arange",
        "clone",
        "copy",
        "_to_copy",
        "cat",
        "stack",
        "expand_copy",
        "view_copy",
        "_softmax",
        "_log_softmax",
        "native_layer_norm",
        "_fused_rms_norm",
        "lift_fresh",
        "detach",
        "fill",
        "constant_pad_nd",
    ]
)
"""The names of ops that compilers fuse, too, and that have no tag that says so."""
