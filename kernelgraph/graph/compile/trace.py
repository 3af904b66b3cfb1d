"""What is known of one graph while Dynamo traces it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from kernelgraph.graph import _torch
from kernelgraph.graph._torch import Frame
from kernelgraph.graph.autotune import (
    Choice,
    OpCall,
    Pending,
)
from kernelgraph.graph.calls import State
from kernelgraph.graph.gradients import Gradient
from kernelgraph.graph.lowering import (
    Choices,
    Options,
    Site,
    of_backend,
    op_for,
)
from kernelgraph.graph.ops import Lowered
from kernelgraph.kernel import Kernel
from kernelgraph.report import Decision, publish_graph
from kernelgraph.selection import current_mapping

# --- at trace time ---------------------------------------------------------------------------


class Begun(NamedTuple):
    """A call that a kernel is used for."""

    site: Site
    kernel: Kernel
    state: State
    kind: str
    """What `kernelgraph.graph.autotune.policy` chooses for; empty where the kernel is given."""
    choice: Choice | None
    """What it chose."""


@dataclass
class Trace:
    """What is known of one graph while it is traced."""

    choices: Choices
    ours: bool
    """Whether the backend is hubkernels; another gets only what was kernelized for compiling."""
    op_for: Callable[..., tuple[Lowered, Gradient | None]] = op_for
    """Makes the ops, as that function does."""
    pending: Begun | None = None
    """The call between its `begin` and its `finish`."""
    undecided: dict[str, Pending] = field(default_factory=dict)
    """A call of each kind that nothing is chosen for."""
    called: dict[str, OpCall] = field(default_factory=dict)
    """A call of each op for inference."""
    kinds: dict[int, str] = field(default_factory=dict)
    """The kinds of such calls, by the places of their decisions."""

    @classmethod
    def of(cls, frame: Frame) -> Trace:
        """The trace that ``frame`` belongs to."""
        if "trace" not in frame.notes and (exported := exporting.get()) is not None:
            frame.notes["trace"] = exported
        if "trace" not in frame.notes:
            chosen = of_backend(*frame.backend)
            choices = Choices(chosen or Options(), current_mapping())
            frame.notes["trace"] = cls(choices, ours=chosen is not None)
        return frame.notes["trace"]  # type: ignore[no-any-return]

    def keep_reference(self, frame: Frame, decision: Decision) -> None:
        """Note why the call that ``frame`` traces keeps its reference."""
        self.choices.decisions.append(decision)
        if self.ours and frame.is_root and self is not exporting.get():
            # Its reference breaks the graph, and Dynamo gives no backend a graph without nodes.
            publish_graph([decision], _torch.current_graph()[1])

    def explain(self, chosen: Mapping[str, Choice]) -> None:
        """Note why the calls for which nothing was chosen yet keep their ops."""
        decisions = self.choices.decisions
        for number, kind in self.kinds.items():
            if kind in chosen:
                decisions[number] = decisions[number]._replace(detail=chosen[kind].why)
        for kind in chosen:
            del self.undecided[kind]


exporting: ContextVar[Trace | None] = ContextVar("exporting", default=None)
"""What `kernelgraph.export` traces a model with, where it has Dynamo do it."""
