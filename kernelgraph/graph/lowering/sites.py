"""Which kernel, if any, stands in for one call of a layer in a graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kernelgraph.graph.calls import State, UnsupportedState, read
from kernelgraph.graph.lowering.options import Options
from kernelgraph.kernel import BoundForward, Kernel, decide, decide_all
from kernelgraph.layers import Extensible, first_device
from kernelgraph.report import Decision, Reason
from kernelgraph.selection import KernelMapping, Mode, Rejection, Target, target_of

KERNEL = "__kernelgraph_kernel__"
"""Where a forward that ``kernelize`` bound for compiling keeps its kernel."""


@dataclass(frozen=True)
class Site:
    """A call of an extensible layer."""

    module: nn.Module
    layer: Extensible
    path: str
    target: Target | None = None
    mode: Mode | None = None
    grad: bool = False
    """Whether a gradient can flow through the call."""

    def decision(
        self,
        reason: Reason,
        kernel: str = "",
        detail: str = "",
        op: str = "",
        gradient: str = "",
    ) -> Decision:
        device = self.target.type if self.target else ""
        mode = str(self.mode) if self.mode else ""
        place = (self.path, self.layer.layer_name, device, mode)
        return Decision(*place, reason, kernel, detail, op, gradient)


class KeepReference(Exception):
    """A call keeps its reference."""

    def __init__(self, site: Site, reason: Reason, detail: str = "") -> None:
        self.decision = site.decision(reason, "", detail)


@dataclass
class Choices:
    """The decisions for the calls of one graph."""

    options: Options
    mapping: KernelMapping
    training: bool | None = None
    """Whether a gradient can flow through the calls; None: each call tells."""
    decisions: list[Decision] = field(default_factory=list)
    _outcomes: dict[tuple[type, Target, Mode], tuple[Kernel, ...] | Rejection] = field(
        default_factory=dict
    )

    def settle(self, site: Site, tensors: Iterable[Tensor]) -> tuple[Site, Kernel, State]:
        """`place` and `choose`, for a call with ``tensors`` among its arguments.

        Raises:
            KeepReference, Exception: As these do.
        """
        tensors = list(tensors)
        site = self.place(site, tensors)
        kernel, state = self.choose(site)
        if not site.grad and torch.is_grad_enabled():
            # A tensor that needs a gradient may be no parameter: one in a list, say.
            held = [read(site.module, path) for path in state.tensors]
            if any(tensor.requires_grad for tensor in held):
                site = self.place(site, [*tensors, *held])
                kernel, state = self.choose(site)
        return site, kernel, state

    def choose(self, site: Site, number: int = 0) -> tuple[Kernel, State]:
        """The kernel for a call whose device and mode are known, and the state that it reads.

        Args:
            site: The call.
            number: Which of the `kernels` for it.

        Raises:
            KeepReference: There is none.
            Exception: What `kernelgraph.kernel.decide` raises.
        """
        kernel = self.kernels(site)[number]
        try:
            return kernel, State.of(site.module, [site.layer.reference, kernel.forward])
        except UnsupportedState as error:
            raise KeepReference(site, Reason.NOT_AN_OP, str(error)) from None

    def kernels(self, site: Site) -> tuple[Kernel, ...]:
        """The kernels for a call whose device and mode are known; several only where the fastest
        is to be found.

        Raises:
            KeepReference: There is none.
            Exception: What `kernelgraph.kernel.decide` raises.
        """
        assert site.target is not None
        assert site.mode is not None
        kernelized = kernelized_with(site.module)
        if self.options.policy == "never":
            raise KeepReference(site, Reason.POLICY, "never")
        if kernelized is not None:
            return (kernelized[0],)
        if "forward" in site.module.__dict__:
            raise KeepReference(site, Reason.OWN_FORWARD)
        if site.layer.condition is not None and not site.layer.condition(site.module):
            raise KeepReference(site, Reason.CONDITION)
        key = (site.layer.owner, site.target, site.mode)
        if key not in self._outcomes:
            self._outcomes[key] = self._decide(site.layer, site.target, site.mode)
        outcome = self._outcomes[key]
        if isinstance(outcome, Rejection):
            raise KeepReference(site, outcome.reason, outcome.detail)
        return outcome

    def _decide(
        self, layer: Extensible, target: Target, mode: Mode
    ) -> tuple[Kernel, ...] | Rejection:
        if self.options.policy == "fastest":
            return decide_all(layer, target, mode, self.mapping)
        outcome = decide(layer, target, mode, self.mapping)
        return outcome if isinstance(outcome, Rejection) else (outcome,)

    def place(self, site: Site, tensors: Iterable[Tensor]) -> Site:
        """``site`` with the device and mode of a call with ``tensors`` among its arguments.

        Raises:
            KeepReference: No tensor tells the device, or no kernel is for such a device.
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
        except ValueError as error:  # meta, say
            raise KeepReference(site, Reason.NO_DEVICE, str(error)) from None
        return replace(site, target=target, mode=mode, grad=grad)


def kernelized_with(module: nn.Module) -> tuple[Kernel, Mode] | None:
    """The kernel that ``kernelize`` chose for an instance, if it did so for compiling."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, BoundForward) and (kernel := getattr(forward.func, KERNEL, None)):
        return kernel, forward.mode
    return None
