"""What was chosen for each kind of call: kept for the process, for other ranks and on disk."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraph import cache
from kernelgraph.graph import _torch
from kernelgraph.graph.autotune import ranks
from kernelgraph.graph.calls import State, UnsupportedValue, describe, flatten, read, stable_text
from kernelgraph.graph.infer import sample_inputs
from kernelgraph.graph.lowering import Options, Site
from kernelgraph.kernel import Kernel
from kernelgraph.keys import kernel_key, layer_key, source_of, versions
from kernelgraph.report import OfLast
from kernelgraph.selection import device_name, driver_version

OP, NATIVE, REFERENCE = "op", "native", "reference"
"""Ways to compute a call: a kernel as a custom op; a kernel that is traced; the layer itself."""

_VERSION = 1
"""Of how choices are made, counted up when an earlier one is not to be believed."""


class Choice(NamedTuple):
    """What computes the calls of a kind."""

    how: str
    """`OP`, `NATIVE` or `REFERENCE`."""
    kernel: int
    """Which of the kernels."""
    why: str
    """The times, for people; or why there are none."""
    measured: bool

    @property
    def is_first(self) -> bool:
        """Whether it is the first kernel as an op, which is in the graph before anything is
        chosen."""
        return (self.how, self.kernel) == (OP, 0)


@dataclass
class Session:
    """The decisions for one call of ``torch.compile``."""

    seconds: float
    """How long measuring may take in all."""
    clock: Callable[[], float] = time.monotonic
    choices: dict[str, Choice] = field(default_factory=dict)
    """Those that were not measured, which nobody else is to believe."""
    _spent: float = 0.0
    _started: float | None = None

    @property
    def left(self) -> float:
        """How many seconds are left."""
        now = 0.0 if self._started is None else self.clock() - self._started
        return self.seconds - self._spent - now

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Have the time count."""
        self._started = self.clock()
        try:
            yield
        finally:
            self._spent += self.clock() - self._started
            self._started = None

    def __str__(self) -> str:
        return f"{self.seconds - self.left:.1f} of {self.seconds:g} s for measuring are used"


_choices: dict[str, Choice] = {}
_sessions: OfLast[Session] = OfLast()


def session_of(compile_call: object, seconds: float) -> Session:
    """The session of a call of ``torch.compile``."""
    return _sessions.get(compile_call) or _sessions.put(compile_call, Session(seconds))


def forget() -> None:
    """Have everything decided anew, from what is on disk."""
    _sessions.clear()
    _choices.clear()


# --- kinds --------------------------------------------------------------------------------------


def kind_of(
    site: Site,
    kernels: Sequence[Kernel],
    state: State,
    arguments: tuple[Any, Any],
    options: Options,
) -> str:
    """What the calls that share a choice have in common, as text that is the same in every process
    where they do.

    Args:
        site: The call.
        kernels: The kernels for it.
        state: What it reads of the layer.
        arguments: Those by position, and those by name; of sizes and numbers that vary those of
            this call count.
        options: The backend's.
    """
    form, leaves = _taken(arguments)
    tensors = [v for v in leaves if isinstance(v, Tensor)]
    held = [read(site.module, path) for path in state.tensors]
    layer = site.layer
    assert site.target is not None
    return repr(
        (
            (_VERSION, *versions()),
            sorted({device_name(v.device) for v in (*tensors, *held)}),
            torch.get_num_threads() if site.target.type == "cpu" else _toolkit(),
            layer_key(layer),
            [*map(kernel_key, kernels)],
            [source_of(layer, k) for k in kernels],
            (describe(state), state.numbers),
            (form, [*map(_form, leaves)]),
            [*map(_form, held)],
            (site.grad, _torch.full_graph()),
            _torch.autocast_regions(),
            _compiler_text(options),
            (options.own_backward, options.gradients, options.verify),
        )
    )


def _taken(arguments: tuple[Any, Any]) -> tuple[str, list[Any]]:
    """Arguments without their tensors and numbers, as text; and these."""
    try:
        leaves, template = flatten(arguments)
    except UnsupportedValue:  # no op is made of such a call
        return "", [*_torch.tensors_in(arguments)]
    return template.text(), leaves


def _form(value: Any) -> tuple[Any, ...]:
    if isinstance(value, float):  # it may change with each call, and how long that takes does not
        return ("float",)
    numbers = sample_inputs.measures_now(value)
    if not isinstance(value, Tensor):
        return numbers
    return numbers, str(value.dtype), value.device.type, value.requires_grad


def _toolkit() -> tuple[str | None, ...]:
    """What torch was built with for GPUs, and what drives them."""
    return torch.version.cuda, torch.version.hip, driver_version()


def _compiler_text(options: Options) -> str:
    inner = options.inner
    named: Any = inner if hasattr(inner, "__qualname__") else type(inner)
    name = inner if isinstance(inner, str) else f"{named.__module__}.{named.__qualname__}"
    own = (options.inductor_mode, sorted(options.inductor.items(), key=str))
    return stable_text((name, own, _torch.inductor_settings() if inner == "inductor" else ""))


def known(kind: str, kernels: int, session: Session) -> Choice | None:
    """The choice for a kind that has so many kernels, if there is one."""
    found = _choices.get(kind) or session.choices.get(kind)
    # What one rank has on its disk, another may not have.
    return found if found or ranks.several() else on_disk(kind, kernels)


def on_disk(kind: str, kernels: int) -> Choice | None:
    """The choice that this or another process has kept."""
    found = from_json(cache.read(cache.CHOICES, kind), kernels)
    if found is not None:
        _choices[kind] = found
    return found


def keep(kind: str, choice: Choice, session: Session, about: Mapping[str, str]) -> None:
    """Note a choice; where it was measured, also for those to come.

    Args:
        kind: What it is for.
        choice: The choice.
        session: Where one that was not measured is noted.
        about: What people are to know of the kind.
    """
    if not choice.measured:
        session.choices[kind] = choice
        return
    _choices[kind] = choice
    cache.write(cache.CHOICES, kind, {**choice._asdict(), "about": dict(about)})


def from_json(value: Any, kernels: int) -> Choice | None:
    """The inverse of ``Choice._asdict``; None of anything that it has not made for so many
    kernels."""
    try:
        made = Choice(value["how"], value["kernel"], value["why"], value["measured"])
    except (TypeError, KeyError):
        return None
    if [type(part) for part in made] != [str, int, str, bool]:
        return None
    there_is = made.how in (OP, NATIVE, REFERENCE) and 0 <= made.kernel < kernels
    return made if there_is else None
