"""From a path to a checked variant: which variant is meant, and whether it may be imported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kernelgraph.builds.digests import UNLISTED, content_hash, hash_files, verify
from kernelgraph.builds.metadata import read_metadata
from kernelgraph.builds.requirements import (
    OtherDevice,
    check_archs,
    check_python_depends,
    gfx_of,
)
from kernelgraph.builds.variants import System, choose, no_variant, parse_variant
from kernelgraph.builds.wanted import Wanted
from kernelgraph.selection import DEVICE_TYPES, Target, target_of


@dataclass(frozen=True)
class Origin:
    """The place that a kernel comes from."""

    repository: str
    """The Hub id, or the local path as the user gave it; for reports and errors."""
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
        """The hash of its content and of the content of the kernels that it uses, in hex."""
        if not self.dependencies:
            return self.content
        used = [f"{repo_id}\0{k.identity}\n" for repo_id, k in sorted(self.dependencies.items())]
        return hashlib.sha256("".join([self.content, "\n", *used]).encode()).hexdigest()


def default_target() -> Target:
    """The accelerator that torch can use here, or else the cpu."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type not in DEVICE_TYPES:
        return Target("cpu")
    return target_of(accelerator.type)


def variant_at(path: Path, target: Target, shown: str) -> Path:
    """The directory of the variant that ``path`` means: itself, or the best of those it holds.

    Args:
        path: A kernel repository, its ``build/``, or one variant; an absolute path.
        target: The device that the variant has to fit.
        shown: The path that errors name.

    Raises:
        FileNotFoundError: There is no variant, or none that fits; the message says why.
    """
    builds = {directory.name: directory for directory in builds_at(path, shown)}
    if path in builds.values() and parse_variant(path.name) is None:
        return path  # a variant under any name, and the only one that the path can mean
    system = System.detect(target.type)
    choice = choose(builds, system)
    if choice.best is None:
        raise no_variant(shown, choice, system)
    return builds[choice.best]


def builds_at(path: Path, shown: str) -> list[Path]:
    """The directories of the variants that ``path`` means: itself, or all that it holds.

    Args:
        path: A kernel repository, its ``build/``, or one variant.
        shown: The path that errors name.

    Raises:
        FileNotFoundError: It is no kernel repository.
    """
    build = path / "build"
    is_package = (path / "__init__.py").is_file()
    if path.is_dir():
        if parse_variant(path.name) and (is_package or not build.is_dir()):
            return [path]
        if build.is_dir():
            return _subdirectories(build)
        inside = _subdirectories(path)
        if path.name == "build" or any(parse_variant(directory.name) for directory in inside):
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
    """Check the variant in ``directory`` and the kernels that it uses, without running any code.

    Args:
        directory: The variant, as an absolute path.
        target: The device that the kernel is for.
        repository: The repository's name in errors and reports.
        name: The kernel's short name, where its metadata has none.
        revision: The commit; by default the content's hash.
        package_name: The package in the variant, where the variant is not itself a package.
        check_arch: Whether a build that was compiled for other devices is refused.
        sha256: The base64 digest of every file, where the caller has read them already.
        dependency: Finds and checks a kernel that this one uses.

    Raises:
        FileNotFoundError: There is no package in it, or no build of a dependency that fits.
        OtherDevice: The build was compiled for other devices.
        ValueError: The metadata does not follow the format, a file does not match the digest, or
            there is a link that leads out of the directory.
        ImportError: A Python package that the kernel needs is not installed.
    """
    shown = f"kernel {repository}, variant {directory.name}"
    try:
        # The files come first: this step finds a link that leads out, and the metadata may be one.
        found = sha256 or hash_files(directory)
        files = {file: digest for file, digest in found.items() if file not in UNLISTED}
        metadata = read_metadata(directory)
        verify(directory, metadata, files)
        if check_arch:
            check_archs(metadata, target, gfx_of(target))
        check_python_depends(metadata.python_depends, target.type)
    except OtherDevice as error:
        raise OtherDevice(f"{shown}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from error
    except ImportError as error:
        raise ImportError(f"{shown}: {error}") from error
    name = metadata.name or name
    package = _package(files, package_name, name, shown)
    content = content_hash(found)
    used = {}
    for wanted in metadata.kernel_depends:
        assert dependency is not None
        used[wanted.repo_id] = dependency(wanted)
    origin = Origin(repository, name, revision or content, directory.name)
    return Checked(directory, package, content, files, origin, used)


def _package(files: Mapping[str, str], package_name: str | None, name: str, shown: str) -> str:
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
        f"{shown}: expected an __init__.py in it, or in a directory {candidates[0]}/ of it; {there}"
    )
