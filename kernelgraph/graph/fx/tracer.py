"""A ``torch.fx`` tracer whose leaves are the extensible layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from kernelgraph.layers import extensible


class Tracer(fx.Tracer):
    """A `torch.fx.Tracer` that never looks inside an extensible layer.

    Each call of one is a node, however its reference is written: `kernelgraph.rewrite` makes a
    kernel's op of it, and a graph that is not rewritten runs the layer itself. ::

        graph_module = torch.fx.GraphModule(model, kernelgraph.Tracer().trace(model))
        kernelgraph.rewrite(graph_module, mode=Mode.INFERENCE, example_inputs=(x,))

    A layer is a ``call_module`` node. An extensible function is a ``call_function`` node, unless
    it is a submodule of the model: a function that its class only refers to has no path there. In
    all else, its arguments too, this is torch's tracer.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module's calls become nodes: extensible layers, and torch's own leaves."""
        if extensible(type(m)) is not None:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A node for a leaf; for any other module, what calling it gives."""
        if not (_is_function(m) and self._is_outside(m)):
            return super().call_module(m, forward, args, kwargs)
        if hasattr(m, "__name__"):  # without a name no code can be written that calls it
            return self.create_proxy("call_function", m, args, kwargs)
        return forward(*args, **kwargs)

    def _is_outside(self, module: nn.Module) -> bool:
        try:
            self.path_of_module(module)
        except NameError:
            return True
        return False


def _is_function(module: nn.Module) -> bool:
    """Whether a module is an extensible function: of a layer, torch is to say that it is not
    installed, since the graph would not hold its parameters."""
    return extensible(type(module)) is not None and not any(
        (module._parameters, module._buffers, module._modules)
    )
