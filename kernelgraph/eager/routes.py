"""Which way an eager call of a layer goes through which a gradient is to flow.

Each kind of call is decided once: by the forms of the tensors that it is given and that its layer
holds, and by the Python values among them. There are three ways:

1. The kernel's own backward is right: its forward is called as it is.
2. It is missing, wrong, or cannot be told: the kernel's forward is run below autograd, and the
   gradient is that of the layer's reference (`BorrowedGradient`).
3. The kernel's output is wrong, or the call is of a kind that cannot be made again for a
   comparison: the reference is called, and no kernel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kernelgraph.eager.call_keys import Kinds
from kernelgraph.eager.recomputed import BorrowedGradient
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import (
    Call,
    Runner,
    State,
    UnsupportedState,
    UnsupportedValue,
    flatten,
    flatten_tensors,
    read,
)
from kernelgraph.graph.gradients import RECOMPUTED, Gradient, wanted_of
from kernelgraph.graph.verify import Verdict, judge
from kernelgraph.kernel import Gradients, Kernel
from kernelgraph.layers import Extensible
from kernelgraph.report import Notes, warn_once

_UNTOLD = "its gradient cannot be told"

Way = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""Makes a call, where the kernel's forward is not called as it is."""


@dataclass
class Route:
    """What was decided for a kind of call."""

    way: Way | None
    """None: the kernel's forward as it is."""
    gradient: str = ""
    """As in `Decision.gradient`."""
    kept: str = ""
    """Why the layer keeps its reference; empty where it does not."""
    wrong: str = ""
    """What there is to warn of."""
    instead: str = ""
    told: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    """The layers of which it was noted."""


class Routes:
    """The routes of the calls of one class of layers.

    Args:
        kernel: The kernel that stands in for them.
        layer: How the class is extensible.
        gradients: What was asked for.
        notes: Where to tell what was decided.
    """

    def __init__(
        self, kernel: Kernel, layer: Extensible, gradients: Gradients, notes: Notes
    ) -> None:
        self._kernel = kernel
        self._layer = layer
        self._gradients = gradients
        self._notes = notes
        self._routes: Kinds[Route] = Kinds()
        self._unknown: weakref.WeakKeyDictionary[nn.Module, Route] = weakref.WeakKeyDictionary()
        """The layers whose state cannot be told."""

    def find(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Way | None:
        """How to make a call; None: with the kernel's forward as it is."""
        if _torch.transforming():
            return self._reference
        route = self._routes.get(module, args, kwargs) or self._decide(module, args, kwargs)
        if route is None:
            return None
        if module not in route.told:
            self._tell(route, module)
        return route.way

    def _decide(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Route | None:
        if (route := self._unknown.get(module)) is None:
            try:
                state = State.of(module, [self._layer.reference, self._kernel.forward])
            except UnsupportedState as error:
                route = self._unknown[module] = self._kept(f"{_UNTOLD}: {error}")
            else:
                route = self._route(module, state, args, kwargs)
                self._routes.put(module, state, args, kwargs, route)
                return route
        return route if _may_need_gradient(module, args, kwargs) else None

    def _tell(self, route: Route, module: nn.Module) -> None:
        route.told.add(module)
        if route.wrong:
            name, path = self._layer.layer_name, self._notes.path(module)
            warn_once(str(self._kernel), name, path, route.wrong, route.instead)
        if route.kept:
            self._notes.reference(module, f"{self._kernel}: {route.kept}")
        elif route.gradient:
            self._notes.gradient(module, route.gradient)

    def _reference(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._layer.reference(module, *args, **kwargs)

    def _kept(self, why: str) -> Route:
        instead = "where a gradient is wanted, the layer runs on its own forward"
        return Route(self._reference, kept=why, wrong=why, instead=instead)

    def _route(
        self, module: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Route:
        values = [read(module, path) for path in state.tensors]
        try:
            call, operands = Call.of(state, values, self._layer, args, kwargs)
        except UnsupportedValue as error:
            return self._kept(f"{_UNTOLD}: {error}")
        wanted = wanted_of(operands)
        if not any(wanted):
            return Route(None)
        # Hooks that are set around the call, of activation checkpointing say, count what is saved.
        with saved_tensors_hooks(Tensor.detach, lambda saved: saved):
            verdict = judge(
                self._layer,
                module,
                self._kernel,
                call,
                operands,
                wanted,
                compare=self._gradients.verify,
            )
            if verdict.output:
                return self._kept(verdict.output)
            if not verdict.wrong:
                return Route(_by_own(self._kernel, call, verdict), "kernel")
            if self._gradients.wrong == "reference":
                return self._kept(verdict.wrong)
            try:
                way = BorrowedGradient(self._kernel, self._layer, call, operands)
            except UnsupportedValue as error:
                return self._kept(f"{verdict.wrong}; {error}")
        gradient = str(Gradient(wanted, None, verdict.wrong))
        return Route(way, gradient, wrong=verdict.wrong, instead=RECOMPUTED)


def _by_own(kernel: Kernel, call: Call, verdict: Verdict) -> Way | None:
    """The kernel with its own backward, which gets copies of what it must not have itself."""
    own = verdict.own
    assert own is not None
    overwrites = own.overwrites
    prepare: Callable[[Tensor], Tensor] | None = None
    if overwrites.grads:  # autograd may give the same one to another
        prepare = _copy
    elif verdict.contiguous:
        prepare = Tensor.contiguous
    saving = bool(overwrites.saved) or overwrites.private
    if prepare is None and not saving and not own.hidden_saves:
        return None
    runner = Runner(kernel.forward, call) if own.hidden_saves else None

    def way(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with saved_tensors_hooks(_pack, _unpack_copy) if saving else nullcontext():
            if runner is None:
                output = kernel.forward(module, *args, **kwargs)
            else:
                output = runner(_copies(call.operands_of(module, args, kwargs)))
        results, template = flatten_tensors(output)
        result: Any  # register_hook has no types
        for result in results:
            if prepare is not None and result.grad_fn is not None:
                result.register_hook(prepare)
        return output if runner is None else template.unflatten(_copies(results))

    return way


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _copies(values: Sequence[Any]) -> list[Any]:
    made: dict[int, Tensor] = {}
    return [made.setdefault(id(v), _copy(v)) if isinstance(v, Tensor) else v for v in values]


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), _torch.version_of(tensor)


def _unpack_copy(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if (
        _torch.version_of(tensor) != version
    ):  # which autograd does not look at, where there are hooks
        raise RuntimeError(
            "one of the tensors that a kernel saved for its backward has been written into by an "
            "in-place operation since"
        )
    return tensor.clone()


def _may_need_gradient(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if any(parameter.requires_grad for parameter in module.parameters()):
        return True
    try:
        leaves, _ = flatten((args, kwargs))
    except UnsupportedValue:
        return True
    return any(wanted_of(leaves))
