"""``kernelize``: swap the forwards of a model's extensible layers for kernels, in place."""

from __future__ import annotations

import copy
import enum
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from kernelgraph.eager.training import training_forward
from kernelgraph.kernel import BoundForward, Gradients, Kernel, decide, decide_again
from kernelgraph.layers import (
    FUNCTIONS,
    Extensible,
    extensible,
    first_device,
    functions_of,
    reference_of,
)
from kernelgraph.report import Decision, Notes, Reason, Report, because, publish
from kernelgraph.selection import (
    KernelizeFallback,
    KernelMapping,
    Mode,
    Selection,
    Target,
    current_mapping,
    target_of,
    tried,
)

if TYPE_CHECKING:
    import torch

    from kernelgraph.selection import Device

logger = logging.getLogger("kernelgraph")

_FALLBACK_CASES = {
    Reason.NO_LAYER: KernelizeFallback.NO_LAYER,
    Reason.NO_DEVICE: KernelizeFallback.NO_DEVICE,
    Reason.NO_CAPABILITY: KernelizeFallback.NO_COMPATIBLE_PROPERTIES,
    Reason.NO_MODE: KernelizeFallback.NO_COMPATIBLE_MODE,
    Reason.NO_BACKWARD: KernelizeFallback.NO_COMPATIBLE_MODE,
    Reason.CANNOT_LOAD: KernelizeFallback.CANNOT_LOAD,
}


@dataclass(frozen=True)
class Recipe:
    """How the layers of one class were kernelized: enough to do it again in another process."""

    cls: type[nn.Module]
    selection: Selection
    target: Target
    mode: Mode
    function: Callable[..., Any]
    """What runs the kernel on an instance."""
    verify_gradients: bool = True
    """Whether its gradients are compared with the reference's before it trains."""
    wrong_gradient: str = "recompute"
    """What a kernel whose gradient is wrong may do: see `kernelize`."""

    def __reduce__(self) -> Any:
        # The layers of a class share their recipe, and so do their pickles: this is once a class.
        made_from = (self.cls, self.selection, self.target, self.mode)
        return _remake, (*made_from, self.verify_gradients, self.wrong_gradient)


def _remake(
    cls: type[nn.Module],
    selection: Selection,
    target: Target,
    mode: Mode,
    *gradients: Any,  # none in pickles of versions that did not verify them
) -> Recipe:
    """Unpickle a `Recipe`: for its kernel, or where that is not to be had here, the reference."""
    try:
        if (layer := extensible(cls)) is None:
            raise TypeError("the class is not extensible in this process")
        outcome = decide_again(layer, selection, target, mode)
        if isinstance(outcome, Kernel):
            return _recipe(cls, layer, outcome, target, mode, Gradients(*gradients), Notes())
        why = because(outcome.reason, outcome.detail)
    except Exception as error:  # a kernel is not worth the weights that come with it
        why = f"{type(error).__name__}: {error}"
    logger.warning("unpickled layers %s run their reference: %s", cls.__qualname__, why)
    return Recipe(cls, selection, target, mode, reference_of(cls), *gradients)


class KernelForward(BoundForward):
    """What ``kernelize`` puts on the instance.

    Unlike a bound method it can say how it is copied (bound to the copy) and pickled (by what it
    was made from).
    """

    recipe: Recipe

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelForward:
        return _bind(copy.deepcopy(self.args[0], memo), self.recipe)

    def __reduce__(self) -> Any:
        return _bind, (self.args[0], self.recipe)


def _bind(module: nn.Module, recipe: Recipe) -> KernelForward:
    forward = KernelForward(recipe.function, module)
    forward.recipe, forward.mode = recipe, recipe.mode
    forward.gradients = Gradients(recipe.verify_gradients, recipe.wrong_gradient)
    return forward


def _recipe(
    cls: type[nn.Module],
    layer: Extensible,
    kernel: Kernel,
    target: Target,
    mode: Mode,
    gradients: Gradients,
    notes: Notes,
) -> Recipe:
    """The recipe that runs ``kernel`` on the instances of ``cls`` in ``mode``."""
    function = kernel.forward
    if Mode.TRAINING in mode:
        function = training_forward(kernel, layer, gradients, notes)
    if Mode.TORCH_COMPILE in mode:
        from kernelgraph.graph.compile import kernelized_forward

        function = kernelized_forward(kernel, layer, function)
    return Recipe(cls, kernel.selection, target, mode, function, *gradients)


class _Plan(NamedTuple):
    """What was decided for the layers of a class."""

    decided: tuple[str, str, str, Reason, str, str]
    """The fields of `Decision` after ``path``."""
    recipe: Recipe | None
    """None where the reference is kept."""


def kernelize(
    model: nn.Module,
    *,
    mode: Mode | enum.Flag,
    device: str | torch.device | Device | None = None,
    use_fallback: bool | KernelizeFallback | enum.Flag = True,
    verify_gradients: bool = True,
    wrong_gradient: str = "recompute",
) -> nn.Module:
    """Swap the forwards of ``model``'s extensible layers for kernels of the current mapping.

    The model is changed in place, all of it or, where an error is raised, none of it. Every layer
    is decided anew at each call, so another mode, mapping or device takes effect, and a layer
    that has no kernel any more gets its reference back. `kernelgraph.last_report` says what was
    decided; each decision is also logged at INFO on the logger ``kernelgraph``.

    A deep copy and a pickle of the model keep its kernels. A shallow `copy.copy` of a layer goes on
    running on the layer that it is a copy of, until it is kernelized itself; and a model that is
    moved to another device is to be kernelized again.

    No kernel trains on its word alone. Where a gradient is wanted of a layer that was kernelized
    for training, the first call of each kind compares the kernel's output and gradients with those
    of the layer's reference. What is found wrong is told by one WARNING, and by the report.

    Args:
        model: Any module; its extensible layers, and the extensible functions attached to its
            modules, are changed.
        mode: ``Mode.INFERENCE`` or ``Mode.TRAINING``. With ``| Mode.TORCH_COMPILE`` the layers
            also become custom-op nodes in the graph of whichever backend compiles the model.
        device: The device to choose kernels for; by default that of the model's first parameter
            or buffer.
        use_fallback: Whether a layer may keep its reference where no kernel fits. False raises
            instead; a `KernelizeFallback` says in which cases it may.
        verify_gradients: Whether the outputs and gradients of kernels are compared with the
            reference's before they train. With False a missing gradient is still found, and a
            wrong one is believed.
        wrong_gradient: What is done where a kernel's gradient is missing or wrong: with
            ``"recompute"`` its forward is used and the gradient is the reference's, which is run
            again for it; with ``"reference"`` the reference is used for all of it.

    The ``kernels`` package's ``Mode``, ``Device`` and ``KernelizeFallback`` will do as well.

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
    mode = Mode.parse(mode)
    tried(mode)
    target = _target(model, device)
    allowed = KernelizeFallback.parse(use_fallback)
    gradients = Gradients.parse(verify_gradients, wrong_gradient)
    mapping = current_mapping()
    notes = Notes()

    layers: dict[type, Extensible | None] = {}
    plans: dict[type, _Plan] = {}
    decisions: list[Decision] = []
    changes: list[tuple[nn.Module, Recipe | None]] = []
    for path, module in candidates(model):
        cls = type(module)
        if cls not in layers:
            layers[cls] = extensible(cls)
        if (layer := layers[cls]) is None:
            continue
        own = module.__dict__.get("forward")
        left = None
        if own is not None and type(own) is not KernelForward:
            left = Reason.OWN_FORWARD
        elif layer.condition is not None and not layer.condition(module):
            left = Reason.CONDITION
            changes.append((module, None))
        if left is not None:
            decisions.append(Decision(path, layer.layer_name, target.type, str(mode), left))
            continue
        # Only now, so that what nobody wants is not loaded, and is no error.
        if cls not in plans:
            plans[cls] = _plan(cls, layer, path, target, mode, mapping, allowed, gradients, notes)
        plan = plans[cls]
        if plan.recipe is not None and Mode.TRAINING in mode:
            notes.places[module] = len(decisions)
        decisions.append(Decision(path, *plan.decided))
        changes.append((module, plan.recipe))

    for module, recipe in changes:
        # Around nn.Module.__setattr__, which looks for parameters first and is slow.
        if recipe is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = _bind(module, recipe)
    notes.report = Report("kernelize", tuple(decisions))
    publish(notes.report)
    return model


def _target(model: nn.Module, device: str | torch.device | Device | None) -> Target:
    if device is not None:
        return target_of(device)
    if (found := first_device(model)) is None:
        raise ValueError(
            "the model has neither parameters nor buffers to tell its device by: pass device"
        )
    try:
        return target_of(found)
    except ValueError as error:  # meta, say
        raise ValueError(f"the model is on {found}: pass device ({error})") from None


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, with its path; and each extensible function attached to one."""
    visited: set[nn.Module] = set()
    has_functions: dict[type, bool] = {}
    for path, module in model.named_modules(visited):
        yield path, module
        cls = type(module)
        if cls not in has_functions:
            has_functions[cls] = hasattr(cls, FUNCTIONS)
        if has_functions[cls] or FUNCTIONS in module.__dict__:
            for name, function in functions_of(module).items():
                if function not in visited:  # nor, then, does named_modules visit it again
                    visited.add(function)
                    yield f"{path}.{name}" if path else name, function


def _plan(
    cls: type[nn.Module],
    layer: Extensible,
    path: str,
    target: Target,
    mode: Mode,
    mapping: KernelMapping,
    allowed: KernelizeFallback,
    gradients: Gradients,
    notes: Notes,
) -> _Plan:
    """Decide for a class of layers, whose first instance to need it is at ``path``."""
    unloadable = KernelizeFallback.CANNOT_LOAD in allowed
    outcome = decide(layer, target, mode, mapping, keep_unloadable=unloadable)
    place = (layer.layer_name, target.type, str(mode))
    if isinstance(outcome, Kernel):
        recipe = _recipe(cls, layer, outcome, target, mode, gradients, notes)
        return _Plan((*place, Reason.KERNEL, str(outcome), ""), recipe)
    case = _FALLBACK_CASES.get(outcome.reason)
    if case is not None and case not in allowed:
        raise ValueError(
            f"layer {layer.layer_name!r} at {path or '(model)'}: no kernel for device {target} in "
            f"mode {mode}, and use_fallback does not allow the reference: "
            f"{because(outcome.reason, outcome.detail)}"
        )
    return _Plan((*place, outcome.reason, "", outcome.detail), None)
