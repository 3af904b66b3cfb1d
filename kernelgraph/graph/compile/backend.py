"""The ``hubkernels`` backend of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from kernelgraph.graph import _torch
from kernelgraph.graph.autotune import forget, session_of, tune
from kernelgraph.graph.compile.capture import adopt
from kernelgraph.graph.compile.trace import Trace
from kernelgraph.graph.fx import copy_saved_operands, plan, replace_layers
from kernelgraph.graph.lowering import Compiler, GraphDecisions, Options
from kernelgraph.graph.timing import ops_that_synchronize
from kernelgraph.layers import on_extensible, tagged_subclasses
from kernelgraph.report import publish_graph
from kernelgraph.selection import current_mapping


def hubkernels(
    graph_module: fx.GraphModule,
    example_inputs: list[object],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., object]:
    """Compile a graph whose extensible layers are calls of hub kernels.

    When Dynamo hands over the graph, the kernels of the layers that it inlined are in it, as custom
    ops (`kernelgraph.graph.compile.capture`). Layers that it left as modules are replaced here.

    A call has the kernels of the mapping in force where it is made. A graph is compiled again for a
    mapping that has other kernels for its layers.

    The ``options`` are these:

    - ``policy``: which kernels are used.

      - ``"fastest"``, the default: a kernel where it is measured to be faster than the layer, timed
        with its neighbours in the graph.
      - ``"always"``: a kernel wherever there is one.
      - ``"never"``: no kernel.

      The environment variable ``KERNELGRAPH_POLICY`` changes the default.
    - ``measure_seconds``: how long ``"fastest"`` may measure in all for one call of
      ``torch.compile``, a number from 0 on; 30 by default.
    - ``inner``: what compiles the graph once the kernels are in it: ``"inductor"``, the default,
      ``"aot_eager"``, ``"eager"``, or a callable that takes a graph module and example inputs.
    - ``kernel_mode``: a ``Mode`` to choose kernels for, whatever the call. By default a call is one
      for ``Mode.TRAINING`` if a gradient can flow through it, else for ``Mode.INFERENCE``.
    - ``verify``: whether each kernel is compared with its reference while compiling, at the call's
      sizes; False by default. A kernel that is not within
      `kernelgraph.graph.verify.tolerance.TOLERANCES` is not used.
    - ``verify_gradients``: whether a kernel has to show that its gradients are the layer's before
      it trains anything; True by default.
    - ``wrong_gradient``: what is done about a kernel whose gradients are not the layer's.

      - ``"recompute"``, the default: its forward is used, and the backward runs the layer's own
        forward again for the gradient.
      - ``"reference"``: it is not used.
    - ``own_backward``: whether the backwards of kernels are used at all; True by default. With
      False each gradient is the layer's own, recomputed.

    All other options are Inductor's.

    Args:
        graph_module: The graph that Dynamo traced.
        example_inputs: Its inputs, as fake tensors.
        mode: ``mode=`` of torch.compile, for Inductor.
        options: ``options=`` of torch.compile, as above.

    Returns:
        The compiled graph.

    Raises:
        ValueError: If an option is unknown or has a value that it cannot have.
        TypeError: If an option's value is of the wrong type.
        Exception: Whatever ``inner`` raises.

    Example:
        >>> import torch
        >>> options = {"policy": "always", "inner": "eager"}
        >>> compiled = torch.compile(torch.neg, backend="hubkernels", options=options)
        >>> compiled(torch.ones(2))
        tensor([-1., -1.])
    """
    parsed = Options.parse(mode, options)
    notes, compile_call = _torch.current_graph()
    if _adopt_late() and compile_call is not None:
        _torch.trace_again()
    trace: Trace | None = notes.get("trace")
    if trace is not None and trace.untuned:
        _tune(graph_module, trace, parsed, compile_call)
    decisions = trace.decisions if trace else GraphDecisions(parsed, current_mapping())
    replace_layers(plan(graph_module, decisions), decisions)
    copy_saved_operands(graph_module)
    publish_graph(decisions.decisions, compile_call)
    if parsed.cuda_graphs and trace is not None:
        parsed = parsed.cutting_around(ops_that_synchronize(trace.inference_calls))
    compiled: Callable[..., object] = _inner_compiler(parsed)(graph_module, example_inputs)
    return compiled


def _tune(
    graph_module: fx.GraphModule, trace: Trace, parsed: Options, compile_call: object
) -> None:
    """Find the winners for the untuned calls of a graph.

    Where one is not the op that is in the graph, this does not return: Dynamo traces again.
    """
    session = session_of(compile_call, parsed.measure_seconds)
    compiler = _inner_compiler(parsed.without_cuda_graphs())
    winners = tune(graph_module, trace.untuned, session, compiler, cuda_graphs=parsed.cuda_graphs)
    if not all(winner.is_first_op for winner in winners.values()):
        _torch.trace_again()
    trace.record_winners(winners)


def _inner_compiler(options: Options) -> Compiler:
    if not isinstance(options.inner, str):
        return options.inner
    if options.inner == "inductor":
        return _torch.inductor_backend(options.inductor_mode, options.inductor)
    return _torch.named_backend(options.inner)


def _adopt_late() -> bool:
    """Adopt the classes that another package tagged since this module was imported.

    Nothing announces them, so calls of their layers may be in the graph already. The graph does not
    show that: a layer that returns its input leaves no node in it.

    Returns:
        Whether there were any.
    """
    late = [cls for cls in tagged_subclasses() if adopt(cls)]
    return bool(late)


def _reset() -> None:
    """Forget everything that ``torch.compiler.reset()`` is to have decided anew."""
    forget()
    _torch.reset_inductor()


hubkernels.is_hubkernels = True  # type: ignore[attr-defined]
hubkernels.reset = _reset  # type: ignore[attr-defined]
on_extensible(adopt)
