"""Everything that kernelgraph uses of PyTorch beyond its public API.

There is one module for each of torch's subsystems. Other wings write ``from kernelgraph.graph
import _torch`` and call ``_torch.name``, so that each use is easy to see. To support a new torch
release, run the tests and mend the entries here.

Invariants:

- No other module of the package uses ``torch._*``, ``torch.utils._pytree``,
  ``torch.fx.experimental`` or a version counter; ruff's banned-api checks this.
- Each entry names the torch versions that it was tried on, and why it is needed.
- An entry wraps one private thing, and decides nothing about kernels.
"""

from kernelgraph.graph._torch.autograd import (
    any_autocast,
    autocast_regions,
    begin_recording,
    count_of_results,
    end_recording,
    function_of,
    is_of_op,
    recording_gradients,
    set_grad_enabled,
    splits_forward,
    transforming,
    version_of,
)
from kernelgraph.graph._torch.dispatch import TorchDispatchMode, is_higher_order, schema_text
from kernelgraph.graph._torch.distributed import parametrizations_uncached, store_of_group
from kernelgraph.graph._torch.dynamo import (
    F,
    Frame,
    GraphFunction,
    at_trace_time,
    compiling_apart,
    current_graph,
    full_graph,
    named_backend,
    tensors_in,
    trace_again,
    unwrap_backend,
)
from kernelgraph.graph._torch.fakes import (
    fake_copy,
    fake_mode_for,
    fakes_apart,
    fakes_for_export,
    for_real,
    is_fake,
    no_data_pointers,
    out_of_export,
    running_on,
    symbolic_like,
    to_fake,
)
from kernelgraph.graph._torch.inductor import (
    aot_compile,
    aot_load,
    call_without_dispatch,
    inductor_backend,
    inductor_options,
    inductor_settings,
    quiet,
    register_decomposition,
    reset_inductor,
)
from kernelgraph.graph._torch.pytree import map_tensors, tensor_leaves, tree_leaves
from kernelgraph.graph._torch.symbols import (
    Expression,
    Relation,
    bind_unbacked_symbols,
    bounds,
    evaluate,
    expression,
    forgetting_unbacked_symbols,
    free_unbacked_symbols,
    guard_equal,
    guards_of,
    hint,
    hints,
)

__all__ = [
    "Expression",
    "F",
    "Frame",
    "GraphFunction",
    "Relation",
    "TorchDispatchMode",
    "any_autocast",
    "aot_compile",
    "aot_load",
    "at_trace_time",
    "autocast_regions",
    "begin_recording",
    "bind_unbacked_symbols",
    "bounds",
    "call_without_dispatch",
    "compiling_apart",
    "count_of_results",
    "current_graph",
    "end_recording",
    "evaluate",
    "expression",
    "fake_copy",
    "fake_mode_for",
    "fakes_apart",
    "fakes_for_export",
    "for_real",
    "forgetting_unbacked_symbols",
    "free_unbacked_symbols",
    "full_graph",
    "function_of",
    "guard_equal",
    "guards_of",
    "hint",
    "hints",
    "inductor_backend",
    "inductor_options",
    "inductor_settings",
    "is_fake",
    "is_higher_order",
    "is_of_op",
    "map_tensors",
    "named_backend",
    "no_data_pointers",
    "out_of_export",
    "parametrizations_uncached",
    "quiet",
    "recording_gradients",
    "register_decomposition",
    "reset_inductor",
    "running_on",
    "schema_text",
    "set_grad_enabled",
    "splits_forward",
    "store_of_group",
    "symbolic_like",
    "tensor_leaves",
    "tensors_in",
    "to_fake",
    "trace_again",
    "transforming",
    "tree_leaves",
    "unwrap_backend",
    "version_of",
]
