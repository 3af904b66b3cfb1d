"""The forwards that routes call in place of a kernel's own, for a gradient that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import (
    Call,
    Runner,
    Template,
    UnsupportedValue,
    flatten_tensors,
)
from kernelgraph.graph.gradients import OwnBackward, Recompute
from kernelgraph.graph.infer import observe, sample_inputs, versions
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible

RouteForward: TypeAlias = Callable[[nn.Module, tuple[object, ...], dict[str, object]], object]
"""Makes the call of a layer with these positional and keyword arguments."""


# --- with the kernel's own backward -------------------------------------------------------------


def own_backward_forward(
    kernel: Kernel, call: Call, own: OwnBackward, *, contiguous: bool
) -> RouteForward | None:
    """Call the kernel, and give its own backward copies of what it must not receive itself.

    Args:
        kernel: The kernel.
        call: The signature of the calls.
        own: What the kernel's own backward needs.
        contiguous: Whether it needs incoming gradients that are contiguous.

    Returns:
        None where the kernel can be called as it is.
    """
    overwrites = own.overwrites
    prepare: Callable[[Tensor], Tensor] | None = None
    if overwrites.grads:  # autograd may give the same gradient to another node
        prepare = _copy
    elif contiguous:
        prepare = Tensor.contiguous
    saving = bool(overwrites.saved) or overwrites.private
    if prepare is None and not saving and not own.hidden_saves:
        return None
    runner = Runner(kernel.forward, call) if own.hidden_saves else None

    def forward(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
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

    return forward


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _copies(values: Sequence[Any]) -> list[Any]:
    made: dict[int, Tensor] = {}
    return [made.setdefault(id(v), _copy(v)) if isinstance(v, Tensor) else v for v in values]


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), _torch.version_of(tensor)


def _unpack_copy(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if _torch.version_of(tensor) != version:  # autograd does not check this where there are hooks
        raise RuntimeError(
            "one of the tensors that a kernel saved for its backward has been written into by an "
            "in-place operation since"
        )
    return tensor.clone()


# --- with the reference's gradient --------------------------------------------------------------


def recomputed_gradient_forward(
    kernel: Kernel, layer: Extensible, call: Call, operands: Sequence[object]
) -> RouteForward:
    """Call the kernel below autograd; the gradient is that of the layer's reference.

    Args:
        kernel: The kernel.
        layer: The layer that it stands in for.
        call: The signature of the calls.
        operands: The operands of one such call. Reference and kernel are run on copies of them,
            to see through which results a gradient flows.

    Raises:
        UnsupportedValue: If one of the two does what cannot be done below autograd or repeated.
        Exception: Whatever they raise.
    """
    for value in operands:
        if isinstance(value, Tensor) and not _is_plain(value):
            kind = f"{str(value.layout)[6:]} {type(value).__name__}"
            raise UnsupportedValue(f"a {kind} is among its operands")
    flows = _flows("the layer", layer.reference, call, operands)
    _flows("the kernel", kernel.forward, call, operands)
    recompute = Recompute(layer, call)

    def forward(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        operands = call.operands_of(module, args, kwargs)
        output: Template

        def run() -> list[Tensor]:
            nonlocal output
            before = versions(operands)
            results, output = flatten_tensors(kernel.forward(module, *args, **kwargs))
            if before != versions(operands):
                raise RuntimeError(
                    f"kernel {kernel} wrote into its operands, which it did not do in its trial run"
                )
            if len(results) != len(flows):
                raise RuntimeError(
                    f"kernel {kernel} returned {len(results)} tensors, and the layer {len(flows)}"
                )
            return results

        results = recompute.call(run, operands, flows)
        return output.unflatten(results)

    return forward


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _flows(
    who: str, forward: Callable[..., object], call: Call, operands: Sequence[object]
) -> tuple[bool, ...]:
    """Run a forward, and tell for each result whether a gradient flows through it.

    Raises:
        UnsupportedValue: If it writes into operands, sets attributes, draws random numbers,
            returns no tensor, or returns a value that no op can return.
        Exception: Whatever it raises.
    """
    devices = {v.device for v in operands if isinstance(v, Tensor)}
    with sample_inputs.apart(operands), torch.enable_grad():
        before = _random_states(devices)
        copies = call.counterparts(
            operands,
            # Not a leaf: then a write into it shows as a new version, and does not raise.
            lambda i, v: v.detach().clone().requires_grad_(v.requires_grad).clone(),
        )
        spec, results = observe(Runner(forward, call), copies)
        drawn = not all(map(torch.equal, before, _random_states(devices)))
    if spec.written:
        names = ", ".join(call.names[i] for i in spec.written)
        raise UnsupportedValue(f"{who} writes into {names}")
    if drawn:  # a second run would draw other numbers
        raise UnsupportedValue(f"{who} draws random numbers")
    return tuple(result.requires_grad for result in results)


def _random_states(devices: Iterable[torch.device]) -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"]
    xpu = [torch.xpu.get_rng_state(d) for d in devices if d.type == "xpu"]
    return [torch.get_rng_state(), *cuda, *xpu]
