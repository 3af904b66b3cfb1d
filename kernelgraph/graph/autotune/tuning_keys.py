"""The tuning key of a call: text that calls share which share a winner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import State, UnsupportedValue, describe, flatten, read, stable_text
from kernelgraph.graph.infer import sample_inputs
from kernelgraph.graph.lowering import Options, Site
from kernelgraph.kernel import Kernel
from kernelgraph.keys import kernel_key, layer_key, software_versions, source_of
from kernelgraph.selection import device_name, driver_version

_VERSION = 1
"""The version of how winners are found; counted up when earlier ones are not to be used."""

Arguments = tuple[object, object]
"""The positional and the keyword arguments of a call."""


def tuning_key(
    site: Site,
    kernels: Sequence[Kernel],
    state: State,
    arguments: Arguments,
    options: Options,
) -> str:
    """Return the tuning key of a call, which is the same in every process.

    It has all that the times of the candidates depend on: software, device, layer, kernels, the
    sizes, dtypes and layout of tensors, constants, the compiler and its options. Sizes that vary
    count with their values in this call; the values of floats do not count.

    Args:
        site: The call site.
        kernels: The kernels for it.
        state: The state that the first kernel reads of the layer.
        arguments: The call's arguments.
        options: The backend's options.
    """
    structure, leaves = _flattened(arguments)
    tensors = [v for v in leaves if isinstance(v, Tensor)]
    held = [read(site.module, path) for path in state.tensors]
    layer = site.layer
    assert site.target is not None
    return repr(
        (
            (_VERSION, *software_versions()),
            sorted({device_name(v.device) for v in (*tensors, *held)}),
            torch.get_num_threads() if site.target.type == "cpu" else _toolkit(),
            layer_key(layer),
            [*map(kernel_key, kernels)],
            [source_of(layer, k) for k in kernels],
            (describe(state), state.numbers),
            (structure, [*map(_operand_key, leaves)]),
            [*map(_operand_key, held)],
            (site.grad, _torch.full_graph()),
            _torch.autocast_regions(),
            compiler_text(options),
            (options.own_backward, options.gradients, options.verify),
        )
    )


def compiler_text(options: Options) -> str:
    """Return text for the compiler of the graph and all its settings."""
    inner = options.inner
    named: Any = inner if hasattr(inner, "__qualname__") else type(inner)
    name = inner if isinstance(inner, str) else f"{named.__module__}.{named.__qualname__}"
    own = (options.inductor_mode, sorted(options.inductor.items(), key=str))
    return stable_text((name, own, _torch.inductor_settings() if inner == "inductor" else ""))


def _flattened(arguments: Arguments) -> tuple[str, list[object]]:
    """Return the tensors and numbers of arguments, and the rest of them as text."""
    try:
        leaves, template = flatten(arguments)
    except UnsupportedValue:  # such a call does not become an op
        return "", [*_torch.tensors_in(arguments)]
    return template.text(), leaves


def _operand_key(value: object) -> tuple[object, ...]:
    """Return what the time of a call depends on of one operand."""
    if isinstance(value, float):  # it may change with each call, and the time does not
        return ("float",)
    numbers = sample_inputs.measures_now(value)
    if not isinstance(value, Tensor):
        return numbers
    return numbers, str(value.dtype), value.device.type, value.requires_grad


def _toolkit() -> tuple[str | None, ...]:
    """Return the versions of torch's toolkit for GPUs and of their driver."""
    return torch.version.cuda, torch.version.hip, driver_version()
