"""The forwards that ``kernelize`` puts on instances."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kernelgraph.kernel import Gradients, Kernel
from kernelgraph.layers import Extensible
from kernelgraph.report import Notes

if TYPE_CHECKING:
    from kernelgraph.eager.routes import Forms, Routes


# Both import parts of torch's compiler at the first call, and not before.


def inference_forward(kernel: Kernel, layer: Extensible, notes: Notes) -> Callable[..., object]:
    """Create a forward that runs ``kernel`` with the effects that a call of the layer has.

    Args:
        kernel: The kernel.
        layer: The layer that it stands in for.
        notes: Records what is found out about the kernel.
    """
    run = kernel.forward
    forms: Forms | None = None

    def forward(self: nn.Module, /, *args: object, **kwargs: object) -> object:
        nonlocal forms
        if torch.compiler.is_compiling():
            return run(self, *args, **kwargs)
        if forms is None:
            from kernelgraph.eager.routes import Forms

            forms = Forms(kernel, layer, notes)
        found = forms.find(self, args, kwargs)
        return run(self, *args, **kwargs) if found is None else found(self, args, kwargs)

    return _own(forward, run)


def training_forward(
    kernel: Kernel, layer: Extensible, gradients: Gradients, notes: Notes
) -> Callable[..., object]:
    """Create a forward that also never trains on a wrong gradient of ``kernel``.

    Args:
        kernel: The kernel.
        layer: The layer that it stands in for, whose reference the kernel is compared with.
        gradients: The options for gradients.
        notes: Records what is found out about the kernel.
    """
    run = kernel.forward
    routes: Routes | None = None

    def forward(self: nn.Module, /, *args: object, **kwargs: object) -> object:
        nonlocal routes
        if torch.compiler.is_compiling():
            return run(self, *args, **kwargs)
        if routes is None:
            from kernelgraph.eager.routes import Routes

            routes = Routes(kernel, layer, gradients, notes)
        recording = torch.is_grad_enabled()
        found = (routes if recording else routes.forms).find(self, args, kwargs)
        return run(self, *args, **kwargs) if found is None else found(self, args, kwargs)

    return _own(forward, run)


def _own(forward: Any, run: Callable[..., object]) -> Callable[..., object]:
    # Dynamo counts recompiles by code object: a layer that is compiled by itself needs its own.
    code = forward.__code__.replace(co_name=run.__qualname__)
    own = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    return functools.update_wrapper(own, run)
