"""Hub layers that another package loads, from kernel repositories of the same layout.

Any object with ``load`` is a repository, those of the ``kernels`` package among them. What they
load is used as it is; this module finds out what it is, for reports and for the names of ops.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelgraph.builds.importing import Origin
from kernelgraph.builds.members import layer_of_function
from kernelgraph.builds.metadata import METADATA, content_hash, hash_files, read_metadata
from kernelgraph.builds.variants import parse
from kernelgraph.layers import FUNCTION

if TYPE_CHECKING:
    from torch import nn


def load_foreign(repository: Any) -> type[nn.Module]:
    """The hub layer of a repository object that is not ours.

    One for a function (it has a ``func_name``) makes another nameless class of it at each load;
    here it is one class, of the function's name.

    Raises:
        Exception: Whatever ``repository.load`` raises.
    """
    layer: type[nn.Module] = repository.load()
    name = getattr(repository, "func_name", None)
    forward = getattr(layer, "forward", None)
    if not isinstance(name, str) or not inspect.isfunction(forward):
        return layer
    called = [f for f in inspect.getclosurevars(forward).nonlocals.values() if callable(f)]
    return _named(called[0], name) if len(called) == 1 else layer


@functools.cache
def _named(function: Callable[..., Any], name: str) -> type[nn.Module]:
    return layer_of_function(function, name, _home(function, name))


def _home(function: Callable[..., Any], name: str) -> str:
    """The module of a kernel that has ``function``, which may be an op or another library's."""
    for key, module in tuple(sys.modules.items()):
        members = getattr(module, "__dict__", {})  # asks no lazy module for anything
        file = members.get("__file__")
        if members.get(name) is function and file and _variant_around(Path(file)):
            return key
    return getattr(function, "__module__", None) or ""


_origins: weakref.WeakKeyDictionary[type, Origin | None] = weakref.WeakKeyDictionary()


def foreign_origin(layer: type[nn.Module]) -> Origin | None:
    """Where a hub layer that was imported without us comes from, by the files that it lies in.

    The revision is the commit, where those are in a cache of the Hub's, or else the hash of the
    variant's content, as for a repository of ours.

    Returns:
        None where the files are not those of a kernel.
    """
    if layer not in _origins:  # kept, since what was imported is what the files were then
        directory = next(filter(None, map(_variant_around, _files(layer))), None)
        _origins[layer] = None if directory is None else _origin_at(directory)
    return _origins[layer]


def _files(layer: type[nn.Module]) -> Iterator[Path]:
    """The file of the layer's code; then of its module, which two kernels may have of one name."""
    forward: Any = inspect.unwrap(layer.forward)
    function = inspect.unwrap(getattr(forward, FUNCTION, forward))
    if code := getattr(function, "__code__", None):
        yield Path(code.co_filename)
    if file := getattr(sys.modules.get(layer.__module__), "__file__", None):
        yield Path(file)


def _variant_around(file: Path) -> Path | None:
    for directory in file.parents:
        in_build = directory.parent.name == "build"
        if parse(directory.name):
            if in_build or (directory / "__init__.py").is_file():
                return directory
        elif in_build and (directory / METADATA).is_file():
            return directory
    return None


_SNAPSHOT = re.compile(r"(?:kernel|model)s--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/", re.ASCII)


def _origin_at(directory: Path) -> Origin:
    name = read_metadata(directory).name
    if found := _SNAPSHOT.search(directory.as_posix()):
        owner, short, commit = found.groups()
        return Origin(f"{owner}/{short}", name or short, commit, directory.name)
    build = directory.parent
    repository = build.parent if build.name == "build" else build
    content = content_hash(hash_files(directory))
    return Origin(str(repository), name or repository.name, content, directory.name)
