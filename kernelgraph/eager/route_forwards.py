"""The forwards that are called in place of a kernel's own, for the layer's effects and gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kernelgraph.eager.effects import strides_of
from kernelgraph.eager.examination import Fit
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import (
    Call,
    Runner,
    Template,
    UnsupportedValue,
    flatten,
    flatten_tensors,
)
from kernelgraph.graph.gradients import OwnBackward, Recompute
from kernelgraph.graph.infer import extent, observe, sample_inputs, versions
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible
from kernelgraph.report import error_text

RouteForward: TypeAlias = Callable[[nn.Module, tuple[object, ...], dict[str, object]], object]
"""Makes the call of a layer with these positional and keyword arguments."""


# --- with the effects of the layer --------------------------------------------------------------


def fitted_forward(
    kernel: Kernel, layer: Extensible, fit: Fit, names: Sequence[str]
) -> RouteForward | None:
    """Call the kernel so that the call has no other effects than one of the layer has.

    Args:
        kernel: The kernel.
        layer: The layer that it stands in for.
        fit: How the kernel is called.
        names: The names of the positional arguments.

    Returns:
        None where the kernel can be called as it is.
    """
    if not (fit.private or fit.strides or fit.writes):
        return None
    run, reference = kernel.forward, layer.reference
    private = frozenset(fit.private)

    def forward(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if fit.writes and share_memory((*args, *kwargs.values())):
            # The order of reads and writes counts then, and a kernel's own may be another.
            return reference(module, *args, **kwargs)
        if private:
            args = tuple(
                [_private(v) if n in private else v for n, v in zip(names, args, strict=True)]
            )
            kwargs = {n: _private(v) if n in private else v for n, v in kwargs.items()}
        output = run(module, *args, **kwargs)
        return _relaid(output, fit.strides) if fit.strides else output

    return forward


def _private(value: Any) -> Any:
    """Return a copy of a tensor for a kernel to write into, which has its strides."""
    if 0 in value.stride() or value.is_contiguous():
        return value.clone()
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.copy_(value)


def _relaid(output: object, strides: dict[int, tuple[int, ...] | None]) -> object:
    """Return an output with copies of some of its tensors, which have the given strides."""
    tensors, template = flatten_tensors(output)
    for number, wanted in strides.items():
        tensor = tensors[number]
        tensors[number] = tensor.clone() if wanted is None else _laid_out(tensor, wanted)
    return template.unflatten(tensors)


def _laid_out(tensor: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """Return a tensor, or a copy of it, whose dimensions are in the order that strides have.

    Args:
        tensor: The tensor.
        strides: Strides without gaps, as `strides_of` returns them; None: any will do.
    """
    if strides is None or len(strides) != tensor.dim() or strides_of(tensor) == strides:
        return tensor
    order = sorted(range(tensor.dim()), key=lambda i: strides[i], reverse=True)
    if tensor.permute(*order).is_contiguous():  # its sizes are others than in the examination
        return tensor
    back = [order.index(i) for i in range(tensor.dim())]
    return tensor.permute(*order).clone(memory_format=torch.contiguous_format).permute(*back)


def share_memory(values: Iterable[object]) -> bool:
    """Whether two of the tensors in ``values`` have an element of memory in common."""
    try:
        leaves, _ = flatten(tuple(values))
    except UnsupportedValue:
        return True
    tensors = [v for v in leaves if isinstance(v, Tensor) and v.numel()]
    return any(_overlap(one, other) for i, one in enumerate(tensors) for other in tensors[i + 1 :])


def _overlap(one: Tensor, other: Tensor) -> bool:
    (start, end), (first, last) = extent(one), extent(other)
    if not (start < last and first < end):
        return False
    if one.itemsize != other.itemsize or (first - start) % one.itemsize:
        return True
    distance = (first - start) // one.itemsize
    return _places_overlap(
        (tuple(one.shape), one.stride()), (tuple(other.shape), other.stride()), distance
    )


@functools.lru_cache(maxsize=1024)
def _places_overlap(
    one: tuple[tuple[int, ...], tuple[int, ...]],
    other: tuple[tuple[int, ...], tuple[int, ...]],
    distance: int,
) -> bool:
    """Whether two tensors, the second ``distance`` elements behind the first, overlap."""
    begins = max(0, -distance), max(0, distance)
    ends = [
        begin + sum((n - 1) * s for n, s in zip(*layout, strict=True)) + 1
        for begin, layout in zip(begins, (one, other), strict=True)
    ]
    memory = torch.zeros(max(ends), dtype=torch.bool)
    memory.as_strided(*one, begins[0]).fill_(True)
    return bool(memory.as_strided(*other, begins[1]).any())


# --- with the kernel's own backward -------------------------------------------------------------


def own_backward_forward(
    kernel: Kernel, own: OwnBackward, fitted: RouteForward | None, *, contiguous: bool
) -> RouteForward | None:
    """Call the kernel, and give its own backward copies of what it must not receive itself.

    Args:
        kernel: The kernel.
        own: What the kernel's own backward needs.
        fitted: Calls the kernel with the effects of the layer; None: the kernel as it is.
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
        return fitted
    run = fitted or as_it_is(kernel)

    def forward(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if own.hidden_saves:  # the caller may write into arguments before the backward
            leaves, arguments = flatten((args, kwargs))
            args, kwargs = arguments.unflatten(_copies(leaves))
        with saved_tensors_hooks(_pack, _unpack_copy) if saving else nullcontext():
            output = run(module, args, kwargs)
        results, template = flatten_tensors(output)
        result: Any  # register_hook has no types
        for result in results:
            if prepare is not None and result.grad_fn is not None:
                result.register_hook(prepare)
        if own.hidden_saves:
            return template.unflatten([result.clone() for result in results])
        return output

    return forward


def as_it_is(kernel: Kernel) -> RouteForward:
    """Call the kernel as it is."""
    return lambda module, args, kwargs: kernel.forward(module, *args, **kwargs)


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
    kernel: Kernel,
    layer: Extensible,
    call: Call,
    operands: Sequence[object],
    fit: Fit,
    fitted: RouteForward | None,
) -> RouteForward:
    """Call the kernel below autograd; the gradient is that of the layer's reference.

    Args:
        kernel: The kernel.
        layer: The layer that it stands in for.
        call: The signature of the calls.
        operands: The operands of one such call. Reference and kernel are run on copies of them,
            to see through which results a gradient flows.
        fit: How the kernel is called.
        fitted: Calls it so; None: as it is.

    Raises:
        UnsupportedValue: If one of the two does what cannot be done below autograd or repeated, or
            the reference raises.
        Exception: Whatever the kernel raises.
    """
    for value in operands:
        if isinstance(value, Tensor) and not _is_plain(value):
            kind = f"{str(value.layout)[6:]} {type(value).__name__}"
            raise UnsupportedValue(f"a {kind} is among its operands")
    try:
        flows = _flows("the layer", layer.reference, call, operands)
    except UnsupportedValue:
        raise
    except Exception as error:  # it may need more of its operands than copies of them have
        raise UnsupportedValue(f"on copies the layer raises {error_text(error)}") from error
    layouts = fit.layouts or (None,) * len(flows)
    run_kernel = fitted or as_it_is(kernel)
    if fitted is None:
        _flows("the kernel", kernel.forward, call, operands)
    is_parametrized = any("parametrizations" in path for path in call.state.tensors)
    recompute = (_UncachedRecompute if is_parametrized else Recompute)(layer, call)

    def forward(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        operands = call.operands_of(module, args, kwargs)
        output: Template

        def run() -> list[Tensor]:
            nonlocal output
            before = versions(operands)
            results, output = flatten_tensors(run_kernel(module, args, kwargs))
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
        return output.unflatten([*map(_laid_out, results, layouts)])

    return forward


class _UncachedRecompute(Recompute):
    """Gradients of a layer with parametrizations, none of which is kept for a later call."""

    def gradients(self, *args: Any) -> list[Tensor]:
        with _torch.parametrizations_uncached():
            return super().gradients(*args)

    def differentiable_gradients(self, *args: Any) -> list[Tensor | None]:
        with _torch.parametrizations_uncached():
            return super().differentiable_gradients(*args)


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
