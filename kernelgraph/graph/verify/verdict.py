"""The verdict of a trial, and how it is written to disk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from kernelgraph.graph.gradients import Overwrites, OwnBackward, Source, SourceKind


class Verdict(NamedTuple):
    """The result of a trial."""

    own: OwnBackward | None
    """How the kernel's own backward has to be run; None if it may not be used."""
    wrong: str = ""
    """The reason why it may not; empty if it may."""
    output: str = ""
    """The error of the kernel's output, with which it may train nothing at all; empty if none is
    known."""
    contiguous: bool = False
    """Whether its backward is right only for incoming gradients that are contiguous."""

    @classmethod
    def incomparable(cls, why: str) -> Verdict:
        """The verdict on a kernel whose gradients cannot be compared with the layer's."""
        return cls(None, f"its gradients cannot be compared: {why}")

    def to_json(self) -> dict[str, object]:
        """Return the verdict as JSON."""
        own = self.own
        if own is None:
            return self._asdict()
        written = {**own._asdict(), "overwrites": own.overwrites._asdict()}
        return {**self._asdict(), "own": written}

    @classmethod
    def from_json(cls, value: Any) -> Verdict | None:
        """Return the verdict that `to_json` wrote; None for any other value."""
        try:
            own = None if value["own"] is None else _own_from_json(value["own"])
            return cls(own, value["wrong"], value["output"], value["contiguous"])
        except (TypeError, KeyError, ValueError):
            return None


def _own_from_json(value: Any) -> OwnBackward:
    overwrites = value["overwrites"]
    return OwnBackward(
        _sources(value["sources"]),
        tuple(value["flows"]),
        value["hidden_saves"],
        Overwrites(
            tuple(overwrites["grads"]), _sources(overwrites["saved"]), overwrites["private"]
        ),
        value["uses_autograd"],
    )


def _sources(value: Iterable[tuple[str, int]]) -> tuple[Source, ...]:
    return tuple(Source(SourceKind(kind), number) for kind, number in value)
