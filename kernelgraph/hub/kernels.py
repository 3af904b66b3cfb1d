"""From what is wanted to an imported kernel: find, fetch, check, then import."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

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
from kernelgraph.hub.trust import Trust, allowed
from kernelgraph.selection import Target, target_of

_UserAgent = str | Mapping[str, str] | None


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
        backend: The device type that the kernel is for; by default the accelerator that torch
            can use here, or else cpu.
        user_agent: What to add to the user agent of each request.
        trust_remote_code: Whether the repository's code may be run where the Hub does not call
            its owner a trusted publisher: True, or a list of the repository ids that are trusted.
        check_arch: Whether a build that was compiled for other devices is refused.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is malformed, nobody vouches for the repository, no version fits,
            the build is for other devices or is not what its metadata or the Hub says.
        FileNotFoundError: There is no such repository or revision, or no variant that fits; the
            message says why each was refused.
        OSError: The Hub could not be asked; the message names the repository.
        ImportError: The kernel's own code failed, or a package that it needs is missing.
    """
    return load(
        Wanted(repo_id, revision, version),
        _target(backend),
        trust_remote_code=allowed(trust_remote_code),
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

    The same content is imported once, wherever it lies; changed content is imported anew, and
    what was imported before stays as it was.

    Args:
        repo_path: A kernel repository, its ``build/``, or one variant in it.
        backend: As for `get_kernel`.
        package_name: The package in the variant, where the variant is not itself a package; by
            default the name in its metadata, or that of the only package there.
        trust_remote_code: As for `get_kernel`, for the kernels on the Hub that this one uses.
        user_agent: As for `get_kernel`.

    Raises:
        FileNotFoundError: ``repo_path`` is no kernel repository, or has no variant that fits; the
            message says why each was refused.
        ValueError: There is no such backend, the metadata cannot be understood, a file does not
            match the digest, or the build is for other devices.
        ImportError: The kernel's own code failed, or a package that it needs is missing.
    """
    path = Path(os.path.abspath(os.path.expanduser(repo_path)))
    return load_from_disk(
        path,
        _target(backend),
        shown=str(repo_path),
        package_name=package_name,
        trust_remote_code=allowed(trust_remote_code),
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

    Raises:
        FileNotFoundError: Also, there is no such lock file.
        ValueError: Also, the lock file cannot be understood or has no such repository, or the
            build is not the one that was locked.
        TypeError, OSError, ImportError: As for `get_kernel`.
    """
    check_repo_id("repo_id", repo_id)
    locks = find_locks(lockfile)
    return load(
        locks.of(repo_id).wanted,
        default_target(),
        trust_remote_code=allowed(trust_remote_code),
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

    The kernels that it uses have to have one too.

    Args:
        repo_id, revision, version, backend, trust_remote_code, check_arch: As for `get_kernel`.

    Raises:
        TypeError, ValueError, OSError: As for `get_kernel`, but where there is no such repository
            or revision, or no build that fits, the answer is False.
    """
    wanted = Wanted(repo_id, revision, version)
    finder = Finder(Hub(), allowed(trust_remote_code))
    loader = _Loader(finder, _target(backend), check_arch)
    try:
        return loader.fits(wanted)
    except FileNotFoundError:
        return False


def load(
    wanted: Wanted,
    target: Target,
    *,
    trust_remote_code: Trust,
    check_arch: bool = True,
    locks: Locks | None = None,
    user_agent: _UserAgent = None,
) -> ModuleType:
    """`get_kernel`, or with ``locks`` `get_locked_kernel`, for a known device.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: As for them.
    """
    if wanted.revision is None and wanted.version is None and locks is None:
        warnings.warn(
            f"{wanted.repo_id} is loaded from its branch main, which may change at any time: "
            'pass a version, such as version=1 or version=">=0.1,<0.2", or a revision',
            stacklevel=3,
        )
    finder = Finder(Hub(user_agent), trust_remote_code, locks)
    return import_checked(_Loader(finder, target, check_arch).check(wanted))


def check(wanted: Wanted, target: Target, finder: Finder) -> Checked:
    """Have a kernel and those that it uses on the disk, checked, and nothing of them run.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: As for `get_kernel`.
    """
    return _Loader(finder, target).check(wanted)


def check_on_disk(path: Path, target: Target, finder: Finder, shown: str) -> Checked:
    """The same for a kernel on this machine, at an absolute path; ``shown`` is for people.

    Raises:
        FileNotFoundError, ValueError, ImportError: As for `get_local_kernel`.
    """
    return _Loader(finder, target).check_on_disk(path, shown)


def load_from_disk(
    path: Path,
    target: Target,
    *,
    shown: str,
    package_name: str | None = None,
    trust_remote_code: Trust = False,
    user_agent: _UserAgent = None,
) -> ModuleType:
    """`get_local_kernel` for an absolute path and a known device; ``shown`` is for people.

    Raises:
        FileNotFoundError, ValueError, ImportError: As for `get_local_kernel`.
    """
    loader = _Loader(Finder(Hub(user_agent), trust_remote_code), target)
    return import_checked(loader.check_on_disk(path, shown, package_name=package_name))


def _target(backend: str | None) -> Target:
    return default_target() if backend is None else target_of(backend)


@dataclass(frozen=True)
class _Loader:
    """One load: a kernel, and those that it uses."""

    finder: Finder
    target: Target
    check_arch: bool = True

    def check(self, wanted: Wanted, above: tuple[Wanted, ...] = ()) -> Checked:
        """Have the kernel and those that it uses on the disk, checked, and nothing of them run."""
        above = below(above, wanted)
        if (local := self.finder.override(wanted)) is not None:
            return self.check_on_disk(local, str(local), above)
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

    def check_on_disk(
        self,
        path: Path,
        shown: str,
        above: tuple[Wanted, ...] = (),
        package_name: str | None = None,
    ) -> Checked:
        """The same for a kernel on this machine."""
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
        """Whether there is a build, judging by names and metadata."""
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
