"""The state of one graph while Dynamo traces it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from kernelgraph.graph import _torch
from kernelgraph.graph._torch import Frame
from kernelgraph.graph.autotune import UntunedCall, Winner
from kernelgraph.graph.calls import Call, State
from kernelgraph.graph.gradients import Gradient
from kernelgraph.graph.lowering import (
    GraphDecisions,
    Options,
    Site,
    op_for,
    options_of_backend,
)
from kernelgraph.graph.ops import Lowered
from kernelgraph.graph.timing import InferenceCall
from kernelgraph.kernel import Kernel
from kernelgraph.report import Decision, publish_graph
from kernelgraph.selection import current_mapping

OpMaker = Callable[[Site, Kernel, Call, Sequence[object], Options], tuple[Lowered, Gradient | None]]
"""Makes the op for a call, as `op_for` does."""


class BegunCall(NamedTuple):
    """A call that a kernel is used for, from `kernelgraph_begin` to `kernelgraph_finish`."""

    site: Site
    kernel: Kernel
    state: State
    key: str
    """The tuning key; empty where nothing is to be tuned."""
    winner: Winner | None
    """The winner for the key, if one is known."""


@dataclass
class Trace:
    """The state of one graph while it is traced."""

    decisions: GraphDecisions
    uses_mapping: bool
    """Whether layers get the kernels of the mapping. That is so where the backend is hubkernels,
    and in exports; under other backends only what was kernelized for compiling has a kernel."""
    op_for: OpMaker = op_for
    """Makes the ops."""
    begun: BegunCall | None = None
    """The call that was begun last."""
    untuned: dict[str, UntunedCall] = field(default_factory=dict)
    """A call for each tuning key that has no winner yet."""
    keys: dict[int, str] = field(default_factory=dict)
    """The tuning keys of all calls without a winner, by the numbers of their decisions."""
    inference_calls: dict[str, InferenceCall] = field(default_factory=dict)
    """A call of each op for inference, by the op's name."""

    @classmethod
    def of(cls, frame: Frame) -> Trace:
        """Return the trace that ``frame`` belongs to."""
        if "trace" not in frame.notes and (exported := exporting.get()) is not None:
            frame.notes["trace"] = exported
        if "trace" not in frame.notes:
            options = options_of_backend(*frame.backend)
            decisions = GraphDecisions(options or Options(), current_mapping())
            frame.notes["trace"] = cls(decisions, uses_mapping=options is not None)
            if options is not None:
                frame.guard_condition(decisions.choices.hold)
        trace: Trace = frame.notes["trace"]
        return trace

    def record(self, decision: Decision) -> None:
        """Record the decision for the call that is traced."""
        self.decisions.decisions.append(decision)

    def keep_reference(self, frame: Frame, decision: Decision) -> None:
        """Record why the call that ``frame`` traces keeps its reference."""
        self.record(decision)
        if self.uses_mapping and frame.is_root and self is not exporting.get():
            # Its reference breaks the graph, and Dynamo gives no backend a graph without nodes.
            publish_graph([decision], _torch.current_graph()[1])

    def record_winners(self, winners: Mapping[str, Winner]) -> None:
        """Record why the calls that had no winner keep their ops: each op is the winner."""
        decisions = self.decisions.decisions
        for number, key in self.keys.items():
            if key in winners:
                decisions[number] = decisions[number]._replace(detail=winners[key].why)
        for key in winners:
            del self.untuned[key]


exporting: ContextVar[Trace | None] = ContextVar("exporting", default=None)
"""The trace that `kernelgraph.export` sets where it has Dynamo trace a model."""
