"""What was decided for each extensible layer, and why: the record that every path leaves."""

from __future__ import annotations

import enum
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar


def error_text(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


logger = logging.getLogger("kernelgraph")


T = TypeVar("T")


class OfLast(Generic[T]):
    """A value that is there for as long as it is asked for by the object that it was put for."""

    def __init__(self) -> None:
        self._kept: tuple[Callable[[], object], T] | None = None

    def get(self, owner: object) -> T | None:
        """The value, if the last was put for ``owner``; of None nobody knows what it is."""
        if owner is None or self._kept is None:
            return None
        leads, value = self._kept
        last = leads()
        # Python makes a bound method anew each time it is looked up.
        same = last is owner or (isinstance(owner, types.MethodType) and last == owner)
        return value if same else None

    def put(self, owner: object, value: T) -> T:
        """Have ``value`` be there for ``owner``, and nothing for others."""
        if owner is None:
            self._kept = None
        elif isinstance(owner, types.MethodType):
            self._kept = (weakref.WeakMethod(owner), value)
        else:
            self._kept = (weakref.ref(owner), value)
        return value

    def clear(self) -> None:
        """Let go of the value."""
        self._kept = None


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
    SLOWER = "no kernel is faster here"
    DISABLED = "DISABLE_KERNEL_MAPPING is set"
    NOT_AN_OP = "the call cannot become a custom op"
    WRONG = "the kernel does not compute what the layer does"


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
    """What there was instead, where the reference is kept; the times of both, where measured."""
    op: str = ""
    """The custom op in the compiled graph; empty in eager mode."""
    gradient: str = ""
    """Where a gradient comes from, if one can flow through the call: ``kernel``, its own backward,
    or ``reference`` and why, the layer's own, for which the backward runs the layer again."""

    @property
    def uses_kernel(self) -> bool:
        return self.reason is Reason.KERNEL

    @property
    def outcome(self) -> str:
        """What runs and why, in words."""
        if self.kernel:
            return f"{self.kernel} ({self.detail})" if self.detail else self.kernel
        return f"reference: {because(self.reason, self.detail)}"


@dataclass(frozen=True)
class Report:
    """The decisions of one ``kernelize``, compile or ``rewrite``, in the order of their making."""

    source: str
    """What made them: ``kernelize``, ``torch.compile``, ``rewrite``, ``export`` or ``load``."""
    decisions: tuple[Decision, ...] = ()

    @property
    def kernels(self) -> tuple[Decision, ...]:
        """The decisions that chose a kernel."""
        return tuple(d for d in self.decisions if d.uses_kernel)

    def __str__(self) -> str:
        places = {(d.device, d.mode) for d in self.decisions}
        one_place = ", ".join(filter(None, places.pop())) if len(places) == 1 else ""
        head = f"{self.source} for {one_place}" if one_place else self.source
        head += f": {len(self.kernels)} of {len(self.decisions)} extensible layers use a kernel"

        # Layers that are alike share a row: a model has many, and few kinds of them.
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
    """Why a layer keeps its reference, in words."""
    return f"{reason.value} ({detail})" if detail else reason.value


def _merged(paths: Iterable[str]) -> list[str]:
    """``paths``, those that differ in an index alone written as one: ``blocks.0-3,5.norm``."""
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


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterable[str]:
    """Lines of a left-aligned table; columns that are empty in every row are left out."""
    if not rows:
        return
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]
    widths = {i: max(len(header[i]), *(len(row[i]) for row in rows)) for i in keep}
    for row in (header, *rows):
        yield "  ".join(row[i].ljust(widths[i]) for i in keep).rstrip()


_last: Report | None = None
_amending = threading.Lock()


def last_report() -> Report | None:
    """The report of this process's last ``kernelize``, compile or ``rewrite``, if any."""
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


_of_graphs: OfLast[Report] = OfLast()


def publish_graph(decisions: Iterable[Decision], compile_call: object) -> None:
    """Publish the decisions for a graph, with those for the other graphs of the same model.

    A model has several where there are graph breaks; one that is compiled anew for other inputs
    is decided anew.

    Args:
        decisions: The decisions.
        compile_call: Stands for the call of ``torch.compile``; None: it is not known.
    """
    decisions = list(decisions)
    earlier = _of_graphs.get(compile_call)
    anew = {decision.path for decision in decisions}
    kept = [d for d in earlier.decisions if d.path not in anew] if earlier else []
    report = Report("torch.compile", tuple(dict.fromkeys((*kept, *decisions))))
    if earlier is None or earlier is not _last or earlier != report:
        publish(_of_graphs.put(compile_call, report))


class Notes:
    """What became of the kernels of one ``kernelize`` when they were to train."""

    def __init__(self) -> None:
        self.report: Report | None = None
        """The report of that ``kernelize``, as amended until now."""
        self.places: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        """Where in the report each layer is. A copy of one is not in it."""

    def path(self, module: object) -> str | None:
        """The path of a layer in the model that was kernelized."""
        number = self.places.get(module)
        return None if number is None or self.report is None else self._decision(number).path

    def gradient(self, module: object, source: str) -> None:
        """Note where the gradient of a kernel comes from; the worst of its calls counts."""
        self._amend(module, lambda d: d._replace(gradient=source) if _is_worse(source, d) else d)

    def reference(self, module: object, detail: str) -> None:
        """Note that a layer keeps its reference, and why."""
        self._amend(
            module,
            lambda d: (
                d._replace(reason=Reason.WRONG, kernel="", detail=detail, gradient="")
                if d.uses_kernel
                else d
            ),
        )

    def _amend(self, module: object, change: Callable[[Decision], Decision]) -> None:
        """Change the decision for a layer, in the last report if that is still this one."""
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
    return decision.uses_kernel and (not decision.gradient or decision.gradient == "kernel")


_warned: set[tuple[str, str, str]] = set()
_warning = threading.Lock()


def warn_once(kernel: str, layer: str, path: str | None, wrong: str, instead: str) -> None:
    """Say, once in the process, what a kernel does wrong in training.

    Args:
        kernel: The kernel.
        layer: The name of the layer that it stands in for.
        path: The layer's path in the model; None where it is not known.
        wrong: What is wrong.
        instead: What is done about it.
    """
    with _warning:
        if (kernel, layer, wrong) in _warned:
            return
        _warned.add((kernel, layer, wrong))
    where = "" if path is None else f" at {path or '(model)'}"
    logger.warning("kernel %s for layer %s%s: %s; %s", kernel, layer, where, wrong, instead)
