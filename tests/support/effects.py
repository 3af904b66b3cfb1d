"""Layers and kernels that differ in nothing but what a call does beside its result."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraph import Mode, kernelize, use_kernel_forward_from_hub
from tests.support.toys import only

INFERENCE, TRAINING = Mode.INFERENCE, Mode.TRAINING
WIDTH = 4


def hidden_write(tensor: Tensor, value: Tensor) -> None:
    """Write into a tensor as native code does: autograd counts nothing."""
    tensor.detach().numpy()[...] = value.detach().numpy()


def layer_of(reference: Any, **attributes: Any) -> Any:
    """Return an extensible layer with a forward; tensors among the attributes become buffers."""
    cls = type("Layer", (nn.Module,), {"forward": reference})
    use_kernel_forward_from_hub("Effect")(cls)
    layer = cls()
    layer.weight = nn.Parameter(torch.linspace(0.5, 2.0, WIDTH))
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            layer.register_buffer(name, value)
        else:
            setattr(layer, name, value)
    return layer


def pair(
    reference: Any, kernel: Any, mode: Mode = INFERENCE, options: Any = None, **attributes: Any
) -> tuple[Any, Any]:
    """Return a layer that runs on a kernel, and its twin that runs on its reference."""
    plain = layer_of(reference, **attributes)
    layer = copy.deepcopy(plain)
    with only(Effect=type("Kernel", (nn.Module,), {"forward": kernel})):
        kernelize(layer, mode=mode, device="cpu", **(options or {}))
    return layer, plain
