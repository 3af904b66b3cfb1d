"""Nested values as trees: paths to leaves, and templates with the leaves taken out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kernelgraph.graph.calls.constants import (
    class_text,
    field_names,
    is_constant,
    is_named_tuple,
    stable_text,
)

Template = tuple[Any, ...]
"""A nested value with its leaves taken out:
``("leaf", i)``, ``("const", value)``, ``("tuple" | "list" | "size", templates)``,
``("dict" | "OrderedDict", ((key, template), ...))``, ``("namedtuple", templates, cls)`` and
``("dataclass", ((field, template), ...), cls)``."""

_SEQUENCES: dict[type[Any], str] = {tuple: "tuple", list: "list", torch.Size: "size"}
_DICTS: dict[type[Any], str] = {dict: "dict", OrderedDict: "OrderedDict"}


class UnsupportedValue(Exception):
    """An argument or output can be neither an operand, a constant nor a container of them."""


def take_leaves(value: Any, leaves: list[Any]) -> Template:
    """Move the tensors and numbers of a nested value to ``leaves``; what is left of it.

    Raises:
        UnsupportedValue: If there is anything else in it but constants, in containers that
            `put_leaves` can make again.
    """
    return _take(value, leaves, (int, float, torch.SymInt))


def take_tensors(value: Any, tensors: list[Any]) -> Template:
    """`take_leaves`, for results of an op: numbers stay, and must be the same in each call."""
    return _take(value, tensors, ())


def _take(value: Any, leaves: list[Any], numbers: tuple[type[Any], ...]) -> Template:
    cls: type = type(value)
    if cls in numbers or isinstance(value, torch.Tensor):
        leaves.append(value)
        return ("leaf", len(leaves) - 1)
    if cls in _SEQUENCES:
        return (_SEQUENCES[cls], tuple([_take(part, leaves, numbers) for part in value]))
    if cls in _DICTS and all(type(key) in (str, int) for key in value):
        items = [(key, _take(part, leaves, numbers)) for key, part in value.items()]
        return (_DICTS[cls], tuple(items))
    if is_named_tuple(cls):
        return ("namedtuple", tuple([_take(part, leaves, numbers) for part in value]), cls)
    if (names := field_names(cls)) is not None:
        items = [(name, _take(getattr(value, name), leaves, numbers)) for name in names]
        return ("dataclass", tuple(items), cls)
    if is_constant(value) or (cls in (int, float) and not numbers):
        return ("const", value)
    raise UnsupportedValue(
        f"a {cls.__name__} is passed or returned: an op takes and gives tensors, numbers and "
        "plain constants, in tuples, lists, dicts and dataclasses"
    )


def put_leaves(template: Template, leaves: Sequence[Any]) -> Any:
    """The inverse of `take_leaves`."""
    kind = template[0]
    if kind == "leaf":
        return leaves[template[1]]
    if kind == "const":
        return template[1]
    if kind == "dict" or kind == "OrderedDict" or kind == "dataclass":
        made = {}
        for key, part in template[1]:
            made[key] = put_leaves(part, leaves)
        if kind == "dataclass":
            return template[2](**made)
        return made if kind == "dict" else OrderedDict(made)
    parts = []
    for part in template[1]:
        parts.append(put_leaves(part, leaves))
    if kind == "list":
        return parts
    if kind == "namedtuple":
        return tuple.__new__(template[2], parts)  # as its own __new__, which wants a source
    return tuple(parts) if kind == "tuple" else torch.Size(parts)


def paths_of(template: Template) -> list[Path]:
    """The paths that lead to each leaf, in the leaves' order."""
    return [path for path, (kind, _) in _ends(template, ()) if kind == "leaf"]


def _ends(template: Template, prefix: Path) -> Iterator[tuple[Path, tuple[str, Any]]]:
    """The leaves and constants, and the paths that lead to them."""
    kind, body = template[:2]
    if kind in ("leaf", "const"):
        yield prefix, (kind, body)
        return
    if kind == "dataclass":
        steps = [(name, part) for name, part in body]
    elif kind in ("dict", "OrderedDict"):
        steps = [((key,), part) for key, part in body]
    else:
        steps = [((i,), part) for i, part in enumerate(body)]
    for step, part in steps:
        yield from _ends(part, (*prefix, step))


def template_text(template: Template) -> str:
    """Text that is the same for the same template in every process."""
    kind, body = template[:2]
    if kind in ("leaf", "const"):
        return f"{kind} {stable_text(body)}"
    if kind in ("dict", "OrderedDict", "dataclass"):
        inside = ", ".join(f"{key!r}: {template_text(part)}" for key, part in body)
    else:
        inside = ", ".join(map(template_text, body))
    return f"{kind}({inside}){''.join(map(class_text, template[2:]))}"


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


def describe_output(output: Template) -> str:
    """A template in words."""
    kind, body = output[:2]
    if kind == "leaf":
        return "a tensor"
    if kind == "const":
        return repr(body)
    if kind in ("dict", "OrderedDict", "dataclass"):
        kind = output[2].__name__ if kind == "dataclass" else kind
        inside = ", ".join(f"{key!r}: {describe_output(part)}" for key, part in body)
        return f"a {kind} {{{inside}}}"
    return f"a {kind} of {len(body)} ({', '.join(map(describe_output, body))})"
