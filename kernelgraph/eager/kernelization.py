"""``kernelize``: replace the forwards of a model's extensible layers by kernels, in place."""

from __future__ import annotations

import copy
import enum
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from kernelgraph.eager.instance_forwards import inference_forward, training_forward
from kernelgraph.kernel import BoundForward, Gradients, Kernel, decide, decide_again
from kernelgraph.layers import (
    FUNCTIONS,
    Extensible,
    extensible,
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
    first_device,
    serving_modes,
    target_of,
)

if TYPE_CHECKING:
    import torch

    from kernelgraph.selection import Device

logger = logging.getLogger("kernelgraph")


# --- the public function ------------------------------------------------------------------------


def kernelize(
    model: nn.Module,
    *,
    mode: Mode | enum.Flag,
    device: str | torch.device | Device | None = None,
    use_fallback: bool | KernelizeFallback | enum.Flag = True,
    verify_gradients: bool = True,
    wrong_gradient: str = "recompute",
) -> nn.Module:
    """Replace the forwards of ``model``'s extensible layers by kernels of the current mapping.

    The model is changed in place, all of it or, where an error is raised, none of it. Every layer
    is decided anew at each call, so another mode, mapping or device takes effect, and a layer
    that has no kernel any more gets its reference back. `kernelgraph.last_report` returns what
    was decided; each decision is also logged at INFO on the logger ``kernelgraph``.

    A deep copy and a pickle of the model keep its kernels. A shallow `copy.copy` of a layer runs
    on the layer that it was copied from until it is kernelized itself. A model that was moved to
    another device must be kernelized again.

    The first call of a layer with new layouts of its arguments runs the kernel and the layer's
    reference on copies, and compares what they do beside their results. Where the kernel cannot be
    called so that a call does what the reference does, the call runs on the reference.

    By default no kernel trains unverified. The first time that a layer kernelized for training is
    called in some way with a gradient wanted, the kernel's output and gradients are compared with
    those of the layer's reference. One WARNING and the report say what is wrong.

    Args:
        model: Any module. Its extensible layers, and the extensible functions attached to its
            modules, are changed.
        mode: ``Mode.INFERENCE`` or ``Mode.TRAINING``. With ``| Mode.TORCH_COMPILE`` the layers
            also become custom-op nodes in the graph of whichever backend compiles the model.
        device: The device to choose kernels for; by default that of the model's first parameter
            or buffer.
        use_fallback: Whether a layer may keep its reference where no kernel fits. False raises
            an error instead; a `KernelizeFallback` says in which cases it may.
        verify_gradients: Whether the outputs and gradients of kernels are compared with the
            reference's before they train. With False a missing gradient is still found, and a
            wrong one is not.
        wrong_gradient: What happens where a kernel's gradient is missing or wrong. With
            ``"recompute"`` the kernel's forward is used, and the reference is run again for the
            gradient; with ``"reference"`` the reference is used for both.

    The ``Mode``, ``Device`` and ``KernelizeFallback`` of the ``kernels`` package are accepted too.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: If an argument is of the wrong type, or a hub layer is impure or does not fit.
        ValueError: If ``mode`` is not one to kernelize for, the device is unknown or cannot be
            derived from the model, a kernel was registered for a mode that it does not support,
            or no kernel fits and ``use_fallback`` does not allow the reference.
        Exception: Whatever a repository raises where it cannot be loaded, unless
            ``KernelizeFallback.CANNOT_LOAD`` is allowed.

    Example:
        With the kernels of ``examples/kernels``, for a layer that is tagged with their name:

        >>> @kg.use_kernel_forward_from_hub("SiluAndMul")
        ... class SiluAndMul(torch.nn.Module):
        ...     def forward(self, x):
        ...         gate, up = x.chunk(2, dim=-1)
        ...         return torch.nn.functional.silu(gate) * up
        >>> kernel = kg.LocalLayerRepository("examples/kernels", layer_name="SiluAndMul")
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), SiluAndMul())
        >>> with kg.use_kernel_mapping({"SiluAndMul": {"cpu": kernel}}):
        ...     model = kg.kernelize(model, mode=kg.Mode.INFERENCE)
        >>> [decision] = kg.last_report().kernels
        >>> decision.path, decision.layer
        ('1', 'SiluAndMul')
        >>> with torch.inference_mode():
        ...     model(torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"kernelize changes an nn.Module, not {model!r}")
    mode = Mode.parse(mode)
    serving_modes(mode)
    run = _Kernelization(
        _target(model, device),
        mode,
        KernelizeFallback.parse(use_fallback),
        Gradients.parse(verify_gradients, wrong_gradient),
        current_mapping(),
    )
    for path, module in named_layers(model):
        run.decide(path, module)
    run.install()
    run.report()
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
    except ValueError as error:  # the meta device, for example
        raise ValueError(f"the model is on {found}: pass device ({error})") from None


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module of ``model`` once, and each extensible function attached to one, with its
    path."""
    visited: set[nn.Module] = set()
    has_functions: dict[type, bool] = {}
    for path, module in model.named_modules(visited):
        yield path, module
        cls = type(module)
        if cls not in has_functions:
            has_functions[cls] = hasattr(cls, FUNCTIONS)
        if has_functions[cls] or FUNCTIONS in module.__dict__:
            for name, function in functions_of(module).items():
                if function not in visited:
                    visited.add(function)  # and named_modules does not visit it again
                    yield f"{path}.{name}" if path else name, function


# --- one run ------------------------------------------------------------------------------------

_FALLBACK_CASES = {
    Reason.NO_LAYER: KernelizeFallback.NO_LAYER,
    Reason.NO_DEVICE: KernelizeFallback.NO_DEVICE,
    Reason.NO_CAPABILITY: KernelizeFallback.NO_COMPATIBLE_PROPERTIES,
    Reason.NO_MODE: KernelizeFallback.NO_COMPATIBLE_MODE,
    Reason.NO_BACKWARD: KernelizeFallback.NO_COMPATIBLE_MODE,
    Reason.CANNOT_LOAD: KernelizeFallback.CANNOT_LOAD,
}


class _ClassPlan(NamedTuple):
    """The decision for the layers of one class."""

    decision: Decision
    """The decision without a path."""
    recipe: Recipe | None
    """None where the reference is kept."""


class _Kernelization:
    """One run of ``kernelize``: the decisions for its layers, and the changes that follow."""

    def __init__(
        self,
        target: Target,
        mode: Mode,
        allowed: KernelizeFallback,
        gradients: Gradients,
        mapping: KernelMapping,
    ) -> None:
        self._target = target
        self._mode = mode
        self._allowed = allowed
        self._gradients = gradients
        self._mapping = mapping
        self._notes = Notes()
        self._layers: dict[type, Extensible | None] = {}
        self._plans: dict[type, _ClassPlan] = {}
        self._decisions: list[Decision] = []
        self._changes: list[tuple[nn.Module, Recipe | None]] = []

    def decide(self, path: str, module: nn.Module) -> None:
        """Decide for a module, if it is an extensible layer. Nothing is changed yet."""
        cls = type(module)
        if cls not in self._layers:
            self._layers[cls] = extensible(cls)
        if (layer := self._layers[cls]) is None:
            return
        own = module.__dict__.get("forward")
        if own is not None and type(own) is not KernelForward:
            self._keep_reference(path, layer, Reason.OWN_FORWARD)
            return
        if layer.condition is not None and not layer.condition(module):
            self._keep_reference(path, layer, Reason.CONDITION)
            self._changes.append((module, None))
            return
        # Planned at the first instance that needs it: what none needs is not loaded, and its
        # absence is no error.
        if cls not in self._plans:
            self._plans[cls] = self._plan(cls, layer, path)
        plan = self._plans[cls]
        if plan.recipe is not None:
            self._notes.places[module] = len(self._decisions)
        self._decisions.append(Decision(path, *plan.decision[1:]))
        self._changes.append((module, plan.recipe))

    def _keep_reference(self, path: str, layer: Extensible, reason: Reason) -> None:
        self._decisions.append(self._decision(layer, reason)._replace(path=path))

    def _decision(
        self, layer: Extensible, reason: Reason, kernel: str = "", detail: str = ""
    ) -> Decision:
        device, mode = self._target.type, str(self._mode)
        return Decision("", layer.layer_name, device, mode, reason, kernel, detail)

    def _plan(self, cls: type[nn.Module], layer: Extensible, path: str) -> _ClassPlan:
        """Decide for a class of layers, whose first instance to need it is at ``path``."""
        outcome = decide(
            layer,
            self._target,
            self._mode,
            self._mapping,
            keep_unloadable=KernelizeFallback.CANNOT_LOAD in self._allowed,
        )
        if isinstance(outcome, Kernel):
            recipe = Recipe.of(
                cls, layer, outcome, self._target, self._mode, self._gradients, self._notes
            )
            return _ClassPlan(self._decision(layer, Reason.KERNEL, str(outcome)), recipe)
        case = _FALLBACK_CASES.get(outcome.reason)
        if case is not None and case not in self._allowed:
            raise ValueError(
                f"layer {layer.layer_name!r} at {path or '(model)'}: no kernel for device "
                f"{self._target} in mode {self._mode}, and use_fallback does not allow the "
                f"reference: {because(outcome.reason, outcome.detail)}"
            )
        return _ClassPlan(self._decision(layer, outcome.reason, detail=outcome.detail), None)

    def install(self) -> None:
        """Change the forwards of the layers."""
        for module, recipe in self._changes:
            # Around nn.Module.__setattr__, which looks for parameters first and is slow.
            if recipe is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = _bind(module, recipe)

    def report(self) -> None:
        """Publish the decisions."""
        self._notes.report = Report("kernelize", tuple(self._decisions))
        publish(self._notes.report)


# --- the forwards of instances, and their copies and pickles ------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How the layers of one class were kernelized: enough to repeat it in another process."""

    cls: type[nn.Module]
    selection: Selection
    target: Target
    mode: Mode
    function: Callable[..., object]
    """The function that runs the kernel on an instance."""
    verify_gradients: bool = True
    """Whether the kernel's gradients are compared with the reference's before it trains."""
    wrong_gradient: str = "recompute"
    """What happens where the kernel's gradient is wrong: see `kernelize`."""

    @classmethod
    def of(
        cls,
        layer_class: type[nn.Module],
        layer: Extensible,
        kernel: Kernel,
        target: Target,
        mode: Mode,
        gradients: Gradients,
        notes: Notes,
    ) -> Recipe:
        """Return the recipe that runs ``kernel`` on the instances of ``layer_class``."""
        if Mode.TRAINING in mode:
            function = training_forward(kernel, layer, gradients, notes)
        else:
            function = inference_forward(kernel, layer, notes)
        if Mode.TORCH_COMPILE in mode:
            from kernelgraph.graph.compile import kernelized_forward

            function = kernelized_forward(kernel, layer, function)
        return cls(layer_class, kernel.selection, target, mode, function, *gradients)

    def __reduce__(self) -> tuple[Callable[..., Recipe], tuple[object, ...]]:
        # The layers of a class share their recipe, and so do their pickles: this runs once for a
        # class.
        ingredients = (self.cls, self.selection, self.target, self.mode)
        return _unpickle_recipe, (*ingredients, self.verify_gradients, self.wrong_gradient)


def _unpickle_recipe(
    cls: type[nn.Module],
    selection: Selection,
    target: Target,
    mode: Mode,
    verify_gradients: bool,
    wrong_gradient: str,
) -> Recipe:
    """Make a `Recipe` for its kernel, or where that cannot be loaded here, for the reference."""
    gradients = Gradients(verify_gradients, wrong_gradient)
    try:
        if (layer := extensible(cls)) is None:
            raise TypeError("the class is not extensible in this process")
        outcome = decide_again(layer, selection, target, mode)
        if isinstance(outcome, Kernel):
            return Recipe.of(cls, layer, outcome, target, mode, gradients, Notes())
        why = because(outcome.reason, outcome.detail)
    except Exception as error:  # losing a kernel must not lose the weights pickled with it
        why = f"{type(error).__name__}: {error}"
    logger.warning("unpickled layers %s run their reference: %s", cls.__qualname__, why)
    return Recipe(cls, selection, target, mode, reference_of(cls), *gradients)


class KernelForward(BoundForward):
    """The ``forward`` that ``kernelize`` puts on an instance.

    Unlike a bound method it defines how it is copied (bound to the copy of the instance) and
    pickled (by its recipe).
    """

    recipe: Recipe

    def __deepcopy__(self, memo: dict[int, object]) -> KernelForward:
        return _bind(copy.deepcopy(self.args[0], memo), self.recipe)

    def __reduce__(self) -> tuple[Callable[..., KernelForward], tuple[nn.Module, Recipe]]:
        return _bind, (self.args[0], self.recipe)


@functools.cache  # once in the process
def _replicate_with_kernels() -> None:
    """Bind the kernels of the replicas that ``nn.DataParallel`` makes to the replicas.

    A replica has the attributes of its module, and so a forward that is bound to the module. torch
    has no hook there. This is not in `kernelgraph.graph._torch`, which imports torch's compiler.
    Tried on 2.13.
    """
    replicate: Callable[[nn.Module], nn.Module] = nn.Module._replicate_for_data_parallel

    @functools.wraps(replicate)
    def replicate_and_bind(self: nn.Module) -> nn.Module:
        replica = replicate(self)
        own = replica.__dict__.get("forward")
        if type(own) is KernelForward:
            replica.__dict__["forward"] = _bind(replica, own.recipe)
        return replica

    nn.Module._replicate_for_data_parallel = replicate_and_bind  # type: ignore[method-assign]


def _bind(module: nn.Module, recipe: Recipe) -> KernelForward:
    _replicate_with_kernels()
    forward = KernelForward(recipe.function, module)
    forward.recipe, forward.mode = recipe, recipe.mode
    forward.gradients = Gradients(recipe.verify_gradients, recipe.wrong_gradient)
    return forward
