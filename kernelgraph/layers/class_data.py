"""Python data of a layer's class and program, kept as it is while a forward runs for a trial.

A class may count its calls, or note them in a list. Such a count is of the program's own calls, so
what a trial adds to it is taken back.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def program_data_kept(
    classes: Iterable[type], forwards: Iterable[Callable[..., object]] = ()
) -> Iterator[Callable[[], bool]]:
    """Run code, and then give counters and containers the contents that they had before.

    The context is a function that tells whether they have others now.

    Args:
        classes: Classes, whose attributes and those of their bases are kept.
        forwards: Functions: the globals that they name and the variables around them are kept.
            Pass forwards of the program's own layers, and none of kernels: a kernel may note there
            what it has set up.
    """
    counters: list[tuple[Any, str, object]] = []
    containers: list[tuple[Any, Any]] = []

    def keep(owner: Any, name: str, value: object) -> None:
        # A flag may say that something is set up that stays so, so it is no counter.
        if type(value) in (int, float):
            counters.append((owner, name, value))
        else:
            _copy_containers(value, containers)

    for cls in {base for each in classes for base in each.__mro__ if _is_users(base)}:
        for name, value in vars(cls).items():
            if not name.startswith("__"):
                keep(cls, name, value)
    for forward in filter(_is_function, forwards):
        for name in forward.__code__.co_names:
            if name in forward.__globals__:
                keep(_Globals(forward.__globals__), name, forward.__globals__[name])
        for cell in forward.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                keep(cell, "cell_contents", cell.cell_contents)

    def counted(owner: Any, name: str, value: object) -> bool:
        now = getattr(owner, name, value)
        return now is not value and type(now) in (int, float)

    def changed() -> bool:
        return any(counted(*counter) for counter in counters) or any(
            _contents(container) != copied for container, copied in containers
        )

    try:
        yield changed
    finally:
        for owner, name, value in counters:
            if counted(owner, name, value):
                setattr(owner, name, value)
        for container, copied in containers:
            _refill(container, copied)


_CONTAINERS = (list, dict, set)


def _copy_containers(value: object, found: list[tuple[Any, Any]]) -> None:
    """Add the containers in ``value`` that hold plain data alone, each with a copy."""
    if isinstance(value, _CONTAINERS) and not any(value is known for known, _ in found):
        parts = [*value.values()] if isinstance(value, dict) else [*value]
        if all(_is_data(part) for part in parts):
            found.append((value, _contents(value)))
            for part in parts:
                _copy_containers(part, found)


def _is_data(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_data, value.values()))
    if isinstance(value, (list, set, tuple)):
        return all(map(_is_data, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


def _contents(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else [*container]


def _refill(container: Any, contents: Any) -> None:
    if _contents(container) == contents or not _is_data(container):
        return
    container.clear()
    if isinstance(container, list):
        container.extend(contents)
    else:
        container.update(contents)


class _Globals:
    """The global variables of a function as attributes."""

    def __init__(self, variables: dict[str, object]) -> None:
        vars(self).update(variables=variables)

    def __getattr__(self, name: str) -> object:
        try:
            return vars(self)["variables"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: object) -> None:
        vars(self)["variables"][name] = value


def _is_users(cls: type) -> bool:
    """Whether a class is the program's own, and none of torch or Python."""
    return cls.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc")


def _is_function(forward: object) -> bool:
    return isinstance(forward, types.FunctionType)
