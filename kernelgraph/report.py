"""What was decided for each extensible layer, and why: the record that every path leaves."""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

logger = logging.getLogger("kernelgraph")


class Reason(enum.Enum):
    """Why a layer runs on a kernel, or on its reference. The value is the wording for people."""

    KERNEL = "kernel"
    NO_LAYER = "no kernel is registered under the layer's name"
    NO_DEVICE = "no kernel is registered for the device type"
    NO_CAPABILITY = "no registered capability interval contains the device's capability"
    NO_MODE = "no kernel is registered for the mode"
    NO_BACKWARD = "the kernel has no backward"
    CANNOT_LOAD = "the kernel could not be loaded"
    CONDITION = "the layer's condition refused this instance"
    OWN_FORWARD = "the instance has a forward of its own"
    POLICY = "the policy keeps the reference"
    DISABLED = "DISABLE_KERNEL_MAPPING is set"
    NOT_AN_OP = "the call cannot become a custom op"


class Decision(NamedTuple):
    """One extensible layer's outcome.

    A tuple and not a frozen dataclass: ``kernelize`` makes one for each layer of models that
    have tens of thousands, and this is created three times as fast.
    """

    path: str
    """The layer's path in the model, as in ``named_modules()``; empty for the model itself."""
    layer: str
    """The layer name, ``kernel_layer_name``."""
    device: str
    """The device type that a kernel was sought for."""
    mode: str
    """The mode that a kernel was sought for."""
    reason: Reason
    kernel: str = ""
    """The kernel that is used: repository, layer and resolved revision; empty for the reference."""
    detail: str = ""
    """What there was instead, where the reference is kept."""
    op: str = ""
    """The custom op in the compiled graph; empty in eager mode."""

    @property
    def uses_kernel(self) -> bool:
        return self.reason is Reason.KERNEL


@dataclass(frozen=True)
class Report:
    """The decisions of one ``kernelize`` or one compile, in the order in which they were made."""

    source: str
    """What made the decisions: ``kernelize`` or ``torch.compile``."""
    decisions: tuple[Decision, ...] = ()

    @property
    def kernels(self) -> tuple[Decision, ...]:
        """The decisions that chose a kernel."""
        return tuple(d for d in self.decisions if d.uses_kernel)

    def __str__(self) -> str:
        used = len(self.kernels)
        head = f"{self.source}: {used} of {len(self.decisions)} extensible layers use a kernel"
        rows: list[tuple[str, ...]] = [
            (d.path or "(model)", d.layer, d.mode, d.kernel or _why(d), d.op)
            for d in self.decisions
        ]
        return "\n".join([head, *_table(("path", "layer", "mode", "kernel or reason", "op"), rows)])


def _why(decision: Decision) -> str:
    reason = f"reference: {decision.reason.value}"
    return f"{reason} ({decision.detail})" if decision.detail else reason


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterable[str]:
    """Lines of a left-aligned table; columns that are empty in every row are left out."""
    if not rows:
        return
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]
    widths = {i: max(len(header[i]), *(len(row[i]) for row in rows)) for i in keep}
    for row in (header, *rows):
        yield "  ".join(row[i].ljust(widths[i]) for i in keep).rstrip()


_last: Report | None = None


def last_report() -> Report | None:
    """The report of the last ``kernelize`` or compile in this process; None before the first."""
    return _last


def publish(report: Report) -> None:
    """Make ``report`` the last one and log each of its decisions at INFO."""
    global _last
    _last = report
    if not logger.isEnabledFor(logging.INFO):
        return
    for d in report.decisions:
        logger.info(
            "%s: layer %s at %s for %s, %s: %s",
            report.source,
            d.layer,
            d.path or "(model)",
            d.device,
            d.mode,
            d.kernel or _why(d),
        )
