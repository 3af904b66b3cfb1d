"""Helpers for tests of ``policy="fastest"``: models of layers whose times are given (`costs`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import last_report, use_kernel_mapping
from kernelgraph.graph.autotune import contest
from kernelgraph.report import Reason
from tests.support.costs import Steps, Work
from tests.support.toy_models import Repository

FASTEST = {"policy": "fastest", "inner": "eager"}


def mapping(**layers: Any) -> Any:
    """A mapping from layer names to a hub layer, or to one for each mode."""
    made = {
        name: {"cpu": {m: Repository(k) for m, k in what.items()}}
        if isinstance(what, dict)
        else {"cpu": Repository(what)}
        for name, what in layers.items()
    }
    return use_kernel_mapping(made, inherit_mapping=False)


def compiled(model: nn.Module, fullgraph: bool = True, **options: Any) -> Any:
    """A model compiled with ``policy="fastest"``."""
    return torch.compile(
        model, backend="hubkernels", fullgraph=fullgraph, options={**FASTEST, **options}
    )


def stack(*seconds: float) -> nn.Module:
    """Layers that take so many seconds, with linear layers between them."""
    layers = [layer for s in seconds for layer in (Work(s), nn.Linear(4, 4))]
    return nn.Sequential(*layers).eval()


class InTurn(nn.Module):
    """Calls a layer with each of some keyword arguments."""

    def __init__(self, *flags: dict[str, Any]) -> None:
        super().__init__()
        self.layer = Steps()
        self.flags = flags

    def forward(self, x: Tensor) -> Tensor:
        for flags in self.flags:
            x = self.layer(x, **flags)
        return x


def run(model: nn.Module, x: Tensor | None = None, **options: Any) -> Tensor:
    """The result of a compiled model, by default for zeros."""
    with torch.no_grad():
        made: Tensor = compiled(model, **options)(torch.zeros(3, 4) if x is None else x)
    return made


def reasons() -> list[Reason]:
    """The reasons in the last report."""
    report = last_report()
    assert report is not None
    return [decision.reason for decision in report.decisions]


def measured_layers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the name of each layer that is measured from now on."""
    found: list[str] = []
    own = contest.Contest.winner

    def winner(self: Any) -> Any:
        found.append(self.layer_name)
        return own(self)

    monkeypatch.setattr(contest.Contest, "winner", winner)
    return found
