"""Loading kernels from a disk: which variant, whether it may be used, and its import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kernelgraph.builds.foreign import foreign_origin
from kernelgraph.builds.importing import Checked, Origin, import_checked, module_origin
from kernelgraph.builds.metadata import (
    UNLISTED,
    OtherDevice,
    check_archs,
    content_hash,
    gfx_of,
    hash_files,
    read_metadata,
    verify,
)
from kernelgraph.builds.python_packages import check_python_depends
from kernelgraph.builds.variants import System, choose, no_variant, parse
from kernelgraph.builds.wanted import Wanted
from kernelgraph.selection import DEVICE_TYPES, Target, target_of

if TYPE_CHECKING:
    from torch import nn
from kernelgraph.fingerprint import code_hash

__all__ = [
    "Checked",
    "Origin",
    "check_variant",
    "code_hash",
    "content_hash",
    "default_target",
    "import_checked",
    "load_variant",
    "origin_of",
    "variant_at",
]


def default_target() -> Target:
    """The accelerator that torch can use here, or else the cpu."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type not in DEVICE_TYPES:
        return Target("cpu")
    return target_of(accelerator.type)


def variant_at(path: Path, target: Target, shown: str) -> Path:
    """The variant that is meant by ``path``: the one it is, or the best of those it holds.

    Raises:
        FileNotFoundError: There is none, or none that fits; the message says why.
    """
    builds = {directory.name: directory for directory in builds_at(path, shown)}
    if path in builds.values() and parse(path.name) is None:
        return path  # whatever it is called, nothing else can be meant
    system = System.detect(target.type)
    choice = choose(builds, system)
    if choice.best is None:
        raise no_variant(shown, choice, system)
    return builds[choice.best]


def builds_at(path: Path, shown: str) -> list[Path]:
    """The variants that are meant by ``path``: the one it is, or those it holds.

    Raises:
        FileNotFoundError: It is no kernel repository.
    """
    build = path / "build"
    is_package = (path / "__init__.py").is_file()
    if path.is_dir():
        if parse(path.name) and (is_package or not build.is_dir()):
            return [path]
        if build.is_dir():
            return _subdirectories(build)
        inside = _subdirectories(path)
        if path.name == "build" or any(parse(directory.name) for directory in inside):
            return inside
        if is_package:
            return [path]
    raise FileNotFoundError(
        f"{shown} is not a kernel repository: expected a directory with build/<variant>/ in "
        "it, such a build/, or one variant with an __init__.py"
    )


def _subdirectories(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir())


def check_variant(
    directory: Path,
    target: Target,
    *,
    repository: str,
    name: str,
    revision: str | None = None,
    package_name: str | None = None,
    check_arch: bool = True,
    sha256: Mapping[str, str] | None = None,
    dependency: Callable[[Wanted], Checked] | None = None,
) -> Checked:
    """Check the variant in ``directory``, and what it depends on; nothing of it is run.

    Args:
        directory: The variant, as an absolute path.
        target: The device that the kernel is for.
        repository: What errors and reports call the repository.
        name: The kernel's short name, where its metadata has none.
        revision: The commit; by default the content's hash.
        package_name: The package in the variant, where the variant is not itself a package.
        check_arch: Whether a build that was compiled for other devices is refused.
        sha256: The base64 digest of every file, where the caller has read them already.
        dependency: How a kernel that this one uses is found and checked.

    Raises:
        FileNotFoundError: There is no package in it, or no build of a dependency that fits.
        ValueError: The metadata cannot be understood, a file does not match the digest, or the
            build is for other devices.
        ImportError: A Python package that the kernel needs is not installed.
    """
    try:
        # First, because this is what finds a link that leads out, be it the metadata itself.
        found = sha256 or hash_files(directory)
        files = {file: digest for file, digest in found.items() if file not in UNLISTED}
        metadata = read_metadata(directory)
        verify(directory, metadata, files)
        if check_arch:
            check_archs(metadata, target, gfx_of(target))
        check_python_depends(metadata.python_depends, target.type)
    except ValueError as error:
        kind = OtherDevice if isinstance(error, OtherDevice) else ValueError
        raise kind(f"kernel {repository}, variant {directory.name}: {error}") from error
    except ImportError as error:
        raise ImportError(f"kernel {repository}, variant {directory.name}: {error}") from error
    package = _package(directory, files, package_name, metadata.name or name, repository)
    content = content_hash(found)
    kernels = {}
    for wanted in metadata.kernel_depends:
        assert dependency is not None
        kernels[wanted.repo_id] = dependency(wanted)
    origin = Origin(repository, metadata.name or name, revision or content, directory.name)
    return Checked(directory, package, content, files, origin, kernels)


def load_variant(directory: Path, target: Target, **arguments: Any) -> ModuleType:
    """`check_variant`, and import it.

    Raises:
        FileNotFoundError, ValueError: As for `check_variant`.
        ImportError: Also, the kernel's own code failed.
    """
    return import_checked(check_variant(directory, target, **arguments))


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
