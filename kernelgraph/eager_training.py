"""What ``kernelize`` puts on instances for eager training: no kernel trains on its word alone."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kernelgraph.kernel import Gradients, Kernel
from kernelgraph.layers import Extensible
from kernelgraph.report import Decision, Reason, Report, amend

if TYPE_CHECKING:
    from kernelgraph.graph.routes import Routes


def training_forward(
    kernel: Kernel, layer: Extensible, gradients: Gradients, notes: Notes
) -> Callable[..., Any]:
    """A forward that runs ``kernel``, and where a gradient is wanted never trains on a wrong one.

    Args:
        kernel: The kernel.
        layer: The layer that it stands in for, whose reference says what is right.
        gradients: What was asked for.
        notes: Where to tell what was found.
    """
    run = kernel.forward
    routes: Routes | None = None

    def forward(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        nonlocal routes
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return run(self, *args, **kwargs)
        if routes is None:
            # At the first call and not before: it imports what torch's compiler is made of.
            from kernelgraph.graph.routes import Routes

            routes = Routes(kernel, layer, gradients, notes)
        route = routes.find(self, args, kwargs)
        return run(self, *args, **kwargs) if route is None else route(self, args, kwargs)

    # Dynamo counts recompiles by code object: a layer that is compiled by itself has its own.
    code = forward.__code__.replace(co_name=run.__qualname__)
    own = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    return functools.update_wrapper(own, run)


class Notes:
    """What became of the kernels of one ``kernelize`` when they were to train."""

    def __init__(self) -> None:
        self.report: Report | None = None
        """The report of that ``kernelize``, as amended until now."""
        self.places: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        """Where in the report each layer is. A copy of one is not in it."""
        self._lock = threading.Lock()

    def path(self, module: nn.Module) -> str | None:
        """The path of a layer in the model that was kernelized."""
        number = self.places.get(module)
        return None if number is None or self.report is None else self._decision(number).path

    def gradient(self, module: nn.Module, source: str) -> None:
        """Note where the gradient of a kernel comes from; the worst of its calls counts."""
        self._amend(module, lambda d: d._replace(gradient=source) if _is_worse(source, d) else d)

    def reference(self, module: nn.Module, detail: str) -> None:
        """Note that a layer keeps its reference, and why."""
        self._amend(
            module,
            lambda d: (
                d._replace(reason=Reason.WRONG, kernel="", detail=detail, gradient="")
                if d.uses_kernel
                else d
            ),
        )

    def _amend(self, module: nn.Module, change: Callable[[Decision], Decision]) -> None:
        number = self.places.get(module)
        with self._lock:
            if number is None or self.report is None:
                return
            old = self._decision(number)
            if (new := change(old)) != old:
                self.report = amend(self.report, number, new)

    def _decision(self, number: int) -> Decision:
        assert self.report is not None
        return self.report.decisions[number]


def _is_worse(source: str, decision: Decision) -> bool:
    return decision.uses_kernel and (not decision.gradient or decision.gradient == "kernel")
