"""The forward that ``kernelize`` puts on instances for eager training."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from kernelgraph.kernel import Gradients, Kernel
from kernelgraph.layers import Extensible
from kernelgraph.report import Notes

if TYPE_CHECKING:
    from kernelgraph.eager.routes import Routes


def training_forward(
    kernel: Kernel, layer: Extensible, gradients: Gradients, notes: Notes
) -> Callable[..., object]:
    """Create a forward that runs ``kernel``, and never trains on a wrong gradient of it.

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
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return run(self, *args, **kwargs)
        if routes is None:
            # At the first call and not before: this imports parts of torch's compiler.
            from kernelgraph.eager.routes import Routes

            routes = Routes(kernel, layer, gradients, notes)
        route = routes.find(self, args, kwargs)
        return run(self, *args, **kwargs) if route is None else route(self, args, kwargs)

    # Dynamo counts recompiles by code object: a layer that is compiled by itself needs its own.
    code = forward.__code__.replace(co_name=run.__qualname__)
    own = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    return functools.update_wrapper(own, run)
