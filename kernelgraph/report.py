r"""The report: what was decided for each extensible layer, and why.

Each ``kernelize``, compile, ``rewrite``, ``export`` and ``load`` makes a `Report`, a list of one
`Decision` a layer, and publishes it: it is then the last report, and each decision is logged. The
graphs of one compiled model share a report (`publish_graph`). A report of ``kernelize`` is amended
when the first training call of a layer shows where its gradient comes from (`Notes`).
"""

from __future__ import annotations

import enum
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

logger = logging.getLogger("kernelgraph")


def error_text(error: Exception) -> str:
    """The type and the first line of the message of ``error``."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class WeakSlot(Generic[T]):
    """A slot for one value, which only the owner that it was last put for can get.

    The slot holds its owner by a weak reference, so it keeps no owner alive.
    """

    def __init__(self) -> None:
        self._kept: tuple[Callable[[], object], T] | None = None

    def get(self, owner: object) -> T | None:
        """The value, if it was put for ``owner``; None otherwise, and if ``owner`` is None."""
        if owner is None or self._kept is None:
            return None
        reference, value = self._kept
        last = reference()
        # Python makes a new bound method each time it is looked up.
        same = last is owner or (isinstance(owner, types.MethodType) and last == owner)
        return value if same else None

    def put(self, owner: object, value: T) -> T:
        """Keep ``value`` for ``owner`` in place of what was kept, and return it.

        A value that is put for None is not kept.
        """
        if owner is None:
            self._kept = None
        elif isinstance(owner, types.MethodType):
            self._kept = (weakref.WeakMethod(owner), value)
        else:
            self._kept = (weakref.ref(owner), value)
        return value

    def clear(self) -> None:
        """Empty the slot."""
        self._kept = None


class Reason(enum.Enum):
    """Why a layer runs on a kernel, or on its reference; the value is what reports show."""

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
    SLOWER = "no kernel is faster here"
    DISABLED = "DISABLE_KERNEL_MAPPING is set"
    NOT_AN_OP = "the call cannot become a custom op"
    WRONG = "the kernel does not compute what the layer does"
    UNSUITED = "a kernel cannot make these calls as the layer does"


class Decision(NamedTuple):
    """The decision for one extensible layer.

    It is a tuple and not a frozen dataclass because ``kernelize`` makes one for each layer of
    models that have tens of thousands, and a tuple is created three times as fast.
    """

    path: str
    """The layer's path in the model, as in ``named_modules()``; empty for the model itself."""
    layer: str
    """The layer name, ``kernel_layer_name``."""
    device: str
    """The type of the device that a kernel was sought for."""
    mode: str
    """The mode that a kernel was sought for."""
    reason: Reason
    """Why the layer runs on a kernel, or on its reference."""
    kernel: str = ""
    """The kernel that is used: repository, layer and resolved revision; empty for the reference."""
    detail: str = ""
    """The kernels registered instead, if the reference is kept; the times of both, if measured."""
    op: str = ""
    """The custom op in the compiled graph; empty in eager mode."""
    gradient: str = ""
    """The origin of a gradient, if one can flow through the call: ``kernel``, the kernel's own
    backward; or ``reference`` and the reason, the layer's own, which the backward runs again."""

    @property
    def uses_kernel(self) -> bool:
        """Whether the layer runs on a kernel."""
        return self.reason is Reason.KERNEL

    @property
    def outcome(self) -> str:
        """The kernel that runs, or why the reference does, as text."""
        if self.kernel:
            return f"{self.kernel} ({self.detail})" if self.detail else self.kernel
        return f"reference: {because(self.reason, self.detail)}"


@dataclass(frozen=True)
class Report:
    """The decisions of one ``kernelize``, compile, ``rewrite``, ``export`` or ``load``.

    As text it is a table; layers that share a decision share a row.
    """

    source: str
    """The function that decided: ``kernelize``, ``torch.compile``, ``rewrite``, ``export`` or
    ``load``."""
    decisions: tuple[Decision, ...] = ()
    """The decisions, in the order in which they were made."""

    @property
    def kernels(self) -> tuple[Decision, ...]:
        """The decisions that chose a kernel."""
        return tuple(d for d in self.decisions if d.uses_kernel)

    def __str__(self) -> str:
        places = {(d.device, d.mode) for d in self.decisions}
        one_place = ", ".join(filter(None, places.pop())) if len(places) == 1 else ""
        head = f"{self.source} for {one_place}" if one_place else self.source
        head += f": {len(self.kernels)} of {len(self.decisions)} extensible layers use a kernel"

        # A model has many layers and few different decisions.
        alike: dict[Decision, list[str]] = {}
        for decision in self.decisions:
            alike.setdefault(decision._replace(path=""), []).append(decision.path)
        header = ("path", "layer", "device", "mode", "kernel or reason", "gradient", "op")
        rows: list[tuple[str, ...]] = []
        for d, paths in alike.items():
            place = ("", "") if one_place else (d.device, d.mode)
            rest = (d.layer, *place, d.outcome, d.gradient, d.op)
            rows.extend((path or "(model)", *rest) for path in _merged(paths))
        return "\n".join([head, *table(header, rows)])


def because(reason: Reason, detail: str) -> str:
    """The text that says why a layer keeps its reference."""
    return f"{reason.value} ({detail})" if detail else reason.value


def _merged(paths: Iterable[str]) -> list[str]:
    """``paths``, with those that differ only in an index merged: ``blocks.0-3,5.norm``."""
    rows = list(dict.fromkeys(tuple(path.split(".")) for path in paths))
    for i in reversed(range(max(map(len, rows), default=0))):
        alike: dict[tuple[str, ...], list[int]] = {}
        for row in rows:
            index = row[i] if i < len(row) else ""
            # A dot stands for the index, since no part of a path can be one.
            key = (*row[:i], ".", *row[i + 1 :]) if index.isdecimal() else row
            alike.setdefault(key, []).extend([int(index)] if index.isdecimal() else [])
        rows = [
            (*key[:i], _ranges(indices), *key[i + 1 :]) if indices else key
            for key, indices in alike.items()
        ]
    return [".".join(row) for row in rows]


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3,5`` for 0, 1, 2, 3 and 5."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields the lines of a left-aligned table, without columns that are empty in every row."""
    if not rows:
        return
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]
    widths = {i: max(len(header[i]), *(len(row[i]) for row in rows)) for i in keep}
    for row in (header, *rows):
        yield "  ".join(row[i].ljust(widths[i]) for i in keep).rstrip()


_last: Report | None = None
_amending = threading.Lock()


def last_report() -> Report | None:
    """The report of the last ``kernelize``, compile, ``rewrite``, ``export`` or ``load``.

    Returns:
        The report of this process, or None where nothing was decided yet. Its ``decisions`` have
        one entry for each extensible layer, and ``print`` shows it as a table.

    Example:
        >>> @kg.use_kernel_forward_from_hub("SiluAndMul")
        ... class SiluAndMul(torch.nn.Module):
        ...     def forward(self, x):
        ...         gate, up = x.chunk(2, dim=-1)
        ...         return torch.nn.functional.silu(gate) * up
        >>> kernel = kg.LocalLayerRepository("examples/kernels", layer_name="SiluAndMul")
        >>> kg.register_kernel_mapping({"SiluAndMul": {"cpu": kernel}})
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), SiluAndMul())
        >>> model = kg.kernelize(model, mode=kg.Mode.INFERENCE)
        >>> report = kg.last_report()
        >>> [(decision.path, decision.uses_kernel) for decision in report.decisions]
        [('1', True)]
        >>> print(report)
        kernelize for cpu, INFERENCE: 1 of 1 extensible layers use a kernel
        path  layer       kernel or reason
        1     SiluAndMul  examples/kernels@...: SiluAndMul
    """
    return _last


def publish(report: Report) -> None:
    """Make ``report`` the last one and log each of its decisions at INFO."""
    global _last
    _last = report
    if not logger.isEnabledFor(logging.INFO):
        return
    for d in report.decisions:
        logger.info(
            "%s: layer %s at %s for %s, %s: %s%s",
            report.source,
            d.layer,
            d.path or "(model)",
            d.device,
            d.mode,
            d.outcome,
            d.gradient and f"; gradient: {d.gradient}",
        )


_of_graphs: WeakSlot[Report] = WeakSlot()


def publish_graph(decisions: Iterable[Decision], compile_call: object) -> None:
    """Publish the decisions for a graph, with those for the other graphs of the same model.

    A model with graph breaks has several graphs. A decision for a path replaces the earlier one,
    since a graph that is compiled again for other inputs is decided again.

    Args:
        decisions: The decisions.
        compile_call: An object that stands for the call of ``torch.compile``; None if the call is
            not known.
    """
    decisions = list(decisions)
    earlier = _of_graphs.get(compile_call)
    replaced = {decision.path for decision in decisions}
    kept = [d for d in earlier.decisions if d.path not in replaced] if earlier else []
    report = Report("torch.compile", tuple(dict.fromkeys((*kept, *decisions))))
    if earlier is None or earlier is not _last or earlier != report:
        publish(_of_graphs.put(compile_call, report))


class Notes:
    """Amends the report of one ``kernelize`` by what is found out when its kernels run.

    A layer is decided when the model is kernelized. Its calls are examined, and its gradient is
    judged, when it is called for the first time.
    """

    def __init__(self) -> None:
        self.report: Report | None = None
        """The report of that ``kernelize``, with all amendments so far."""
        self.places: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        """The index of each layer's decision in the report. A copy of a layer has none."""

    def path(self, module: object) -> str | None:
        """The path of a layer in the model that was kernelized; None for a copy of a layer."""
        number = self.places.get(module)
        return None if number is None or self.report is None else self._decision(number).path

    def gradient(self, module: object, source: str) -> None:
        """Note where the gradient of a kernel comes from; the worst of a layer's calls counts."""
        self._amend(module, lambda d: d._replace(gradient=source) if _is_worse(source, d) else d)

    def reference(self, module: object, reason: Reason, detail: str) -> None:
        """Note that a layer keeps its reference after all, and why."""
        self._amend(
            module,
            lambda d: (
                d._replace(reason=reason, kernel="", detail=detail, gradient="")
                if d.uses_kernel
                else d
            ),
        )

    def _amend(self, module: object, change: Callable[[Decision], Decision]) -> None:
        """Change the decision for a layer, and the last report if that is still this one."""
        global _last
        number = self.places.get(module)
        with _amending:
            if number is None or self.report is None:
                return
            old = self._decision(number)
            if (new := change(old)) == old:
                return
            before, after = self.report.decisions[:number], self.report.decisions[number + 1 :]
            amended = replace(self.report, decisions=(*before, new, *after))
            if _last is self.report:
                _last = amended
            self.report = amended

    def _decision(self, number: int) -> Decision:
        assert self.report is not None
        return self.report.decisions[number]


def _is_worse(source: str, decision: Decision) -> bool:
    """Whether ``source`` is a worse origin of a gradient than the one that is noted."""
    return decision.uses_kernel and (not decision.gradient or decision.gradient == "kernel")


_warned: set[tuple[str, str, str]] = set()
_warning = threading.Lock()


def warn_once(kernel: str, layer: str, path: str | None, wrong: str, instead: str) -> None:
    """Warn, once in the process, of what a kernel does wrong.

    Args:
        kernel: The kernel.
        layer: The name of the layer that it replaces.
        path: The layer's path in the model; None where it is not known.
        wrong: What is wrong.
        instead: What happens instead.
    """
    with _warning:
        if (kernel, layer, wrong) in _warned:
            return
        _warned.add((kernel, layer, wrong))
    where = "" if path is None else f" at {path or '(model)'}"
    logger.warning("kernel %s for layer %s%s: %s; %s", kernel, layer, where, wrong, instead)
