"""Importing a checked variant under a module name of our own.

A kernel's module is called ``kernelgraph_<name>_<16 hex digits of its content's hash>``: no ``id``
in any metadata can shadow another module, and revisions live side by side. The import system
itself does the importing, so its locks make it happen once among threads, and kernels that load
kernels cannot deadlock; a finder of ours only decides what may be found, which is what was checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
from typing import Any

from kernelgraph.builds.metadata import encoded_digest


@dataclass(frozen=True)
class Origin:
    """Where a kernel comes from."""

    repository: str
    """For people: the Hub id, or the local path as it was given."""
    name: str
    """A short name for the kernel; any characters."""
    revision: str
    """The full commit; for a local repository the hash of the variant's content."""
    variant: str


@dataclass(frozen=True)
class Checked:
    """A variant whose files were checked, ready to be imported."""

    directory: Path
    package: str
    """The package in ``directory``: empty where the variant is itself the package."""
    content: str
    """The hash of the whole content, in hex."""
    sha256: Mapping[str, str]
    """The base64 digest of every file, by relative path."""
    origin: Origin
    dependencies: Mapping[str, Checked] = field(default_factory=dict)
    """The kernels that this one uses, by repository id."""

    @cached_property
    def identity(self) -> str:
        """A hash of the content, and of that of the kernels that it uses, in hex."""
        if not self.dependencies:
            return self.content
        used = [f"{repo_id}\0{k.identity}\n" for repo_id, k in sorted(self.dependencies.items())]
        return hashlib.sha256("".join([self.content, "\n", *used]).encode()).hexdigest()

    @property
    def stem(self) -> str:
        return f"{self.package}/" if self.package else ""


_lock = threading.Lock()
# The kernels that may be imported, by module name, each as it was loaded last; and the module
# names, by content.
_checked: dict[str, Checked] = {}
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
        # `__import__`, because where threads import kernels that import each other it hands out a
        # module that is not ready, as in any circular import; importlib.import_module raises. It
        # also hands out the module whose import failed in another thread while this one waited.
        with _offering(modules):
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
    """For a kernel's own code: a kernel that its ``metadata.json`` says it uses.

    Args:
        repo_id: The repository, as ``kernel-depends`` names it.

    Raises:
        RuntimeError: The caller is no kernel's code, or the kernel does not depend on that one.
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
def _offering(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Have the `kernels` package's own ``get_kernel_dep`` answer too, where it is installed."""
    if not modules or importlib.util.find_spec("kernels") is None:
        yield
        return
    deps: Any = importlib.import_module("kernels.deps")
    with deps.use_kernel_deps(modules):
        yield


def module_kernel(name: str) -> Checked | None:
    """The kernel that a module belongs to, as it was loaded; None if that is no kernel's."""
    return _checked.get(name.partition(".")[0])


def module_origin(name: str) -> Origin | None:
    """The origin of the kernel that a module belongs to; None for a module that is no kernel's.

    Where the same content was loaded from two places, that is the later of them.
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
            return _source_spec(fullname, f"{kernel.stem}__init__.py", kernel)
        # The files are those of the package that was imported, wherever it was loaded from since.
        loader = getattr(sys.modules[root].__spec__, "loader", None)
        assert isinstance(loader, _SourceLoader)
        for place in path or ():
            if spec := _submodule_spec(fullname, Path(place), loader.kernel):
                return spec
        # Not None: the next finder would go and look on the disk, where there is bytecode.
        raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def _submodule_spec(fullname: str, place: Path, kernel: Checked) -> ModuleSpec | None:
    """In the order of Python's own finder: a package, a binary module, a source, a namespace."""
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
    """Compiles a source that was checked; reads and writes no bytecode."""

    def __init__(self, fullname: str, path: Path, kernel: Checked) -> None:
        super().__init__(fullname, str(path))
        self.kernel = kernel

    def get_code(self, fullname: str) -> CodeType:
        path = Path(self.get_filename(fullname))
        source = self.get_data(str(path))
        # A submodule may be imported long after the check, and must be of the same content.
        if encoded_digest(source) != self.kernel.sha256[self._relative(path)]:
            raise ImportError(f"{path} has changed since the kernel was loaded")
        code: CodeType = self.source_to_code(source, str(path))
        return code

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except BaseException:
            # The import system removes the module that failed, but not what it had imported of
            # its own package before.
            for name in [n for n in sys.modules if n.startswith(f"{module.__name__}.")]:
                sys.modules.pop(name, None)
            raise

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.kernel.directory).as_posix()
