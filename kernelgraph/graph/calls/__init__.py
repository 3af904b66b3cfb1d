"""TODO."""

from kernelgraph.graph.calls.attribute_reads import CALL, uses
from kernelgraph.graph.calls.call import Call, constants_in
from kernelgraph.graph.calls.codegen import access, expression, literal, tuple_of, write
from kernelgraph.graph.calls.constants import (
    class_text,
    field_names,
    is_constant,
    is_data,
    is_named_tuple,
    same,
    stable_text,
)
from kernelgraph.graph.calls.runner import Runner
from kernelgraph.graph.calls.state import Container, Node, State, UnsupportedState, describe
from kernelgraph.graph.calls.trees import (
    Constant,
    Entries,
    Leaf,
    Parts,
    Path,
    Step,
    Template,
    UnsupportedValue,
    flatten,
    flatten_tensors,
    path_name,
    path_text,
    read,
)

__all__ = [
    "CALL",
    "Call",
    "Constant",
    "Container",
    "Entries",
    "Leaf",
    "Node",
    "Parts",
    "Path",
    "Runner",
    "State",
    "Step",
    "Template",
    "UnsupportedState",
    "UnsupportedValue",
    "access",
    "class_text",
    "constants_in",
    "describe",
    "expression",
    "field_names",
    "flatten",
    "flatten_tensors",
    "is_constant",
    "is_data",
    "is_named_tuple",
    "literal",
    "path_name",
    "path_text",
    "read",
    "same",
    "stable_text",
    "tuple_of",
    "uses",
    "write",
]
