"""Loading kernels from a disk: which variant, whether it may be used, and its import."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING

from kernelgraph.devices import DEVICE_TYPES, Target, target_of
from kernelgraph.hub.foreign import foreign_origin
from kernelgraph.hub.importing import Checked, Origin, import_checked, module_origin
from kernelgraph.hub.metadata import (
    check_archs,
    content_hash,
    digest_files,
    read_metadata,
    verify,
)
from kernelgraph.hub.variants import System, choose, no_variant, parse

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Origin",
    "code_hash",
    "get_local_kernel",
    "load_local",
    "load_variant",
    "origin_of",
]


def get_local_kernel(
    repo_path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    package_name: str | None = None,
) -> ModuleType:
    """Import a kernel from a directory.

    The same content is imported once, wherever it lies; changed content is imported anew, and
    what was imported before stays as it was.

    Args:
        repo_path: A kernel repository, its ``build/``, or one variant in it.
        backend: The device type that the kernel is for; by default the accelerator that torch
            can use here, or else cpu.
        package_name: The package in the variant, where the variant is not itself a package; by
            default the name in its metadata, or that of the only package there.

    Raises:
        FileNotFoundError: ``repo_path`` is no kernel repository, or has no variant that fits; the
            message says why each was refused.
        ValueError: There is no such backend, the metadata cannot be understood, a file does not
            match the digest, or the build is for other devices.
        ImportError: The kernel's own code failed.
    """
    target = default_target() if backend is None else target_of(backend)
    path = Path(os.path.abspath(os.path.expanduser(repo_path)))
    return load_local(path, target, shown=str(repo_path), package_name=package_name)


def default_target() -> Target:
    """The accelerator that torch can use here, or else the cpu."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type not in DEVICE_TYPES:
        return Target("cpu")
    return target_of(accelerator.type)


def load_local(
    path: Path, target: Target, *, shown: str, package_name: str | None = None
) -> ModuleType:
    """`get_local_kernel` for an absolute path and a known device; ``shown`` is for people."""
    directory = _variant_at(path, target, shown)
    build = directory.parent
    return load_variant(
        directory,
        target,
        repository=shown,
        name=build.parent.name if build.name == "build" else build.name,
        package_name=package_name,
    )


def _variant_at(path: Path, target: Target, shown: str) -> Path:
    """The variant that is meant by ``path``: the one it is, or the best of those it holds."""
    build = path / "build"
    is_package = (path / "__init__.py").is_file()
    names: list[str] = []
    if path.is_dir():
        if parse(path.name) and (is_package or not build.is_dir()):
            build, names = path.parent, [path.name]
        elif build.is_dir():
            names = _subdirectories(build)
        else:
            build, names = path, _subdirectories(path)
            if path.name != "build" and not any(parse(name) for name in names):
                if is_package:  # whatever it is called, nothing else can be meant
                    return path
                build = path / "build"
    if not build.is_dir():
        raise FileNotFoundError(
            f"{shown} is not a kernel repository: expected a directory with build/<variant>/ in "
            "it, such a build/, or one variant with an __init__.py"
        )
    system = System.detect(target.type)
    choice = choose(names, system)
    if choice.best is None:
        raise no_variant(shown, choice, system)
    return build / choice.best


def _subdirectories(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.is_dir()]


def load_variant(
    directory: Path,
    target: Target,
    *,
    repository: str,
    name: str,
    revision: str | None = None,
    package_name: str | None = None,
) -> ModuleType:
    """Check the variant in ``directory`` and import it; nothing of it runs before the checks.

    Args:
        directory: The variant, as an absolute path.
        target: The device that the kernel is for.
        repository: What errors and reports call the repository.
        name: The kernel's short name, where its metadata has none.
        revision: The commit; by default the content's hash.
        package_name: As for `get_local_kernel`.

    Raises:
        FileNotFoundError, ValueError, ImportError: As for `get_local_kernel`.
    """
    try:
        metadata = read_metadata(directory)
        sha256 = digest_files(directory)
        verify(directory, metadata, sha256)
        check_archs(metadata, target, _gfx(target))
    except ValueError as error:
        raise ValueError(f"kernel {repository}, variant {directory.name}: {error}") from error
    package = _package(directory, sha256, package_name, metadata.name or name, repository)
    content = content_hash(directory, sha256)
    origin = Origin(repository, metadata.name or name, revision or content, directory.name)
    return import_checked(Checked(directory, package, content, sha256, origin))


def _package(
    directory: Path,
    files: Mapping[str, str],
    package_name: str | None,
    name: str,
    repository: str,
) -> str:
    """The package to import: empty for the variant itself, else the name of one inside it."""
    # Builds in the newer layout also have a package inside, for old clients; it comes second.
    if "__init__.py" in files:
        return ""
    packages = sorted(
        f.split("/")[0] for f in files if f.endswith("/__init__.py") and f.count("/") == 1
    )
    if package_name is not None:
        candidates = [package_name]
    else:
        candidates = [name.replace("-", "_"), *(packages if len(packages) == 1 else [])]
    for candidate in candidates:
        if candidate in packages:
            return candidate
    there = f"the packages there: {', '.join(packages)}" if packages else "no package there"
    raise FileNotFoundError(
        f"kernel {repository}, variant {directory.name}: expected an __init__.py in it, or in a "
        f"directory {candidates[0]}/ of it; {there}"
    )


def _gfx(target: Target) -> str | None:
    """The ROCm architecture of the current device, where there is one."""
    if target.type != "rocm":
        return None
    import torch

    if torch.version.hip is None or not torch.cuda.is_available():
        return None
    return getattr(torch.cuda.get_device_properties(), "gcnArchName", None)


# --- where a class comes from -------------------------------------------------------------------


def origin_of(layer: type[nn.Module]) -> Origin:
    """Where the hub layer ``layer`` comes from.

    For a class that is in no kernel, the repository is its top-level module, and the revision is a
    hash of what its ``forward`` computes, as far as its code tells: the same in each process,
    another after an edit.
    """
    if origin := module_origin(layer.__module__) or foreign_origin(layer):
        return origin
    root = layer.__module__.partition(".")[0]
    return Origin(root, root, code_hash(layer.forward), "")


_revisions: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()


def code_hash(forward: object) -> str:
    """A hash of what a function computes, as far as its code, defaults and closure tell, in hex."""
    # Kept, because a closure may change: a function's revision is that at its first use.
    if isinstance(forward, FunctionType) and forward in _revisions:
        return _revisions[forward]
    revision = hashlib.sha256(_fingerprint(forward, set()).encode()).hexdigest()
    if isinstance(forward, FunctionType):
        _revisions[forward] = revision
    return revision


def _fingerprint(value: object, seen: set[int]) -> str:
    """A text that differs where ``value`` computes something else, and holds no addresses."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return ascii(value)
    if id(value) in seen:
        return "..."
    seen = seen | {id(value)}
    if isinstance(value, (tuple, frozenset)):
        parts = [_fingerprint(part, seen) for part in value]
        # The order of a set of strings is another one in each process.
        return f"({','.join(parts if isinstance(value, tuple) else sorted(parts))})"
    if isinstance(value, slice):
        return f"slice{_fingerprint((value.start, value.stop, value.step), seen)}"
    if isinstance(value, CodeType):
        shape = (value.co_flags, value.co_argcount, value.co_kwonlyargcount, value.co_varnames)
        handlers = getattr(value, "co_exceptiontable", b"")  # part of the bytecode before 3.11
        inner = (value.co_code, handlers, shape, value.co_names, value.co_consts)
        return f"code{_fingerprint(inner, seen)}"
    if isinstance(value, FunctionType):
        cells = tuple(_cell(cell) for cell in value.__closure__ or ())
        keywords = tuple(sorted((value.__kwdefaults__ or {}).items()))
        return (
            f"function{_fingerprint((value.__code__, value.__defaults__, keywords, cells), seen)}"
        )
    kind = value if isinstance(value, type) else type(value)
    if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device", "layout"):
        return str(value)
    if kind is type(value) and isinstance(name := getattr(value, "__name__", None), str):
        return f"{getattr(value, '__module__', None)}.{name}"  # built in, or an op of torch
    return f"{kind.__module__}.{kind.__qualname__}"


def _cell(cell: object) -> object:
    try:
        return getattr(cell, "cell_contents", None)
    except ValueError:  # not filled yet
        return None
