"""One call of a layer as data, and the same call made again from an op's operands.

`trees` takes tensors and numbers out of nested arguments and results. `attribute_reads` and `state`
find what a forward reads of its layer; `constants` names Python values by text. Together they make
a `Call`, the signature that one custom op serves. `stand_in`, `codegen` and `runner` make the call
again: a `Runner` generates a function that puts the operands into a stand-in for the layer and runs
a forward on it.

Invariants:

- A `Call`, a `State` and a `Template` hold no tensors and are immutable.
- Every value that a call depends on is an operand, or part of ``Call.describe()``.
- Texts (``describe``, ``text``, `stable_text`, `class_text`) are the same in every process.
- ``Template.unflatten`` undoes `flatten`.
- A generated function has its source in `linecache`, and no loops.
- Nothing here knows custom ops, Dynamo or fake tensors.
"""

from kernelgraph.graph.calls.attribute_reads import CALL, uses
from kernelgraph.graph.calls.call import Call, constants_in
from kernelgraph.graph.calls.codegen import access, expression, literal, tuple_of, write_function
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
    "write_function",
]
