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
    Path,
    Step,
    Template,
    UnsupportedValue,
    describe_output,
    path_name,
    path_text,
    put_leaves,
    read,
    take_leaves,
    take_tensors,
    template_text,
)

__all__ = [
    "CALL",
    "Call",
    "Container",
    "Node",
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
    "describe_output",
    "expression",
    "field_names",
    "is_constant",
    "is_data",
    "is_named_tuple",
    "literal",
    "path_name",
    "path_text",
    "put_leaves",
    "read",
    "same",
    "stable_text",
    "take_leaves",
    "take_tensors",
    "template_text",
    "tuple_of",
    "uses",
    "write",
]
