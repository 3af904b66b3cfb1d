"""From a wanted repository to an imported kernel: find, fetch, check, then import."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from kernelgraph.builds import (
    Checked,
    Wanted,
    below,
    check_archs,
    check_repo_id,
    check_variant,
    default_target,
    gfx_of,
    import_checked,
    read_metadata,
    variant_at,
)
from kernelgraph.hub.client import Hub
from kernelgraph.hub.fetcher import read_remote_metadata
from kernelgraph.hub.finder import Finder
from kernelgraph.hub.lockfile import Locks, find_locks
from kernelgraph.hub.trust import Trust, parse_trust
from kernelgraph.selection import Target, target_of

_UserAgent: TypeAlias = str | Mapping[str, str] | None
"""An addition to the user agent of each request: text, or keys and values."""


def get_kernel(
    repo_id: str,
    *,
    revision: str | None = None,
    version: int | str | None = None,
    backend: str | None = None,
    user_agent: _UserAgent = None,
    trust_remote_code: Trust = False,
    check_arch: bool = True,
) -> ModuleType:
    """Import a kernel from the Hub; only the variant that fits is downloaded.

    Args:
        repo_id: The repository, ``owner/name``.
        revision: A branch, a tag or a commit.
        version: ``N`` for the branch ``v<N>``; or a PEP 440 specifier such as ``">=0.1,<0.2"``,
            for the highest of the tags ``v<major>.<minor>.<patch>`` that fits.
        backend: The device type that the kernel is for; by default that of the accelerator that
            torch can use here, or else cpu.
        user_agent: An addition to the user agent of each request.
        trust_remote_code: Whether to run the repository's code even if the Hub does not call its
            owner a trusted publisher: True, or a list of the repository ids that are trusted.
        check_arch: Whether to refuse a build that was compiled for other devices.

    Returns:
        The kernel's module. The same content is imported once in a process.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is malformed, the repository is not trusted, no version fits, the
            build is for other devices, or its files are not what its metadata or the Hub lists.
        FileNotFoundError: There is no such repository or revision, or no variant that fits; the
            message says why each was refused.
        OSError: The Hub could not be asked; the message names the repository.
        ImportError: The kernel's own code failed, or a package that it needs is missing.

    Example:
        >>> import kernelgraph as kg
        >>> import torch
        >>> kernel = kg.get_kernel("kernels-community/activation", version=1)
        >>> kernel.silu_and_mul(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """
    return load_from_hub(
        Wanted(repo_id, revision, version),
        _target(backend),
        trust_remote_code=parse_trust(trust_remote_code),
        check_arch=check_arch,
        user_agent=user_agent,
    )


def get_local_kernel(
    repo_path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    package_name: str | None = None,
    trust_remote_code: Trust = False,
    user_agent: _UserAgent = None,
) -> ModuleType:
    """Import a kernel from a directory.

    The same content is imported once, whichever directory has it. Changed content is imported as
    another module, and the module of the earlier content does not change.

    Args:
        repo_path: A kernel repository, its ``build/``, or one variant in it.
        backend: As for `get_kernel`.
        package_name: The package in the variant, if the variant is not itself a package; by
            default the name in its metadata, or that of the only package there.
        trust_remote_code: As for `get_kernel`, for the kernels on the Hub that this one uses.
        user_agent: As for `get_kernel`.

    Returns:
        The kernel's module.

    Raises:
        FileNotFoundError: ``repo_path`` is no kernel repository, or has no variant that fits; the
            message says why each was refused.
        ValueError: There is no such backend, the metadata cannot be understood, a file does not
            match the digest, or the build is for other devices.
        ImportError: The kernel's own code failed, or a package that it needs is missing.

    Example:
        >>> import kernelgraph as kg
        >>> import torch
        >>> kernel = kg.get_local_kernel("examples/kernels", backend="cpu")
        >>> kernel.silu_and_mul(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """
    path = Path(os.path.abspath(os.path.expanduser(repo_path)))
    return load_from_disk(
        path,
        _target(backend),
        shown=str(repo_path),
        package_name=package_name,
        trust_remote_code=parse_trust(trust_remote_code),
        user_agent=user_agent,
    )


def get_locked_kernel(
    repo_id: str,
    *,
    lockfile: str | os.PathLike[str] | None = None,
    trust_remote_code: Trust = False,
    user_agent: _UserAgent = None,
) -> ModuleType:
    """Import a kernel from the Hub at the commit that a lock file has for it.

    Args:
        repo_id: The repository, ``owner/name``.
        lockfile: The lock file; by default the ``kernels.lock`` that the calling package was
            installed with, or else the one in the working directory.
        trust_remote_code, user_agent: As for `get_kernel`.

    Returns:
        The kernel's module.

    Raises:
        FileNotFoundError: As for `get_kernel`, or there is no such lock file.
        ValueError: As for `get_kernel`, or the lock file cannot be understood or does not have
            the repository, or the build is not the one that was locked.
        TypeError, OSError, ImportError: As for `get_kernel`.

    Example:
        >>> import kernelgraph as kg
        >>> import torch
        >>> kernel = kg.get_locked_kernel("kernels-community/activation")  # reads kernels.lock
        >>> kernel.silu_and_mul(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """
    check_repo_id("repo_id", repo_id)
    locks = find_locks(lockfile)
    return load_from_hub(
        locks.of(repo_id).wanted,
        default_target(),
        trust_remote_code=parse_trust(trust_remote_code),
        locks=locks,
        user_agent=user_agent,
    )


def has_kernel(
    repo_id: str,
    *,
    revision: str | None = None,
    version: int | str | None = None,
    backend: str | None = None,
    trust_remote_code: Trust = False,
    check_arch: bool = True,
) -> bool:
    """Whether `get_kernel` would find a build for this system; no code is downloaded.

    The kernels that it uses must have a build for this system too.

    Args:
        repo_id, revision, version, backend, trust_remote_code, check_arch: As for `get_kernel`.

    Returns:
        True, or False if there is no such repository or revision, or no build that fits.

    Raises:
        TypeError, ValueError, OSError: As for `get_kernel`, but not if there is no build.

    Example:
        >>> import kernelgraph as kg
        >>> kg.has_kernel("kernels-community/activation", version=1)
        True
        >>> kg.has_kernel("kernels-community/activation", version=99)
        False
    """
    wanted = Wanted(repo_id, revision, version)
    finder = Finder(Hub(), parse_trust(trust_remote_code))
    loader = _Loader(finder, _target(backend), check_arch)
    try:
        return loader.fits(wanted)
    except FileNotFoundError:
        return False


def load_from_hub(
    wanted: Wanted,
    target: Target,
    *,
    trust_remote_code: Trust,
    check_arch: bool = True,
    locks: Locks | None = None,
    user_agent: _UserAgent = None,
) -> ModuleType:
    """Do the work of `get_kernel`, or with ``locks`` of `get_locked_kernel`, for a known device.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: As for `get_locked_kernel`.
    """
    if wanted.revision is None and wanted.version is None and locks is None:
        warnings.warn(
            f"{wanted.repo_id} is loaded from its branch main, which may change at any time: "
            'pass a version, such as version=1 or version=">=0.1,<0.2", or a revision',
            stacklevel=3,
        )
    finder = Finder(Hub(user_agent), trust_remote_code, locks)
    return import_checked(_Loader(finder, target, check_arch).check(wanted))


def check_kernel(wanted: Wanted, target: Target, finder: Finder) -> Checked:
    """Put a kernel and those that it uses on the disk and check them; none of their code is run.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: As for `get_kernel`.
    """
    return _Loader(finder, target).check(wanted)


def check_local_kernel(path: Path, target: Target, finder: Finder, shown: str) -> Checked:
    """Check a kernel at an absolute path, and those that it uses; none of their code is run.

    Args:
        path: A kernel repository, its ``build/``, or one variant in it.
        target: The device that the kernel is for.
        finder: Finds the kernels on the Hub that this one uses.
        shown: The path as errors and reports show it.

    Raises:
        FileNotFoundError, ValueError, ImportError: As for `get_local_kernel`.
    """
    return _Loader(finder, target).check_local(path, shown)


def load_from_disk(
    path: Path,
    target: Target,
    *,
    shown: str,
    package_name: str | None = None,
    trust_remote_code: Trust = False,
    user_agent: _UserAgent = None,
) -> ModuleType:
    """Do the work of `get_local_kernel` for an absolute path and a known device.

    Errors and reports show the path as ``shown``.

    Raises:
        FileNotFoundError, ValueError, ImportError: As for `get_local_kernel`.
    """
    loader = _Loader(Finder(Hub(user_agent), trust_remote_code), target)
    return import_checked(loader.check_local(path, shown, package_name=package_name))


def _target(backend: str | None) -> Target:
    return default_target() if backend is None else target_of(backend)


@dataclass(frozen=True)
class _Loader:
    """One load of a kernel and of those that it uses; ``above`` are the kernels that use it."""

    finder: Finder
    target: Target
    check_arch: bool = True

    def check(self, wanted: Wanted, above: tuple[Wanted, ...] = ()) -> Checked:
        """Put the kernel and those that it uses on the disk and check them, without running any."""
        above = below(above, wanted)
        if (local := self.finder.override(wanted)) is not None:
            return self.check_local(local, str(local), above)
        found = self.finder.find(wanted)
        variant = self.finder.best(found, self.target.type)
        fetched = self.finder.fetch(found, variant)
        return check_variant(
            fetched.directory,
            self.target,
            repository=wanted.repo_id,
            name=wanted.repo_id.rpartition("/")[2],
            revision=found.kernel.commit,
            check_arch=self.check_arch,
            sha256=fetched.sha256,
            dependency=lambda used: self.check(used, above),
        )

    def check_local(
        self,
        path: Path,
        shown: str,
        above: tuple[Wanted, ...] = (),
        package_name: str | None = None,
    ) -> Checked:
        """Check a kernel on this machine, and those that it uses, without running any."""
        directory = variant_at(path, self.target, shown)
        build = directory.parent
        return check_variant(
            directory,
            self.target,
            repository=shown,
            name=build.parent.name if build.name == "build" else build.name,
            package_name=package_name,
            check_arch=self.check_arch,
            dependency=lambda used: self.check(used, above),
        )

    def fits(self, wanted: Wanted, above: tuple[Wanted, ...] = ()) -> bool:
        """Whether there is a build that fits, by the variants' names and the metadata."""
        above = below(above, wanted)
        if (local := self.finder.override(wanted)) is not None:
            metadata = read_metadata(variant_at(local, self.target, str(local)))
        else:
            found = self.finder.find(wanted)
            variant = self.finder.best(found, self.target.type)
            metadata, _ = read_remote_metadata(
                self.finder.hub, found.kernel, variant, found.variants[variant]
            )
        if self.check_arch:
            try:
                check_archs(metadata, self.target, gfx_of(self.target))
            except ValueError:
                return False
        return all(self.fits(used, above) for used in metadata.kernel_depends)
