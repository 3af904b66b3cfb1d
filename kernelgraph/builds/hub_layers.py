"""Hub layers: taken out of an imported kernel or loaded by another package, and their origins.

Our own repositories take a layer, or a function as a layer, out of a kernel that `importer` has
imported. Any other object with ``load`` is a repository too, those of the ``kernels`` package among
them: the class that it returns is used as it is, and `origin_of` finds out where it comes from, for
reports and for the names of ops.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from kernelgraph.builds.check import Origin
from kernelgraph.builds.digests import content_hash, hash_files
from kernelgraph.builds.importer import module_origin
from kernelgraph.builds.metadata import METADATA, read_metadata
from kernelgraph.fingerprint import code_hash
from kernelgraph.layers import FUNCTION, class_of_function

if TYPE_CHECKING:
    from torch import nn

    Function = Callable[..., object]


# --- out of a kernel that we imported -----------------------------------------------------------

# The classes made of functions. Two classes of one function would count as two kernels.
_classes: weakref.WeakKeyDictionary[ModuleType, dict[str, type[nn.Module]]]
_classes = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def take_layer(kernel: ModuleType, name: str, repository: str) -> type[nn.Module]:
    """The layer ``<kernel>.layers.<name>``; errors name ``repository``.

    Raises:
        ValueError: The kernel defines no layers, or none of that name.
    """
    layers = getattr(kernel, "layers", None)
    if layers is None:
        raise ValueError(f"{repository}: the kernel defines no layers")
    if not hasattr(layers, name):
        there = _names(layers, lambda value: isinstance(value, type))
        raise ValueError(f"{repository}: the kernel has no layer {name!r}; it has: {there}")
    layer: type[nn.Module] = getattr(layers, name)
    return layer


def take_function(kernel: ModuleType, name: str, repository: str) -> type[nn.Module]:
    """The function ``<kernel>.<name>`` as a layer without parameters, one class for each function.

    Raises:
        ValueError: The kernel has no function of that name; the message names ``repository``.
    """
    function = getattr(kernel, name, None)
    if not callable(function):
        there = _names(kernel, lambda value: callable(value) and not isinstance(value, type))
        raise ValueError(f"{repository}: the kernel has no function {name!r}; it has: {there}")
    with _lock:
        classes = _classes.setdefault(kernel, {})
        if name not in classes:
            classes[name] = _layer_of_function(function, name, kernel.__name__)
        return classes[name]


def _names(namespace: object, wanted: Callable[[object], bool]) -> str:
    found = [name for name, value in vars(namespace).items() if name[0] != "_" and wanted(value)]
    return ", ".join(sorted(found)) or "none"


def _layer_of_function(function: Function, name: str, module: str) -> type[nn.Module]:
    """A hub layer called ``name`` in ``module`` that calls ``function``, with its flags."""
    names = ("can_torch_compile", "has_backward")
    flags = {name: getattr(function, name) for name in names if hasattr(function, name)}
    return class_of_function(function, name, module, __doc__=function.__doc__, **flags)


# --- loaded by another package ------------------------------------------------------------------


class ForeignRepository(Protocol):
    """A repository object of another package."""

    def load(self) -> type[nn.Module]:
        """Load the hub layer."""
        ...


def load_foreign(repository: ForeignRepository) -> type[nn.Module]:
    """Load the hub layer of another package's repository object.

    A repository object for a function (it has a ``func_name``) makes a new class, without a name
    of its own, at each load. This returns one class for the function, called by its name.

    Raises:
        Exception: Whatever ``repository.load`` raises.
    """
    layer = repository.load()
    name = getattr(repository, "func_name", None)
    forward = getattr(layer, "forward", None)
    if not isinstance(name, str) or not inspect.isfunction(forward):
        return layer
    called = [f for f in inspect.getclosurevars(forward).nonlocals.values() if callable(f)]
    return _class_of_foreign(called[0], name) if len(called) == 1 else layer


@functools.cache
def _class_of_foreign(function: Function, name: str) -> type[nn.Module]:
    return _layer_of_function(function, name, _module_with(function, name))


def _module_with(function: Function, name: str) -> str:
    """The module of the kernel that has ``function``, which may be an op or another library's."""
    for module in _modules_of_kernels_package():
        if vars(module).get(name) is function:
            return module.__name__
    return getattr(function, "__module__", None) or ""


def _modules_of_kernels_package() -> list[ModuleType]:
    """The kernels that the ``kernels`` package has loaded; empty for versions that do not tell."""
    list_kernels = getattr(sys.modules.get("kernels"), "get_loaded_kernels", None)
    return [] if list_kernels is None else [kernel.module for kernel in list_kernels()]


# --- origins ------------------------------------------------------------------------------------


def origin_of(layer: type[nn.Module]) -> Origin:
    """The origin of the hub layer ``layer``: the kernel that we or the ``kernels`` package loaded.

    A class of no known kernel has an origin too: its repository is its top-level module, and its
    revision is a hash of the code, defaults and closure of its ``forward``. That hash is the same
    in each process, and another one after an edit of that code.
    """
    if origin := module_origin(layer.__module__) or foreign_origin(layer):
        return origin
    root = layer.__module__.partition(".")[0]
    return Origin(root, root, code_hash(layer.forward), "")


# Kept, because the files may change later: the origin is that of the files that were imported.
_origins: weakref.WeakKeyDictionary[type, Origin | None] = weakref.WeakKeyDictionary()


def foreign_origin(layer: type[nn.Module]) -> Origin | None:
    """The origin of a hub layer that the ``kernels`` package has loaded.

    The revision is the commit, where the files are in a cache of the Hub's, or else the hash of
    the variant's content, as for our own repositories.

    Returns:
        None where that package does not know the class.
    """
    if layer not in _origins:
        variants = [_variant_of(module) for module in _modules_of_kernels_package()]
        found = (v for file in _files(layer) for v in variants if file.is_relative_to(v))
        directory = next(found, None)
        _origins[layer] = None if directory is None else _origin_at(directory)
    return _origins[layer]


def _variant_of(kernel: ModuleType) -> Path:
    """The variant's directory: the kernel's package, or in the older layout the one around it."""
    assert kernel.__file__ is not None
    package = Path(kernel.__file__).parent
    return package if (package / METADATA).is_file() else package.parent


def _files(layer: type[nn.Module]) -> Iterator[Path]:
    """The file of the layer's code, then the file of its module.

    The code comes first, because two kernels may have modules of one name.
    """
    forward = inspect.unwrap(layer.forward)
    function = inspect.unwrap(getattr(forward, FUNCTION, forward))
    if code := getattr(function, "__code__", None):
        yield Path(code.co_filename)
    if file := getattr(sys.modules.get(layer.__module__), "__file__", None):
        yield Path(file)


_SNAPSHOT = re.compile(r"(?:kernel|model)s--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/", re.ASCII)


def _origin_at(directory: Path) -> Origin:
    # The ``repo_info`` of a kernel that the other package loaded does not do: it is None for a
    # kernel that was loaded offline, and its revision may be a branch. The path has the commit.
    name = read_metadata(directory).name
    if found := _SNAPSHOT.search(directory.as_posix()):
        owner, short, commit = found.groups()
        return Origin(f"{owner}/{short}", name or short, commit, directory.name)
    build = directory.parent
    repository = build.parent if build.name == "build" else build
    content = content_hash(hash_files(directory))
    return Origin(str(repository), name or repository.name, content, directory.name)
