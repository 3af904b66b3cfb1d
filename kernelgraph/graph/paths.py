"""Where a value is: the attributes and keys that lead to it, as data."""

from __future__ import annotations

from typing import Any

Step = str | tuple[str | int]
"""The name of an attribute, or in a tuple a key for ``[]``."""
Path = tuple[Step, ...]
"""From a layer, ``("experts", "weight")`` leads to self.experts.weight, and ``("blocks", (0,))`` to
self.blocks[0]."""


def read(value: Any, path: Path) -> Any:
    """What is at ``path`` of ``value``."""
    for step in path:
        value = getattr(value, step) if isinstance(step, str) else value[step[0]]
    return value


def path_text(path: Path) -> str:
    """``path`` as Python writes it, without the value that it starts from."""
    steps = (f".{step}" if isinstance(step, str) else f"[{step[0]!r}]" for step in path)
    return "".join(steps).removeprefix(".")


def path_name(path: Path) -> str:
    """``path`` as a name."""
    return "_".join(step if isinstance(step, str) else str(step[0]) for step in path)
