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


def to_json(verdict: Verdict) -> dict[str, object]:
    """Return a verdict as JSON."""
    own = verdict.own
    if own is None:
        return verdict._asdict()
    written = {**own._asdict(), "overwrites": own.overwrites._asdict()}
    return {**verdict._asdict(), "own": written}


def from_json(value: Any) -> Verdict | None:
    """Return the verdict that `to_json` wrote; None for any other value."""
    try:
        own = value["own"]
        if own is not None:
            overwrites = own["overwrites"]
            own = OwnBackward(
                _sources(own["sources"]),
                tuple(own["flows"]),
                own["hidden_saves"],
                Overwrites(
                    tuple(overwrites["grads"]),
                    _sources(overwrites["saved"]),
                    overwrites["private"],
                ),
            )
        return Verdict(own, value["wrong"], value["output"], value["contiguous"])
    except (TypeError, KeyError, ValueError):
        return None


def _sources(value: Iterable[tuple[str, int]]) -> tuple[Source, ...]:
    return tuple(Source(SourceKind(kind), number) for kind, number in value)
