"""Call sites of extensible layers, and the decisions for those of one graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import State, UnsupportedState, read
from kernelgraph.graph.lowering.options import Options, Policy
from kernelgraph.kernel import BoundForward, Kernel, decide, decide_all
from kernelgraph.layers import Extensible
from kernelgraph.report import Decision, Reason
from kernelgraph.selection import (
    Choices,
    KernelMapping,
    Mode,
    Rejection,
    Target,
    first_device,
    target_of,
)

KERNEL_ATTRIBUTE = "__kernelgraph_kernel__"
"""The attribute in which a forward that ``kernelize`` bound for compiling keeps its kernel."""


@dataclass(frozen=True)
class Site:
    """A call of an extensible layer, and what a kernel is chosen by."""

    module: nn.Module
    layer: Extensible
    path: str
    """The layer's path in the model, as in ``named_modules()``."""
    target: Target | None = None
    """The device that a kernel is sought for; None until `GraphDecisions.with_target`."""
    mode: Mode | None = None
    """The mode that a kernel is sought for; None until `GraphDecisions.with_target`."""
    grad: bool = False
    """Whether a gradient can flow through the call."""
    checkpointed: bool = False
    """Whether it is inside of an activation checkpoint."""

    def decision(
        self,
        reason: Reason,
        kernel: str = "",
        detail: str = "",
        op: str = "",
        gradient: str = "",
    ) -> Decision:
        """Return the report's row for this call."""
        device = self.target.type if self.target else ""
        mode = str(self.mode) if self.mode else ""
        place = (self.path, self.layer.layer_name, device, mode)
        return Decision(*place, reason, kernel, detail, op, gradient)


class KeepReference(Exception):
    """Raised where a call is to run the layer's own forward, its reference."""

    def __init__(self, site: Site, reason: Reason, detail: str = "") -> None:
        self.decision = site.decision(reason, "", detail)


def check_untransformed(site: Site) -> None:
    """Check that a call is differentiated and batched by autograd alone.

    Raises:
        KeepReference: If a transform of ``torch.func`` or forward mode is active: an op has no
            rule for either.
    """
    if _torch.transforming():
        why = "a transform of torch.func, or forward-mode differentiation, is active"
        raise KeepReference(site, Reason.NOT_AN_OP, why)


@dataclass
class GraphDecisions:
    """Decides, and records, which kernel stands in for each call of a layer in one graph."""

    options: Options
    mapping: KernelMapping
    training: bool | None = None
    """Whether a gradient can flow through the calls; None: that is found out for each call."""
    decisions: list[Decision] = field(default_factory=list)
    """The decisions so far, in the order of the calls."""
    choices: Choices = field(init=False)
    """What the mapping has for the layers that were decided."""
    _outcomes: dict[tuple[type, Target, Mode], tuple[Kernel, ...] | Rejection] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        self.choices = Choices(self.mapping)

    def kernel_for(self, site: Site, tensors: Iterable[Tensor]) -> tuple[Site, Kernel, State]:
        """Return the kernel for a call, with the completed site and the state that is read.

        Args:
            site: The call site, for which `with_target` was not called yet.
            tensors: The tensors among the call's arguments.

        Raises:
            KeepReference, Exception: As `with_target` and `kernel_at` raise.
        """
        tensors = list(tensors)
        site = self.with_target(site, tensors)
        kernel, state = self.kernel_at(site)
        if not site.grad and torch.is_grad_enabled():
            # A tensor that requires a gradient need not be a parameter: it may be in a list.
            held = [read(site.module, path) for path in state.tensors]
            if any(tensor.requires_grad for tensor in held):
                site = self.with_target(site, [*tensors, *held])
                kernel, state = self.kernel_at(site)
        return site, kernel, state

    def with_target(self, site: Site, tensors: Iterable[Tensor]) -> Site:
        """Return ``site`` with its device, its mode, and whether a gradient can flow.

        Args:
            site: The call site.
            tensors: The tensors among the call's arguments.

        Raises:
            KeepReference: If neither the arguments nor the layer have a tensor, or if there are no
                kernels for devices of its type.
        """
        tensors = list(tensors)
        device = tensors[0].device if tensors else first_device(site.module)
        if device is None:
            raise KeepReference(site, Reason.NO_DEVICE, "no tensor tells the device")
        grad = self.training
        if grad is None:
            grad = torch.is_grad_enabled() and any(
                t.requires_grad for t in (*tensors, *site.module.parameters())
            )
        mode = (Mode.TRAINING if grad else Mode.INFERENCE) | Mode.TORCH_COMPILE
        if (kernelized := kernelized_with(site.module)) is not None:
            mode = kernelized[1]
        elif self.options.kernel_mode is not None:
            mode = self.options.kernel_mode
        try:
            target = target_of(device)
        except ValueError as error:  # for the meta device, among others
            raise KeepReference(site, Reason.NO_DEVICE, str(error)) from None
        return replace(site, target=target, mode=mode, grad=grad)

    def kernel_at(self, site: Site, number: int = 0) -> tuple[Kernel, State]:
        """Return a kernel for a call whose device and mode are known, and the state it reads.

        Args:
            site: The call site.
            number: The kernel's number among the `kernels` for the site.

        Raises:
            KeepReference: If there is no kernel, or none that can be an op.
            Exception: As `kernelgraph.kernel.decide` raises.
        """
        kernel = self.kernels(site)[number]
        try:
            return kernel, State.of(site.module, [site.layer.reference, kernel.forward])
        except UnsupportedState as error:
            raise KeepReference(site, Reason.NOT_AN_OP, str(error)) from None

    def kernels(self, site: Site) -> tuple[Kernel, ...]:
        """Return the kernels for a call whose device and mode are known.

        There are several only with ``policy="fastest"``.

        Raises:
            KeepReference: If there is none.
            Exception: As `kernelgraph.kernel.decide` raises.
        """
        assert site.target is not None
        assert site.mode is not None
        kernelized = kernelized_with(site.module)
        if self.options.policy == Policy.NEVER:
            raise KeepReference(site, Reason.POLICY, "never")
        if kernelized is not None:
            return (kernelized[0],)
        if "forward" in site.module.__dict__:
            raise KeepReference(site, Reason.OWN_FORWARD)
        if site.layer.condition is not None and not site.layer.condition(site.module):
            raise KeepReference(site, Reason.CONDITION)
        key = (site.layer.owner, site.target, site.mode)
        if key not in self._outcomes:
            self._outcomes[key] = self._select(site.layer, site.target, site.mode)
        outcome = self._outcomes[key]
        if isinstance(outcome, Rejection):
            raise KeepReference(site, outcome.reason, outcome.detail)
        return outcome

    def _select(
        self, layer: Extensible, target: Target, mode: Mode
    ) -> tuple[Kernel, ...] | Rejection:
        self.choices.note(layer.layer_name, target, mode)
        if self.options.policy == Policy.FASTEST:
            return decide_all(layer, target, mode, self.mapping)
        outcome = decide(layer, target, mode, self.mapping)
        return outcome if isinstance(outcome, Rejection) else (outcome,)


def kernelized_with(module: nn.Module) -> tuple[Kernel, Mode] | None:
    """Return the kernel and mode of a layer that ``kernelize`` bound for compiling, else None."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, BoundForward):
        return None
    kernel = getattr(forward.func, KERNEL_ATTRIBUTE, None)
    return (kernel, forward.mode) if kernel else None
