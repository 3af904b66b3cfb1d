"""Facts about a call that are found before it runs, or by running it aside.

`shapes` infers the output of a call: from a ``fake=``, from runs on fakes, or from `probe`, which
runs a forward on `sample_inputs`. `output_specs` has the results, and `run_effects` what a run
writes and draws. `operands` makes inputs to try and time kernels with. `aliasing` compares and
copies memory. `node_values` finds the fake values of FX nodes.

Invariants:

- The caller's tensors are never written into, nor their values read: runs get fakes or copies.
- Random generators, the grad mode and the trace are afterwards as they were before.
- Native code never receives a fake tensor's memory: asking for it raises.
- `owned` returns dense tensors that share no memory with inputs or each other.
- Nothing here registers ops or knows the backend.
"""

from kernelgraph.graph.infer.aliasing import (
    ALIGNMENT,
    Order,
    check_unwritten,
    contiguous_copy,
    copies_of,
    dense_copy,
    dense_strides,
    extent,
    memory_of,
    order_of,
    owned,
    reach,
    same_bits,
    versions,
)
from kernelgraph.graph.infer.node_values import VALUES, NoValue, plain, propagate, value_of
from kernelgraph.graph.infer.operands import Operands, indices
from kernelgraph.graph.infer.output_specs import (
    OutputSpec,
    TensorSpec,
    UnknownShape,
    make_fakes,
    observe,
)
from kernelgraph.graph.infer.probe import Probe
from kernelgraph.graph.infer.run_effects import Snapshot, watching
from kernelgraph.graph.infer.sample_inputs import StridedSpec
from kernelgraph.graph.infer.shapes import (
    Effects,
    InferOutput,
    ShapeFunction,
    differentiable,
    does_the_same,
    explain_attribute,
    infer_output,
    run_on_fakes,
    static_key,
)

__all__ = [
    "ALIGNMENT",
    "VALUES",
    "Effects",
    "InferOutput",
    "NoValue",
    "Operands",
    "Order",
    "OutputSpec",
    "Probe",
    "ShapeFunction",
    "Snapshot",
    "StridedSpec",
    "TensorSpec",
    "UnknownShape",
    "check_unwritten",
    "contiguous_copy",
    "copies_of",
    "dense_copy",
    "dense_strides",
    "differentiable",
    "does_the_same",
    "explain_attribute",
    "extent",
    "indices",
    "infer_output",
    "make_fakes",
    "memory_of",
    "observe",
    "order_of",
    "owned",
    "plain",
    "propagate",
    "reach",
    "run_on_fakes",
    "same_bits",
    "static_key",
    "value_of",
    "versions",
    "watching",
]
