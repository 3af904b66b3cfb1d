"""The winner for each tuning key: kept for the process, for one torch.compile, and on disk."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kernelgraph import cache
from kernelgraph.graph.autotune import ranks
from kernelgraph.report import WeakSlot


class Implementation(str, enum.Enum):
    """The three ways to compute a call of a layer. The values are those in the cache on disk."""

    OP = "op"
    """A kernel, as a custom op."""
    NATIVE = "native"
    """A kernel, as the ops that Dynamo traces it into."""
    REFERENCE = "reference"
    """The layer's own forward."""


class Candidate(NamedTuple):
    """One way to compute a call with one of the kernels for it."""

    implementation: Implementation
    kernel: int = 0
    """The kernel's number; 0 for the reference, which has none."""


FIRST_OP = Candidate(Implementation.OP)
"""The first kernel as an op, which is in the graph before anything is measured."""


class Winner(NamedTuple):
    """The candidate that computes all calls with one tuning key, and why."""

    implementation: Implementation
    kernel: int
    """The number of the kernel; 0 for the reference."""
    why: str
    """The times, for people; or why there are none."""
    measured: bool
    """Whether it was measured to be the fastest, and not chosen by rule."""

    @property
    def is_first_op(self) -> bool:
        """Whether it is `FIRST_OP`, with which no second trace is needed."""
        return (self.implementation, self.kernel) == FIRST_OP

    def to_json(self) -> dict[str, object]:
        """Return it as JSON can hold it."""
        return {
            "how": self.implementation.value,
            "kernel": self.kernel,
            "why": self.why,
            "measured": self.measured,
        }

    @classmethod
    def from_json(cls, value: object, kernels: int) -> Winner | None:
        """Return the inverse of `to_json`; None if ``value`` is anything else.

        Args:
            value: What was read.
            kernels: The number of kernels that a winner can be one of.
        """
        if not isinstance(value, dict):
            return None
        kernel, why, measured = (value.get(key) for key in ("kernel", "why", "measured"))
        # Not isinstance: True is an int.
        if type(kernel) is not int or type(why) is not str or type(measured) is not bool:
            return None
        try:
            implementation = Implementation(value.get("how"))
        except ValueError:
            return None
        return cls(implementation, kernel, why, measured) if 0 <= kernel < kernels else None


@dataclass
class Session:
    """The tuning of one call of ``torch.compile``: its time, and winners of it alone."""

    seconds: float
    """The seconds that measuring may take in all."""
    clock: Callable[[], float] = time.monotonic
    winners: dict[str, Winner] = field(default_factory=dict)
    """The winners that were not measured. No other call of ``torch.compile`` uses them."""
    _spent: float = 0.0
    _started: float | None = None

    @property
    def seconds_left(self) -> float:
        """The seconds that are left for measuring."""
        now = 0.0 if self._started is None else self.clock() - self._started
        return self.seconds - self._spent - now

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the time inside as spent on measuring."""
        self._started = self.clock()
        try:
            yield
        finally:
            self._spent += self.clock() - self._started
            self._started = None

    def __str__(self) -> str:
        used = self.seconds - self.seconds_left
        return f"{used:.1f} of {self.seconds:g} s for measuring are used"


_winners: dict[str, Winner] = {}
"""The measured winners that this process knows, by tuning key."""
_sessions: WeakSlot[Session] = WeakSlot()


def session_of(compile_call: object, seconds: float) -> Session:
    """Return the session of a call of ``torch.compile``, a new one for a new call.

    Args:
        compile_call: The object that stands for the call; None: it is not known.
        seconds: The seconds that measuring may take in a new session.
    """
    return _sessions.get(compile_call) or _sessions.put(compile_call, Session(seconds))


def forget() -> None:
    """Forget all winners and sessions of this process; those on disk stay."""
    _sessions.clear()
    _winners.clear()


def known_winner(key: str, kernels: int, session: Session) -> Winner | None:
    """Return the winner for a tuning key, if there is one.

    Args:
        key: The tuning key.
        kernels: The number of kernels for the call.
        session: The session of the current call of ``torch.compile``.
    """
    found = _winners.get(key) or session.winners.get(key)
    # The ranks of a group may have different winners on their disks: `ranks` makes them agree.
    return found if found or ranks.has_other_ranks() else winner_on_disk(key, kernels)


def winner_on_disk(key: str, kernels: int) -> Winner | None:
    """Return the winner that this or another process has kept, if there is one."""
    found = Winner.from_json(cache.read(cache.CHOICES, key), kernels)
    if found is not None:
        _winners[key] = found
    return found


def keep_winner(key: str, winner: Winner, session: Session, about: Mapping[str, str]) -> None:
    """Keep a winner: in the session, or, if it was measured, in the process and on disk.

    Args:
        key: The tuning key that it is for.
        winner: The winner.
        session: The session of the current call of ``torch.compile``.
        about: What the calls with this key are, for people.
    """
    if not winner.measured:
        session.winners[key] = winner
        return
    _winners[key] = winner
    cache.write(cache.CHOICES, key, {**winner.to_json(), "about": dict(about)})
