"""TODO."""

from kernelgraph.graph.verify.outputs import output_error
from kernelgraph.graph.verify.own_backward import RaisedBackward, WrongBackward, alike, own_backward
from kernelgraph.graph.verify.tolerance import EXACTLY, Closeness, closeness, is_close
from kernelgraph.graph.verify.trial import Verdict, judge
from kernelgraph.graph.verify.trial_runs import OnTape, Run, Trial, Untold

__all__ = [
    "EXACTLY",
    "Closeness",
    "OnTape",
    "RaisedBackward",
    "Run",
    "Trial",
    "Untold",
    "Verdict",
    "WrongBackward",
    "alike",
    "closeness",
    "is_close",
    "judge",
    "output_error",
    "own_backward",
]
