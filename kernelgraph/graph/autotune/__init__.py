"""Choosing what is fastest for each call of a layer: a kernel, or the layer's own forward.

While a graph is traced, `tuning_key` names a call and `known_winner` says what is known for that
key, in the process or on disk (`records`). A call without a winner becomes an op for now, and an
`UntunedCall`. The backend has `tune` (`tuning`) find the winners for these in the finished graph:
one rank of a process group decides for all (`ranks`), by a `contest`. That cuts the `region` of the
call out of the graph, makes a program for each of the `candidates`, compiles them, and times them
in turns (`kernelgraph.graph.timing`). Where nothing can be measured the `fusion_rule` decides.

Invariants:
    - Only measured winners are kept on disk and used by later compiles; the others are in the
      session of one ``torch.compile``.
    - The reference wins unless a candidate is faster by more than `timing.MARGIN` and the errors
      of both times, or the reference cannot be traced.
    - A contest changes neither the graph nor the program's random numbers nor the gradients of the
      layer's weights, and makes no copy of weights.
    - A failure to measure never fails the compile: the rule decides, and the report says why.
    - All ranks of a process group use the same winner, if they answer each other in time.
"""

from kernelgraph.graph.autotune.candidates import UntunedCall
from kernelgraph.graph.autotune.records import (
    Implementation,
    Winner,
    forget,
    known_winner,
    session_of,
)
from kernelgraph.graph.autotune.tuning import tune
from kernelgraph.graph.autotune.tuning_keys import tuning_key

__all__ = [
    "Implementation",
    "UntunedCall",
    "Winner",
    "forget",
    "known_winner",
    "session_of",
    "tune",
    "tuning_key",
]
