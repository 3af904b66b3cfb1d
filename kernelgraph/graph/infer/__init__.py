"""TODO."""

from kernelgraph.graph.infer.aliasing import (
    ALIGNMENT,
    check_unwritten,
    contiguous_copy,
    extent,
    owned,
    reach,
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
from kernelgraph.graph.infer.sample_inputs import Form
from kernelgraph.graph.infer.shapes import (
    Effects,
    ShapeFunction,
    Source,
    differentiable,
    effects,
    infer_output,
    run_on_fakes,
    static_key,
)

__all__ = [
    "ALIGNMENT",
    "VALUES",
    "Effects",
    "Form",
    "NoValue",
    "Operands",
    "OutputSpec",
    "Probe",
    "ShapeFunction",
    "Source",
    "TensorSpec",
    "UnknownShape",
    "check_unwritten",
    "contiguous_copy",
    "differentiable",
    "effects",
    "extent",
    "indices",
    "infer_output",
    "make_fakes",
    "observe",
    "owned",
    "plain",
    "propagate",
    "reach",
    "run_on_fakes",
    "static_key",
    "value_of",
    "versions",
]
