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
from kernelgraph.graph.infer.probe import Probe
from kernelgraph.graph.infer.results import NoFake, Result, Told, fakes_of, observe
from kernelgraph.graph.infer.sample_inputs import Form
from kernelgraph.graph.infer.shapes import (
    Effects,
    ShapeFunction,
    Source,
    differentiable,
    effects,
    run_on_fakes,
    static_key,
    tell,
)

__all__ = [
    "ALIGNMENT",
    "VALUES",
    "Effects",
    "Form",
    "NoFake",
    "NoValue",
    "Operands",
    "Probe",
    "Result",
    "ShapeFunction",
    "Source",
    "Told",
    "check_unwritten",
    "contiguous_copy",
    "differentiable",
    "effects",
    "extent",
    "fakes_of",
    "indices",
    "observe",
    "owned",
    "plain",
    "propagate",
    "reach",
    "run_on_fakes",
    "static_key",
    "tell",
    "value_of",
    "versions",
]
