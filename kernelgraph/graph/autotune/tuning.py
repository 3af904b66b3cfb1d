"""The driver of ``policy="fastest"``: find the winner for each untuned call of a graph.

Calls share a winner where they share a tuning key: a layer with the kernels for it, the sizes,
dtypes, layout and constants of its arguments, the device and the compiler. While a graph is
traced, the calls for whose keys no winner is known become ops for now (`UntunedCall`). The backend
then measures each such key once (`Contest`). Where the winner is not the op that is in the graph,
it has Dynamo trace again, now with the winners known: in that trace a layer that keeps its
reference is traced as if there were no kernel for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

from torch import fx

from kernelgraph.graph import ops
from kernelgraph.graph.autotune import ranks
from kernelgraph.graph.autotune.candidates import UntunedCall
from kernelgraph.graph.autotune.contest import Contest
from kernelgraph.graph.autotune.fusion_rule import winner_by_rule
from kernelgraph.graph.autotune.records import Session, Winner, keep_winner, winner_on_disk
from kernelgraph.graph.lowering import Compiler

logger = logging.getLogger("kernelgraph")


def tune(
    graph_module: fx.GraphModule,
    untuned: Mapping[str, UntunedCall],
    session: Session,
    compiler: Compiler,
    *,
    cuda_graphs: bool,
) -> dict[str, Winner]:
    """Find, and keep, the winners for the untuned calls in a graph.

    Args:
        graph_module: The graph, with ops for the calls.
        untuned: A call for each tuning key. Some may not be in the graph: for a
            DistributedDataParallel Dynamo hands over a graph in parts.
        session: Keeps the winners that are not measured, and has the time that is left.
        compiler: What will compile the graph.
        cuda_graphs: Whether the graph will be run as a CUDA graph.

    Returns:
        The winners for the calls in the graph, by tuning key. Where one is not the op of the
        first kernel, the graph is to be traced again.
    """
    winners = {}
    places = {key: place for key, call in untuned.items() if (place := _find(graph_module, call))}
    for number, (key, place) in enumerate(places.items(), 1):
        call = untuned[key]
        contest = Contest(*place, call, session, compiler, cuda_graphs=cuda_graphs)
        name, of = call.site.layer.layer_name, f"{number} of {len(places)} kinds of call"
        logger.info("choosing for %s, %s; %s", name, of, session)
        winner = _agreed_winner(key, contest, call, session)
        logger.info("chosen for %s: %s (%s)", name, winner.implementation.value, winner.why)
        keep_winner(key, winner, session, call.about)
        winners[key] = winner
    return winners


_PATIENCE = 120.0
"""The seconds that another rank may need beyond those for measuring."""


def _agreed_winner(key: str, contest: Contest, call: UntunedCall, session: Session) -> Winner:
    """Return the winner that all ranks use, found by the first rank that asks."""
    count = len(call.kernels)

    def decide() -> object:
        return (winner_on_disk(key, count) or contest.winner()).to_json()

    answer = ranks.agree(key, decide, session.seconds_left + _PATIENCE)
    agreed = Winner.from_json(answer, count)
    return agreed or winner_by_rule(call, "the rank that measures has not answered")


class _Place(NamedTuple):
    """A node, and the graph that it is in."""

    graph_module: fx.GraphModule
    node: fx.Node


def _find(graph_module: fx.GraphModule, call: UntunedCall) -> _Place | None:
    """Find a call in a graph or one that it calls: of several, the one in the middle."""
    name = f"{ops.NAMESPACE}::{call.lowered.name}"
    found = [
        _Place(module, node)
        for module in graph_module.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if getattr(node.target, "_name", "") == name
    ]
    found = [place for place in found if call.is_like(place.node)] or found
    return found[len(found) // 2] if found else None
