"""The routes of eager calls of a layer through which a gradient flows.

A route is decided once for each call key (`CallTable`). There are three:

1. The kernel's own backward is right: the kernel's forward is called.
2. It is missing, wrong or unverifiable: the kernel's forward runs below autograd, and the gradient
   is that of the layer's reference (`recomputed_gradient_forward`).
3. The kernel's output is wrong, or the call cannot be repeated for a comparison: the reference is
   called, and no kernel.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kernelgraph.eager.call_keys import CallTable
from kernelgraph.eager.route_forwards import (
    RouteForward,
    own_backward_forward,
    recomputed_gradient_forward,
)
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import (
    Call,
    State,
    UnsupportedState,
    UnsupportedValue,
    flatten,
    read,
)
from kernelgraph.graph.gradients import RECOMPUTED, Gradient, wanted_of
from kernelgraph.graph.verify import judge
from kernelgraph.kernel import Gradients, Kernel
from kernelgraph.layers import Extensible
from kernelgraph.report import Notes, warn_once

_UNVERIFIABLE = "its gradient cannot be verified"
_KEEPS_REFERENCE = "where a gradient is wanted, the layer runs on its own forward"


@dataclass
class Route:
    """The decision for the calls with one key."""

    forward: RouteForward | None
    """The forward to call; None: the kernel's forward as it is."""
    gradient: str = ""
    """The source of the gradient, as in `Decision.gradient`; empty where none is wanted."""
    wrong: str = ""
    """What is wrong with the kernel; empty where nothing is."""
    keeps_reference: bool = False
    """Whether the layer runs on its reference."""
    noted: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    """The layers for which this route is in the report."""


class Routes:
    """The routes of the calls of one class of layers.

    Args:
        kernel: The kernel that stands in for them.
        layer: How the class is extensible.
        gradients: The options for gradients.
        notes: Records what is decided.
    """

    def __init__(
        self, kernel: Kernel, layer: Extensible, gradients: Gradients, notes: Notes
    ) -> None:
        self._kernel = kernel
        self._layer = layer
        self._gradients = gradients
        self._notes = notes
        self._routes: CallTable[Route] = CallTable()
        self._unsupported: weakref.WeakKeyDictionary[nn.Module, Route] = weakref.WeakKeyDictionary()
        """The layers whose state no call can be repeated with."""

    def find(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> RouteForward | None:
        """Return the forward for a call; None: the kernel's forward as it is."""
        if _torch.transforming():
            return self._reference
        route = self._routes.get(module, args, kwargs) or self._decide(module, args, kwargs)
        if route is None:
            return None
        if module not in route.noted:
            self._note(route, module)
        return route.forward

    def _decide(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Route | None:
        if (route := self._unsupported.get(module)) is None:
            try:
                state = State.of(module, [self._layer.reference, self._kernel.forward])
            except UnsupportedState as error:
                route = self._on_reference(f"{_UNVERIFIABLE}: {error}")
                self._unsupported[module] = route
            else:
                route = self._route(module, state, args, kwargs)
                self._routes.put(module, state, args, kwargs, route)
                return route
        return route if _may_need_gradient(module, args, kwargs) else None

    def _route(
        self,
        module: nn.Module,
        state: State,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> Route:
        """Decide on a route by a trial of the kernel."""
        values = [read(module, path) for path in state.tensors]
        try:
            call, operands = Call.of(state, values, self._layer, args, kwargs)
        except UnsupportedValue as error:
            return self._on_reference(f"{_UNVERIFIABLE}: {error}")
        wanted = wanted_of(operands)
        if not any(wanted):
            return Route(None)
        # Hooks around the call, such as those of activation checkpointing, count what is saved.
        with saved_tensors_hooks(Tensor.detach, lambda saved: saved):
            return self._try(module, call, operands, wanted)

    def _try(
        self, module: nn.Module, call: Call, operands: Sequence[object], wanted: tuple[bool, ...]
    ) -> Route:
        layer, kernel, options = self._layer, self._kernel, self._gradients
        verdict = judge(layer, module, kernel, call, operands, wanted, compare=options.verify)
        if verdict.output:
            return self._on_reference(verdict.output)
        if not verdict.wrong:
            assert verdict.own is not None
            forward = own_backward_forward(kernel, call, verdict.own, contiguous=verdict.contiguous)
            return Route(forward, "kernel")
        if options.wrong == "reference":
            return self._on_reference(verdict.wrong)
        try:
            forward = recomputed_gradient_forward(kernel, layer, call, operands)
        except UnsupportedValue as error:
            return self._on_reference(f"{verdict.wrong}; {error}")
        return Route(forward, str(Gradient(wanted, None, verdict.wrong)), verdict.wrong)

    def _on_reference(self, why: str) -> Route:
        return Route(self._reference, wrong=why, keeps_reference=True)

    def _reference(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        return self._layer.reference(module, *args, **kwargs)

    def _note(self, route: Route, module: nn.Module) -> None:
        """Put the route of a layer into the report, and warn of a kernel that is wrong."""
        route.noted.add(module)
        if route.wrong:
            name, path = self._layer.layer_name, self._notes.path(module)
            remedy = _KEEPS_REFERENCE if route.keeps_reference else RECOMPUTED
            warn_once(str(self._kernel), name, path, route.wrong, remedy)
        if route.keeps_reference:
            self._notes.reference(module, f"{self._kernel}: {route.wrong}")
        elif route.gradient:
            self._notes.gradient(module, route.gradient)


def _may_need_gradient(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> bool:
    if any(parameter.requires_grad for parameter in module.parameters()):
        return True
    try:
        leaves, _ = flatten((args, kwargs))
    except UnsupportedValue:
        return True
    return any(wanted_of(leaves))
