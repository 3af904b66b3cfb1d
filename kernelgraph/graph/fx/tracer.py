"""A ``torch.fx`` tracer whose leaves are the extensible layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from kernelgraph.layers import extensible


class Tracer(fx.Tracer):
    """A `torch.fx.Tracer` that never looks inside an extensible layer.

    Each call of such a layer is one node, whatever Python its ``forward`` uses.
    `kernelgraph.rewrite` replaces the node by a kernel's op; a graph that is not rewritten runs the
    layer itself.

    An extensible layer is a ``call_module`` node. An extensible function is a ``call_function``
    node, because a function that a class only refers to has no path in the model; one that is a
    submodule is a ``call_module`` node. In all else this is torch's tracer.

    Args:
        autowrap_modules: As for `torch.fx.Tracer`.
        autowrap_functions: As for `torch.fx.Tracer`.
        param_shapes_constant: As for `torch.fx.Tracer`.

    Raises:
        torch.fx.proxy.TraceError: By ``trace``, if the model outside of the layers has control flow
            that depends on values.
        NameError: By ``trace``, if a layer that is called is no submodule of the model.

    Example:
        >>> @kg.use_kernel_forward_from_hub("Clipped")
        ... class Clipped(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x / x.norm() if x.norm() > 1 else x  # torch.fx cannot trace this
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), Clipped())
        >>> graph_module = torch.fx.GraphModule(model, kg.Tracer().trace(model))
        >>> [(node.op, node.target) for node in graph_module.graph.nodes if node.args]
        [('call_module', '0'), ('call_module', '1'), ('output', 'output')]
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module's calls are nodes: extensible layers' and torch's own leaves'."""
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
        """Return a node for the call of a leaf, or else what the call returns."""
        if not (_is_function(m) and self._is_outside(m)):
            return super().call_module(m, forward, args, kwargs)
        if hasattr(m, "__name__"):  # without a name no code can be written that calls it
            return self.create_proxy("call_function", m, args, kwargs)
        return forward(*args, **kwargs)

    def _is_outside(self, module: nn.Module) -> bool:
        """Return whether a module is no submodule of the traced model."""
        try:
            self.path_of_module(module)
        except NameError:
            return True
        return False


def _is_function(module: nn.Module) -> bool:
    """Return whether a module is an extensible function.

    A layer with parameters is not, so that torch raises its error for a module that is not
    installed: the graph would not have the parameters.
    """
    return extensible(type(module)) is not None and not any(
        (module._parameters, module._buffers, module._modules)
    )
