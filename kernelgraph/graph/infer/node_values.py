"""The fake values of a graph's nodes: those in their metadata, or those of a run on fakes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import UnsupportedValue

VALUES = ("val", "example_value")
"""The metadata keys of values: that of FX passes and torch.export, and that of Dynamo."""


class NoValue(UnsupportedValue):
    """A node carries no fake value."""


def value_of(node: fx.Node) -> object:
    """Return the fake value in a node's metadata.

    Raises:
        NoValue: If there is none.
    """
    for key in VALUES:
        if key in node.meta:
            return node.meta[key]
    raise NoValue(f"node {node} carries no fake value")


def plain(value: object, each: Callable[[fx.Node], object] = lambda node: node) -> Any:
    """Return a node's arguments in plain containers, with ``each`` applied to the nodes in them."""
    if isinstance(value, fx.Node):
        return each(value)
    if isinstance(value, list):
        return [plain(part, each) for part in value]
    if type(value) is tuple:
        return tuple([plain(part, each) for part in value])
    if isinstance(value, dict):
        return {key: plain(part, each) for key, part in value.items()}
    return value


Forwards = Callable[[fx.Node, nn.Module], Callable[..., Any]]
"""Returns the function to call for a node that calls a module, given a copy of that module with
fakes for tensors."""


def propagate(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    values: dict[fx.Node, Any],
    forward_of: Forwards,
) -> None:
    """Run a graph on fakes and store the value of each node, inner graph modules included.

    The run uses copies of the modules in which each tensor is a fake, so nothing of the caller's
    changes, not even where a module sets its own attributes.

    Args:
        graph_module: The graph.
        example_inputs: Its inputs. Where some are fakes, the values belong to the same mode.
        values: The dict to store the values in.
        forward_of: See `Forwards`.

    Raises:
        ValueError: If the inputs do not fit the graph.
        RuntimeError: If a node does not run on fakes.
        Exception: What ``forward_of`` raises.
    """
    inputs = graph_module.graph.process_inputs(*example_inputs)
    _check_count(graph_module, len(inputs))
    mode = _torch.fake_mode_for(inputs)
    inputs = [_normal(v) if isinstance(v, Tensor) else v for v in inputs]
    fakes = [_torch.to_fake(mode, v) if isinstance(v, Tensor) else v for v in inputs]
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _torch.running_on(mode),
        _torch.no_data_pointers(),
    ):
        copy = _torch.fake_copy(graph_module, mode)
        _Run(graph_module, copy, forward_of, values).run(*fakes, enable_io_processing=False)


def _normal(tensor: Tensor) -> Tensor:
    """Return a tensor that may be written into; an inference tensor may not, and gets a copy."""
    if not tensor.is_inference():
        return tensor
    size, stride, dtype, device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    with torch.inference_mode(False):
        return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _check_count(graph_module: fx.GraphModule, given: int) -> None:
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if any(str(node.target).startswith("*") for node in placeholders):
        return
    needed = sum(not node.args for node in placeholders)  # the others have defaults
    if not needed <= given <= len(placeholders):
        names = ", ".join(str(node.target) for node in placeholders)
        raise ValueError(f"example_inputs are {given} values, and the graph takes ({names})")


class _Run(fx.Interpreter):
    """Runs a graph with the modules of a fake copy of its graph module."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        copy: nn.Module,
        forward_of: Forwards,
        values: dict[fx.Node, object],
    ) -> None:
        super().__init__(copy, graph=graph_module.graph)
        self.extra_traceback = False  # the error below says enough
        self._original, self._forward_of, self._values = graph_module, forward_of, values

    def run_node(self, n: fx.Node) -> object:
        inner = self._original.get_submodule(str(n.target)) if n.op == "call_module" else None
        if isinstance(inner, fx.GraphModule):
            value = self._run_inside(inner, n)
        else:
            run = self._run_of(n)
            try:
                value = run()
            except Exception as error:
                raise RuntimeError(
                    f"node {n} ({n.target}) does not run on fake tensors of example_inputs: "
                    f"{type(error).__name__}: {error}"
                ) from error
        # Detached, since a later node may change the shape in place.
        self._values[n] = _torch.map_tensors(Tensor.detach, value)
        return value

    def _run_inside(self, inner: fx.GraphModule, node: fx.Node) -> object:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        inputs = inspect.signature(inner.forward).bind(*args, **kwargs)
        inputs.apply_defaults()
        copy = self.fetch_attr(str(node.target))
        return _Run(inner, copy, self._forward_of, self._values).run(*inputs.args)

    def _run_of(self, node: fx.Node) -> Callable[[], object]:
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
        elif node.op == "call_function" and isinstance(node.target, nn.Module):
            module = node.target  # an extensible function, which has no tensors
        else:
            return functools.partial(super().run_node, node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return functools.partial(self._forward_of(node, module), *plain(args), **plain(kwargs))
