"""The ``hubkernels`` backend of ``torch.compile``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import fx

from kernelgraph.graph import _torch
from kernelgraph.graph.choice import Choices
from kernelgraph.graph.layer_call import Trace, adopt
from kernelgraph.graph.options import Options
from kernelgraph.graph.rewrite import rewrite
from kernelgraph.layers import on_extensible, tagged_subclasses
from kernelgraph.mapping import current_mapping
from kernelgraph.report import Report, publish


def hubkernels(
    graph_module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compile a graph whose extensible layers are calls of hub kernels.

    By the time that Dynamo hands over the graph the kernels of the layers that it inlined are in
    it, as custom ops (`kernelgraph.graph.layer_call`). Those that it left as modules follow here.

    Args:
        graph_module: The graph that Dynamo traced.
        example_inputs: Its inputs, as fake tensors.
        mode: ``mode=`` of torch.compile, for Inductor.
        options: ``options=`` of torch.compile: `Options`, and Inductor's own.

    Raises:
        ValueError, TypeError: If an option is unknown or wrong.
    """
    parsed = Options.parse(mode, options)
    trace: Trace | None = _torch.current_notes().get("trace")
    choices = trace.choices if trace else Choices(parsed, current_mapping())
    rewrite(graph_module, choices)
    publish(Report("torch.compile", tuple(dict.fromkeys(choices.decisions))))
    return _inner(parsed)(graph_module, example_inputs)


hubkernels.is_hubkernels = True  # type: ignore[attr-defined]
hubkernels.reset = _torch.reset_inductor  # type: ignore[attr-defined]


def _inner(options: Options) -> Any:
    if callable(options.inner):
        return options.inner
    if options.inner == "inductor":
        return _torch.inductor(options.inductor_mode, options.inductor)
    return _torch.named_backend(options.inner)


@functools.cache
def _adopt_every_layer() -> None:
    on_extensible(adopt)

    @_torch.on_compile_start
    def adopt_late() -> None:
        """Classes that other packages tagged since, which nothing announces."""
        for cls in tagged_subclasses():
            adopt(cls)


_adopt_every_layer()
