"""``kernelize``: swap the forwards of a model's extensible layers for kernels, in place."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from kernelgraph.devices import Target, target_of
from kernelgraph.kernel import Kernel, decide
from kernelgraph.layers import FUNCTIONS, Extensible, extensible, first_device, functions_of
from kernelgraph.mapping import KernelMapping, Rejection, Selection, current_mapping
from kernelgraph.modes import KernelizeFallback, Mode, tried
from kernelgraph.report import Decision, Reason, Report, publish

if TYPE_CHECKING:
    import torch

    from kernelgraph.devices import Device

logger = logging.getLogger("kernelgraph")

_FALLBACK_CASES = {
    Reason.NO_LAYER: KernelizeFallback.NO_LAYER,
    Reason.NO_DEVICE: KernelizeFallback.NO_DEVICE,
    Reason.NO_CAPABILITY: KernelizeFallback.NO_COMPATIBLE_PROPERTIES,
    Reason.NO_MODE: KernelizeFallback.NO_COMPATIBLE_MODE,
    Reason.NO_BACKWARD: KernelizeFallback.NO_COMPATIBLE_MODE,
    Reason.CANNOT_LOAD: KernelizeFallback.CANNOT_LOAD,
}


class Recipe(NamedTuple):
    """How a layer was kernelized: enough to do it again in another process."""

    selection: Selection
    target: Target
    mode: Mode


class KernelForward(functools.partial[Any]):
    """A kernel's ``forward`` bound to a layer: what ``kernelize`` puts on the instance.

    A ``functools.partial`` costs a call nothing, Dynamo traces it, and unlike a bound method it
    can say how it is copied (bound to the copy) and pickled (by what it was made from).
    """

    recipe: Recipe

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelForward:
        return _bind(self.func, copy.deepcopy(self.args[0], memo), self.recipe)

    def __reduce__(self) -> Any:
        return _rebind, (self.args[0], self.recipe)


def _bind(function: Callable[..., Any], module: nn.Module, recipe: Recipe) -> KernelForward:
    forward = KernelForward(function, module)
    forward.recipe = recipe
    return forward


def _rebind(module: nn.Module, recipe: Recipe) -> KernelForward:
    """Unpickle a `KernelForward`: with its kernel, or where that is not to be had, without."""
    layer = extensible(type(module))
    assert layer is not None, "a kernel was pickled for a class that is not extensible"
    selection = recipe.selection
    mapping = KernelMapping.parse(
        {layer.layer_name: {selection.device: {selection.mode: selection.repository}}}
    )
    outcome = decide(layer, recipe.target, recipe.mode, mapping, keep_unloadable=True)
    if isinstance(outcome, Rejection):
        logger.warning(
            "a pickled %s layer comes back with its reference: %s (%s)",
            layer.layer_name,
            outcome.reason.value,
            outcome.detail,
        )
        return _bind(layer.reference, module, recipe)
    return _bind(_forward_for(outcome, layer, recipe.mode), module, recipe)


def _forward_for(kernel: Kernel, layer: Extensible, mode: Mode) -> Callable[..., Any]:
    """The function that runs ``kernel`` on an instance in ``mode``."""
    if Mode.TORCH_COMPILE not in mode:
        return kernel.forward

    from kernelgraph.graph.layer_call import kernelized_forward

    return kernelized_forward(kernel, layer)


class _ClassPlan(NamedTuple):
    """What was decided for a class: the same for each of its instances."""

    layer: Extensible
    decided: tuple[str, str, str, Reason, str, str]
    """The fields of `Decision` after ``path``."""
    forward: Callable[..., Any] | None
    """What to bind to an instance; None where the reference is kept."""
    recipe: Recipe | None


def kernelize(
    model: nn.Module,
    *,
    mode: Mode,
    device: str | torch.device | Device | None = None,
    use_fallback: bool | KernelizeFallback = True,
) -> nn.Module:
    """Swap the forwards of ``model``'s extensible layers for kernels of the current mapping.

    The model is changed in place, all of it or, where an error is raised, none of it. Every layer
    is decided anew at each call, so another mode, mapping or device takes effect, and a layer
    that has no kernel any more gets its reference back. `kernelgraph.last_report` says what was
    decided; each decision is also logged at INFO on the logger ``kernelgraph``.

    Args:
        model: Any module; its extensible layers, and the extensible functions attached to its
            modules, are changed.
        mode: ``Mode.INFERENCE`` or ``Mode.TRAINING``. With ``| Mode.TORCH_COMPILE`` the layers
            also become custom-op nodes in the graph of whichever backend compiles the model.
        device: The device to choose kernels for; by default that of the model's first parameter
            or buffer.
        use_fallback: Whether a layer may keep its reference where no kernel fits. False raises
            instead; a `KernelizeFallback` says in which cases it may.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: If an argument is of the wrong type, or a hub layer is impure or does not fit.
        ValueError: If ``mode`` is not one to kernelize for, the device is unknown or cannot be
            told, a kernel was registered for a mode that it does not support, or no kernel fits
            and ``use_fallback`` does not allow the reference.
        Exception: Whatever a repository raises where it cannot be loaded, unless
            ``KernelizeFallback.CANNOT_LOAD`` is allowed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"kernelize changes an nn.Module, not {model!r}")
    tried(mode)
    target = _target(model, device)
    allowed = _fallback_cases(use_fallback)
    mapping = current_mapping()

    plans: dict[type, _ClassPlan | None] = {}
    decisions: list[Decision] = []
    swaps: list[tuple[nn.Module, _ClassPlan]] = []
    for path, module in _candidates(model):
        cls = type(module)
        if cls not in plans:
            plans[cls] = _plan(cls, path, target, mode, mapping, allowed)
        if (plan := plans[cls]) is None:
            continue
        own = module.__dict__.get("forward")
        if own is not None and type(own) is not KernelForward:
            decisions.append(_kept(path, plan, Reason.OWN_FORWARD))
        elif plan.layer.condition is not None and not plan.layer.condition(module):
            decisions.append(_kept(path, plan, Reason.CONDITION))
            swaps.append((module, plan._replace(forward=None)))
        else:
            decisions.append(Decision(path, *plan.decided))
            swaps.append((module, plan))

    for module, plan in swaps:
        if plan.forward is None:
            module.__dict__.pop("forward", None)
        else:
            assert plan.recipe is not None
            # Around nn.Module.__setattr__, which looks for parameters first and is slow.
            module.__dict__["forward"] = _bind(plan.forward, module, plan.recipe)
    publish(Report("kernelize", tuple(decisions)))
    return model


def _target(model: nn.Module, device: str | torch.device | Device | None) -> Target:
    if device is None and (device := first_device(model)) is None:
        raise ValueError(
            "the model has neither parameters nor buffers to tell its device by: pass device"
        )
    return target_of(device)


def _fallback_cases(use_fallback: bool | KernelizeFallback) -> KernelizeFallback:
    if isinstance(use_fallback, bool):
        return KernelizeFallback.DEFAULT if use_fallback else KernelizeFallback.NONE
    if isinstance(use_fallback, KernelizeFallback):
        return use_fallback
    raise TypeError(f"use_fallback is a bool or a KernelizeFallback, not {use_fallback!r}")


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, with its path; and each extensible function attached to one."""
    functions: set[nn.Module] = set()
    has_functions: dict[type, bool] = {}
    for path, module in model.named_modules():
        yield path, module
        cls = type(module)
        if cls not in has_functions:
            has_functions[cls] = hasattr(cls, FUNCTIONS)
        if has_functions[cls] or FUNCTIONS in module.__dict__:
            for name, function in functions_of(module).items():
                if function not in functions:
                    functions.add(function)
                    yield f"{path}.{name}" if path else name, function


def _plan(
    cls: type,
    path: str,
    target: Target,
    mode: Mode,
    mapping: KernelMapping,
    allowed: KernelizeFallback,
) -> _ClassPlan | None:
    """Decide for ``cls``, first met at ``path``; None if it is not extensible."""
    layer = extensible(cls)
    if layer is None:
        return None
    unloadable = KernelizeFallback.CANNOT_LOAD in allowed
    outcome = decide(layer, target, mode, mapping, keep_unloadable=unloadable)
    name, device, mode_ = layer.layer_name, target.type, str(mode)
    if isinstance(outcome, Kernel):
        decided = (name, device, mode_, Reason.KERNEL, str(outcome), "")
        recipe = Recipe(outcome.selection, target, mode)
        return _ClassPlan(layer, decided, _forward_for(outcome, layer, mode), recipe)
    case = _FALLBACK_CASES.get(outcome.reason)
    if case is not None and case not in allowed:
        there = f" ({outcome.detail})" if outcome.detail else ""
        raise ValueError(
            f"layer {name!r} at {path or '(model)'}: no kernel for device {target} in mode "
            f"{mode}, and use_fallback does not allow the reference: {outcome.reason.value}{there}"
        )
    return _ClassPlan(layer, (name, device, mode_, outcome.reason, "", outcome.detail), None, None)


def _kept(path: str, plan: _ClassPlan, reason: Reason) -> Decision:
    name, device, mode, *_ = plan.decided
    return Decision(path, name, device, mode, reason)
