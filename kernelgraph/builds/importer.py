"""Importing a checked variant under a module name of our own.

A kernel's module is called ``kernelgraph_<name>_<16 hex digits of its content's hash>``: no ``id``
in any metadata can shadow another module, and several revisions can be loaded at once. Python's
import system does the importing, so its locks make it happen once among threads, and kernels that
load kernels cannot deadlock. A finder of ours finds the files that were checked, and no others.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    ExtensionFileLoader,
    ModuleSpec,
    SourceFileLoader,
)
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType

from kernelgraph.builds.check import Checked, Origin
from kernelgraph.builds.digests import encoded_digest

_lock = threading.Lock()
# The kernels that may be imported, by module name; of equal content, the one loaded last.
_checked: dict[str, Checked] = {}
# The module names, by the kernel's identity and package.
_names: dict[tuple[str, str], str] = {}


def import_checked(kernel: Checked) -> ModuleType:
    """Import ``kernel``, or return its module if the same content was imported before.

    The kernels that it uses are imported first.

    Raises:
        ImportError: The import failed; the message names the repository, the revision and the
            variant. Nothing of the kernel is left in ``sys.modules``.
    """
    modules = {repo_id: import_checked(used) for repo_id, used in kernel.dependencies.items()}
    shown = kernel.package or kernel.origin.name
    readable = "".join(c if c.isascii() and c.isalnum() else "_" for c in shown)
    with _lock:
        name = _names.setdefault(
            (kernel.identity, kernel.package), f"kernelgraph_{readable}_{kernel.identity[:16]}"
        )
        _checked[name] = kernel
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    try:
        # `__import__` returns a module that is not ready yet where threads import kernels that
        # import each other, as in any circular import; importlib.import_module would raise. It
        # also returns a module whose import failed in another thread meanwhile, hence the loop.
        with _answering_kernels_package(modules):
            while (module := __import__(name)) is not sys.modules.get(name):
                pass
        return module
    except Exception as error:
        origin = kernel.origin
        raise ImportError(
            f"importing kernel {origin.repository} failed (revision {origin.revision}, variant "
            f"{origin.variant}): {type(error).__name__}: {error}"
        ) from error


def get_kernel_dep(repo_id: str) -> ModuleType:
    """Import a kernel that the calling kernel uses; only a kernel's own code can call this.

    Args:
        repo_id: The repository, as ``kernel-depends`` in the calling kernel's ``metadata.json``
            names it.

    Returns:
        The module of that kernel.

    Raises:
        RuntimeError: The caller is no kernel's code, or the kernel does not depend on that one.
        ImportError: The import of that kernel failed.

    Example:
        In ``__init__.py`` of a kernel whose metadata has
        ``"kernel-depends": [{"repo-id": "org/activation", "version": 1}]``::

            from kernelgraph import get_kernel_dep

            activation = get_kernel_dep("org/activation")

        Outside of a kernel it raises:

        >>> from kernelgraph import get_kernel_dep
        >>> get_kernel_dep("org/activation")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        RuntimeError: get_kernel_dep('org/activation'): ... is no kernel's module
    """
    caller = sys._getframe(1).f_globals.get("__name__", "")
    kernel = _checked.get(caller.partition(".")[0])
    if kernel is None:
        raise RuntimeError(f"get_kernel_dep({repo_id!r}): {caller} is no kernel's module")
    if repo_id not in kernel.dependencies:
        there = ", ".join(sorted(kernel.dependencies)) or "none"
        raise RuntimeError(
            f"kernel {kernel.origin.repository} does not depend on {repo_id}: its metadata lists "
            f"{there} in kernel-depends"
        )
    return import_checked(kernel.dependencies[repo_id])


@contextlib.contextmanager
def _answering_kernels_package(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Let the ``kernels`` package's own ``get_kernel_dep`` return ``modules`` too.

    Kernels may be written for that package; without it in the environment this does nothing.
    """
    if not modules or importlib.util.find_spec("kernels") is None:
        yield
        return
    with importlib.import_module("kernels.deps").use_kernel_deps(modules):
        yield


def module_kernel(name: str) -> Checked | None:
    """The kernel that a module belongs to, as it was loaded last; None for any other module."""
    return _checked.get(name.partition(".")[0])


def module_origin(name: str) -> Origin | None:
    """The origin of the kernel that a module belongs to; None for any other module.

    Where the same content was loaded from two places, it is the later of them.
    """
    kernel = module_kernel(name)
    return kernel.origin if kernel else None


class _Finder(MetaPathFinder):
    """Finds the modules of kernels among the files that were checked, and nowhere else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root = fullname.partition(".")[0]
        if root not in _checked:
            return None
        if root == fullname:
            kernel = _checked[root]
            prefix = f"{kernel.package}/" if kernel.package else ""
            return _source_spec(fullname, f"{prefix}__init__.py", kernel)
        # A submodule comes from the place that its package was imported from, even if the same
        # content was loaded from another place since.
        loader = getattr(sys.modules[root].__spec__, "loader", None)
        assert isinstance(loader, _SourceLoader)
        for place in path or ():
            if spec := _submodule_spec(fullname, Path(place), loader.kernel):
                return spec
        # Returning None would let the next finder search the disk, where it may find bytecode.
        raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def _submodule_spec(fullname: str, place: Path, kernel: Checked) -> ModuleSpec | None:
    """Find a submodule among the checked files.

    The order is that of Python's own finder: a package, a binary module, a source, a namespace.
    """
    path = place / fullname.rpartition(".")[2]
    if not path.is_relative_to(kernel.directory):
        return None
    name = path.relative_to(kernel.directory).as_posix()
    if (package := f"{name}/__init__.py") in kernel.sha256:
        return _source_spec(fullname, package, kernel)
    for suffix in EXTENSION_SUFFIXES:
        if (binary := f"{name}{suffix}") in kernel.sha256:
            location = str(kernel.directory / binary)
            loader = ExtensionFileLoader(fullname, location)
            return spec_from_file_location(fullname, location, loader=loader)
    if (source := f"{name}.py") in kernel.sha256:
        return _source_spec(fullname, source, kernel)
    if any(file.startswith(f"{name}/") for file in kernel.sha256):
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [str(path)]
        return spec
    return None


def _source_spec(fullname: str, file: str, kernel: Checked) -> ModuleSpec | None:
    path = kernel.directory / file
    loader = _SourceLoader(fullname, path, kernel)
    places = [str(path.parent)] if path.name == "__init__.py" else None
    return spec_from_file_location(fullname, path, loader=loader, submodule_search_locations=places)


class _SourceLoader(SourceFileLoader):
    """Compiles a checked source, and neither reads nor writes bytecode."""

    def __init__(self, fullname: str, path: Path, kernel: Checked) -> None:
        super().__init__(fullname, str(path))
        self.kernel = kernel

    def get_code(self, fullname: str) -> CodeType:
        path = Path(self.get_filename(fullname))
        source = self.get_data(str(path))
        # A submodule may be imported long after the check, and must still have the same content.
        if encoded_digest(source) != self.kernel.sha256[self._relative(path)]:
            raise ImportError(f"{path} has changed since the kernel was loaded")
        code: CodeType = self.source_to_code(source, str(path))
        return code

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except BaseException:
            # The import system removes the module that failed, but not the submodules of its own
            # that it had imported before.
            for name in [n for n in sys.modules if n.startswith(f"{module.__name__}.")]:
                sys.modules.pop(name, None)
            raise

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.kernel.directory).as_posix()
