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
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kernelgraph.cache import remember
from kernelgraph.eager.call_keys import CallTable, FormKeys
from kernelgraph.eager.examination import Fit, argument_names, examine
from kernelgraph.eager.route_forwards import (
    RouteForward,
    fitted_forward,
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
from kernelgraph.layers import Extensible, program_data_kept
from kernelgraph.report import Notes, Reason, warn_once

_UNVERIFIABLE = "its gradient cannot be verified"
_KEEPS_REFERENCE = "where a gradient is wanted, the layer runs on its own forward"


# --- calls through which no gradient flows ------------------------------------------------------

MAX_FORMS = 4096
"""The largest number of forms that are remembered for a kernel and a class of layers."""


class Forms:
    """How calls of the layers of one class are made with a kernel, by their form.

    Args:
        kernel: The kernel that stands in for the layers.
        layer: How the class is extensible.
        notes: Records what is found out about the kernel.
    """

    def __init__(self, kernel: Kernel, layer: Extensible, notes: Notes) -> None:
        self._kernel = kernel
        self._layer = layer
        self._notes = notes
        self._keys = FormKeys()
        self._found: dict[Hashable, RouteForward | None] = {}

    def find(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> RouteForward | None:
        """Return the forward for a call; None: the kernel's forward as it is."""
        if _torch.transforming():
            return self.reference
        key = self._keys.of(module, args, kwargs)
        try:
            return self._found[key]
        except KeyError:  # a form that is new
            pass
        except TypeError:  # what was a flag of the layer is a list, say
            self._keys.read_flags(module)
            key = self._keys.of(module, args, kwargs)
        if _is_recorded():
            return None
        found = self._decide(module, args, kwargs)
        remember(self._found, key, found, MAX_FORMS)
        return found

    def _decide(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> RouteForward | None:
        fit = examine(self._layer, self._kernel, module, args, kwargs)
        if fit.why_not:
            return ReferenceForward(self._kernel, self._layer, self._notes, fit.why_not)
        names = argument_names(self._layer.reference, len(args))
        return fitted_forward(self._kernel, self._layer, fit, names)

    def reference(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """Call the layer's reference."""
        return self._layer.reference(module, *args, **kwargs)


def _is_recorded() -> bool:
    """Whether a trace or a CUDA graph records the call, which then cannot be examined."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


class ReferenceForward:
    """Calls the reference of a layer, and notes for each layer that it keeps it and why."""

    def __init__(self, kernel: Kernel, layer: Extensible, notes: Notes, why: str) -> None:
        self._kernel = kernel
        self._layer = layer
        self._notes = notes
        self._why = why
        self._noted: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        if module not in self._noted:
            self._noted.add(module)
            name, path = self._layer.layer_name, self._notes.path(module)
            warn_once(str(self._kernel), name, path, self._why, "the layer runs on its own forward")
            detail = f"{self._kernel}: {self._why}"
            self._notes.reference(module, Reason.UNSUITED, detail)
        return self._layer.reference(module, *args, **kwargs)


# --- calls through which a gradient flows ---------------------------------------------------------


@dataclass
class Route:
    """The decision for the calls with one key."""

    forward: RouteForward | None
    """The forward to call; None: the kernel's forward as it is."""
    gradient: str = ""
    """The source of the gradient, as in `Decision.gradient`; empty where none is wanted."""
    wrong: str = ""
    """What is wrong with the kernel; empty where nothing is."""
    reason: Reason | None = None
    """The reason why the layer runs on its reference; None if it does not."""
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
        self.forms = Forms(kernel, layer, notes)
        """How calls are made through which no gradient flows."""
        self._routes: CallTable[Route] = CallTable()
        self._unsupported: weakref.WeakKeyDictionary[nn.Module, Route] = weakref.WeakKeyDictionary()
        """The layers whose state no call can be repeated with."""

    def find(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> RouteForward | None:
        """Return the forward for a call; None: the kernel's forward as it is."""
        if _torch.transforming():
            return self.forms.reference
        route = self._routes.get(module, args, kwargs) or self._decide(module, args, kwargs)
        if route is None or not (route.gradient or route.reason):
            return self.forms.find(module, args, kwargs)
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
                route = self._on_reference(f"{_UNVERIFIABLE}: {error}", Reason.UNSUITED)
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
            return self._on_reference(f"{_UNVERIFIABLE}: {error}", Reason.UNSUITED)
        wanted = wanted_of(operands)
        if not any(wanted):
            return Route(None)
        fit = examine(self._layer, self._kernel, module, args, kwargs)
        if fit.why_not:
            return self._on_reference(fit.why_not, Reason.UNSUITED)
        names = argument_names(self._layer.reference, len(args))
        fitted = fitted_forward(self._kernel, self._layer, fit, names)
        classes = [self._kernel.layer, *(type(part) for part in module.modules())]
        with (
            # Hooks around the call, such as those of activation checkpointing, count what is saved.
            saved_tensors_hooks(Tensor.detach, lambda saved: saved),
            program_data_kept(classes, [self._layer.reference]),
            _torch.parametrizations_uncached(),
        ):
            return self._try(module, call, operands, wanted, fit, fitted)

    def _try(
        self,
        module: nn.Module,
        call: Call,
        operands: Sequence[object],
        wanted: tuple[bool, ...],
        fit: Fit,
        fitted: RouteForward | None,
    ) -> Route:
        layer, kernel, options = self._layer, self._kernel, self._gradients
        verdict = judge(layer, module, kernel, call, operands, wanted, compare=options.verify)
        if verdict.output:
            return self._on_reference(verdict.output, Reason.WRONG)
        if not verdict.wrong and not (verdict.own and verdict.own.hidden_saves and fit.once):
            assert verdict.own is not None
            forward = own_backward_forward(
                kernel, verdict.own, fitted, contiguous=verdict.contiguous
            )
            return Route(forward, "kernel")
        if options.wrong == "reference":
            return self._on_reference(verdict.wrong, Reason.WRONG)
        if fit.once:  # the reference runs again for its gradient
            return self._on_reference(f"{verdict.wrong}; {fit.once}", Reason.UNSUITED)
        try:
            forward = recomputed_gradient_forward(kernel, layer, call, operands, fit, fitted)
        except UnsupportedValue as error:
            return self._on_reference(f"{verdict.wrong}; {error}", Reason.UNSUITED)
        return Route(forward, str(Gradient(wanted, None, verdict.wrong)), verdict.wrong)

    def _on_reference(self, why: str, reason: Reason) -> Route:
        return Route(self.forms.reference, wrong=why, reason=reason)

    def _note(self, route: Route, module: nn.Module) -> None:
        """Put the route of a layer into the report, and warn of a kernel that is wrong."""
        route.noted.add(module)
        if route.wrong:
            name, path = self._layer.layer_name, self._notes.path(module)
            remedy = _KEEPS_REFERENCE if route.reason else RECOMPUTED
            warn_once(str(self._kernel), name, path, route.wrong, remedy)
        if route.reason:
            self._notes.reference(module, route.reason, f"{self._kernel}: {route.wrong}")
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
