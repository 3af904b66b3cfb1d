"""``policy="fastest"``: for each kind of call, what computes it fastest where it stands.

A kind is a layer with the kernels for it, the sizes, dtypes, layout and constants of what it takes,
the device and the compiler. While a graph is traced, the calls of kinds that are not decided become
ops for now. The backend then measures each such kind once (`kernelgraph.graph.autotune.candidates`), and
where the op is not what won, has Dynamo trace again, now with the decisions known: in that trace a
layer that keeps its reference is traced as if there were no kernel for it.

Where nothing can be measured, or the time for it is up, a rule decides: compilers fuse what is
elementwise or a reduction with its neighbours, so such layers keep their references, and others
take their kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from kernelgraph.graph import _torch, ops
from kernelgraph.graph.autotune import candidates, ranks
from kernelgraph.graph.autotune.benchmark import Measured, Sampler, fastest, measure
from kernelgraph.graph.autotune.candidates import Compiler, Pending, Unmeasurable
from kernelgraph.graph.autotune.records import (
    NATIVE,
    OP,
    REFERENCE,
    Choice,
    Session,
    from_json,
    keep,
    on_disk,
)
from kernelgraph.graph.autotune.region import Neighbourhood, cut
from kernelgraph.graph.calls import Runner
from kernelgraph.graph.infer import run_on_fakes, sample_inputs
from kernelgraph.keys import source_of
from kernelgraph.report import error_text

logger = logging.getLogger("kernelgraph")


def decide(
    graph_module: fx.GraphModule,
    pending: Mapping[str, Pending],
    session: Session,
    compiler: Compiler,
    *,
    graphs: bool,
) -> dict[str, Choice]:
    """Decide the kinds of call in a graph that are not decided.

    Args:
        graph_module: The graph, with ops for the calls.
        pending: A call of each kind. Some may be elsewhere: for a DistributedDataParallel Dynamo
            hands over a graph in parts.
        session: Where the choices are noted, and the time is.
        compiler: What will compile the graph.
        graphs: Whether the graph will be run as a CUDA graph.

    Returns:
        The choices. Where one is not the op of the first kernel, the graph is to be traced again.
    """
    choices = {}
    places = {
        kind: place for kind, call in pending.items() if (place := _place(graph_module, call))
    }
    for number, (kind, place) in enumerate(places.items(), 1):
        call = pending[kind]
        contest = Contest(place, call, session, compiler, graphs)
        name, of = call.site.layer.layer_name, f"{number} of {len(places)} kinds of call"
        logger.info("choosing for %s, %s; %s", name, of, session)
        choice = _agreed(kind, contest, call, session)
        logger.info("chosen for %s: %s (%s)", name, choice.how, choice.why)
        keep(kind, choice, session, call.about)
        choices[kind] = choice
    return choices


def _agreed(kind: str, contest: Contest, call: Pending, session: Session) -> Choice:
    count = len(call.kernels)

    def choose() -> dict[str, Any]:
        return (on_disk(kind, count) or contest.choice())._asdict()

    agreed = from_json(ranks.agree(kind, choose, session.left + _PATIENCE), count)
    return agreed or by_rule(call, "the rank that measures has not answered")


_PATIENCE = 120.0
"""How many seconds longer than measuring takes another rank may need."""


Place = tuple[fx.GraphModule, fx.Node]
"""A node, and the graph that it is in."""


def _place(graph_module: fx.GraphModule, call: Pending) -> Place | None:
    """Where such a call is in a graph or one that it calls: of several, the one in the middle."""
    name = f"{ops.NAMESPACE}::{call.lowered.name}"
    found = [
        (module, node)
        for module in graph_module.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if getattr(node.target, "_name", "") == name
    ]
    found = [(module, node) for module, node in found if call.is_like(node)] or found
    return found[len(found) // 2] if found else None


class Contest:
    """What is measured for a kind of call, and what comes of it."""

    def __init__(
        self,
        place: Place,
        call: Pending,
        session: Session,
        compiler: Compiler,
        graphs: bool,
    ) -> None:
        self._place = place
        self._call = call
        self._session = session
        self._compiler = compiler
        self._graphs = graphs
        self._name = call.site.layer.layer_name
        self._pool: Any = None
        """Where CUDA graphs have their memory, one after the other."""

    def choice(self) -> Choice:
        """The choice; where nothing can be measured, by rule."""
        session = self._session
        if session.left <= 0:
            return by_rule(self._call, f"the {session.seconds:g} s for measuring were over")
        try:
            with session.running():
                return self._measured()
        except Unmeasurable as error:
            why = str(error)
        except torch.OutOfMemoryError:
            why = "out of memory"
        except Exception as error:  # of a compiler, or a kernel on inputs that are made up
            logger.debug("%s cannot be measured", self._name, exc_info=True)
            why = error_text(error)
        return by_rule(self._call, why)

    def _measured(self) -> Choice:
        around = cut(*self._place)
        ways = {REFERENCE: (REFERENCE, 0), **dict(self._ways())}
        with sample_inputs.apart(around.inputs, 0):
            samplers, untraced = self._samplers(around, ways)
            if not samplers.keys() - {REFERENCE}:
                raise Unmeasurable("no kernel could be run on inputs that are made up")
            if REFERENCE not in samplers and len(samplers) == 1:
                chosen = next(iter(samplers))
                return Choice(*ways[chosen], f"the layer itself cannot be traced: {untraced}", True)
            times = measure(list(samplers.values()), lambda: self._session.left <= 0)
        measured = dict(zip(samplers, times, strict=True))
        chosen = fastest(measured, REFERENCE)
        return Choice(*ways.get(chosen, ways[REFERENCE]), _in_words(measured, chosen), True)

    def _samplers(
        self, around: Neighbourhood, ways: Mapping[str, tuple[str, int]]
    ) -> tuple[dict[str, Sampler], str]:
        """What can be timed; and why the layer itself cannot be traced, if so."""
        inputs = candidates.inputs_for(around, self._call)
        if self._graphs and any(v.is_cuda for v in inputs if isinstance(v, torch.Tensor)):
            self._pool = torch.cuda.graph_pool_handle()
        samplers: dict[str, Sampler] = {}
        untraced = ""
        for label, way in ways.items():
            if samplers.keys() - {REFERENCE} and self._session.left <= 0:
                break
            try:
                samplers[label] = self._sampler(around, inputs, *way)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                logger.debug("%s: %s cannot be run", self._name, label, exc_info=True)
                if label == REFERENCE:
                    untraced = error_text(error)
                    if not _torch.full_graph():  # across a graph break it would be run as it is
                        samplers[label] = self._sampler(around, inputs, *way, compiled=False)
        return samplers, untraced

    def _ways(self) -> Iterator[tuple[str, tuple[str, int]]]:
        """The ways to compute the call by kernels, what is preferred first."""
        kernels = self._call.kernels
        names = ["kernel"] if len(kernels) == 1 else [str(kernel) for kernel in kernels]
        for i, name in enumerate(names):
            yield name, (OP, i)
        for i, name in enumerate(names):
            if getattr(kernels[i].layer, "can_torch_compile", False) and self._may_be_traced(i):
                yield f"{name} traced", (NATIVE, i)

    def _may_be_traced(self, number: int) -> bool:
        """Whether a kernel that is traced was looked at as an op is: nothing is verified then.

        Where a gradient can flow it has to be the kernel's own, which is judged with the op, and
        again once the code of the kernel or the layer has changed.
        """
        call, kernel = self._call, self._call.kernels[number]
        if call.options.verify or not call.site.grad:
            return not call.options.verify
        own = call.gradient is not None and call.gradient.own is not None
        return number == 0 and own and source_of(call.site.layer, kernel) != ""

    def _sampler(
        self,
        around: Neighbourhood,
        inputs: list[Any],
        how: str,
        number: int,
        *,
        compiled: bool = True,
    ) -> Sampler:
        run: Any = candidates.program(around, self._call, how, number)
        grad = self._call.site.grad
        # A kernel's run that is kept for its backward is in no CUDA graph, nor what breaks graphs.
        pool = self._pool if compiled and not (grad and how == OP) else None
        with torch.set_grad_enabled(grad):
            if compiled:
                with _torch.compiling_apart():
                    run = self._compiler(run, inputs)
            return candidates.prepared(run, inputs, grad, pool)


def _in_words(measured: Mapping[str, Measured], chosen: str) -> str:
    names = [chosen, *(name for name in measured if name != chosen)]
    return ", ".join(f"{name} {measured[name]}" for name in names)


# --- where nothing is measured --------------------------------------------------------------------


def by_rule(call: Pending, why: str) -> Choice:
    """What is right most often, where nothing was measured."""
    how = REFERENCE if _is_fused(call) else OP
    return Choice(how, 0, f"not measured: {why}", False)


def _is_fused(call: Pending) -> bool:
    """Whether a compiler would compute a layer together with what is around it."""
    seen = _Seen()  # type: ignore[no-untyped-call]

    def reference(module: Any, *args: Any, **kwargs: Any) -> Any:
        with seen:
            return call.site.layer.reference(module, *args, **kwargs)

    try:
        run_on_fakes(Runner(reference, call.call), call.operands)
    except Exception:  # it depends on values
        return False
    return not seen.apart


class _Seen(_torch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an op runs that is neither elementwise, a reduction nor about memory."""

    apart = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        known = {torch.Tag.pointwise, torch.Tag.reduction} & set(func.tags)
        asks = func.namespace == "prim"  # of a device, say
        if not (known or asks or func.is_view or name.removesuffix("_") in _OF_MEMORY):
            self.apart = True
        return func(*args, **(kwargs or {}))


_OF_MEMORY = frozenset(
    [
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "zeros",
        "zeros_like",
        "ones",
        "ones_like",
        "full",
        "full_like",
        "scalar_tensor",
        "arange",
        "clone",
        "copy",
        "_to_copy",
        "cat",
        "stack",
        "expand_copy",
        "view_copy",
        "_softmax",
        "_log_softmax",
        "native_layer_norm",
        "_fused_rms_norm",
        "lift_fresh",
        "detach",
        "fill",
        "constant_pad_nd",
    ]
)
"""Ops that are so without a tag that says it."""
