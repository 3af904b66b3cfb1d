"""The ``hubkernels`` backend of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from kernelgraph.graph import _torch
from kernelgraph.graph.autotune import cut_around, decide, forget, session_of
from kernelgraph.graph.compile.capture import adopt
from kernelgraph.graph.compile.trace import Trace
from kernelgraph.graph.fx import plan, replace_layers
from kernelgraph.graph.lowering import Choices, Options
from kernelgraph.layers import on_extensible, tagged_subclasses
from kernelgraph.report import publish_graph
from kernelgraph.selection import current_mapping


def hubkernels(
    graph_module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compile a graph whose extensible layers are calls of hub kernels.

    By the time that Dynamo hands over the graph the kernels of the layers that it inlined are in
    it, as custom ops (`kernelgraph.graph.compile.capture`). Those that it left as modules follow here.

    The mapping counts as it is while the graph is traced. The compiled graph keeps its decisions
    when the mapping changes: ``torch.compiler.reset()`` has them made anew.

    Args:
        graph_module: The graph that Dynamo traced.
        example_inputs: Its inputs, as fake tensors.
        mode: ``mode=`` of torch.compile, for Inductor.
        options: ``options=`` of torch.compile: `Options`, and Inductor's own.

    Raises:
        ValueError, TypeError: If an option is unknown or wrong.
    """
    parsed = Options.parse(mode, options)
    notes, compile_call = _torch.current_graph()
    if _adopt_late() and compile_call is not None:
        _torch.trace_again()
    trace: Trace | None = notes.get("trace")
    if trace is not None and trace.undecided:
        session = session_of(compile_call, parsed.measure_seconds)
        compiler = _inner(parsed.without_graphs())
        chosen = decide(graph_module, trace.undecided, session, compiler, graphs=parsed.graphs)
        if not all(choice.is_first for choice in chosen.values()):
            _torch.trace_again()
        trace.explain(chosen)
    choices = trace.choices if trace else Choices(parsed, current_mapping())
    replace_layers(plan(graph_module, choices), choices)
    publish_graph(choices.decisions, compile_call)
    if parsed.graphs and trace is not None:
        parsed = parsed.cutting(cut_around(trace.called))
    return _inner(parsed)(graph_module, example_inputs)


def _reset() -> None:
    forget()
    _torch.reset_inductor()


hubkernels.is_hubkernels = True  # type: ignore[attr-defined]
hubkernels.reset = _reset  # type: ignore[attr-defined]


def _inner(options: Options) -> Any:
    if callable(options.inner):
        return options.inner
    if options.inner == "inductor":
        return _torch.inductor_backend(options.inductor_mode, options.inductor)
    return _torch.named_backend(options.inner)


def _adopt_late() -> bool:
    """Adopt the classes that another package tagged since this module was imported.

    Nothing announces them, so their layers may be in the graph already; True if there are any.
    The graph does not tell: a layer that returns its input leaves no node in it.
    """
    late = [cls for cls in tagged_subclasses() if adopt(cls)]
    return bool(late)


on_extensible(adopt)
