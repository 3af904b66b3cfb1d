"""From what is wanted to an imported kernel: resolve, trust, fetch, check, then import."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from kernelgraph.devices import Target, target_of
from kernelgraph.hub.client import Hub, Resolved
from kernelgraph.hub.fetching import (
    Fetched,
    Files,
    content_digest,
    fetch,
    list_build,
    read_remote_metadata,
)
from kernelgraph.hub.importing import Checked, import_checked
from kernelgraph.hub.loading import check_variant, default_target, variant_at
from kernelgraph.hub.lockfile import Locks, find_locks
from kernelgraph.hub.metadata import check_archs, gfx_of, read_metadata
from kernelgraph.hub.resolving import list_versions, resolve
from kernelgraph.hub.revisions import Wanted, below, check_repo_id
from kernelgraph.hub.trust import Trust, allowed, check_trust
from kernelgraph.hub.variants import System, choose, no_variant

_logger = logging.getLogger("kernelgraph")
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
    loader = _Loader(_target(backend), allowed(trust_remote_code), check_arch=check_arch)
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
    loader = _Loader(target, trust_remote_code, check_arch, locks, Hub(user_agent))
    return import_checked(loader.check(wanted))


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
    loader = _Loader(target, trust_remote_code, hub=Hub(user_agent))
    return import_checked(loader.check_on_disk(path, shown, package_name=package_name))


def local_kernels() -> dict[str, Path]:
    """The repositories that ``LOCAL_KERNELS`` overrides: ``org/a=/path:org/b=/path``.

    Raises:
        ValueError: It is malformed.
    """
    setting = os.environ.get("LOCAL_KERNELS", "")
    overrides = {}
    # A path may have colons in it, so an entry ends where the next one begins.
    for entry in re.split(r":(?=[^:=/]+/[^:=/]+=)", setting) if setting else []:
        repo_id, separator, path = entry.partition("=")
        try:
            check_repo_id("LOCAL_KERNELS", repo_id)
        except ValueError:
            separator = ""
        if not separator or not path:
            raise ValueError(f"LOCAL_KERNELS: expected owner/name=path, got {entry!r}")
        overrides[repo_id] = Path(os.path.abspath(os.path.expanduser(path)))
    return overrides


def _target(backend: str | None) -> Target:
    return default_target() if backend is None else target_of(backend)


@dataclass(frozen=True)
class _Loader:
    """One load: a kernel, and those that it uses."""

    target: Target
    trust_remote_code: Trust
    check_arch: bool = True
    locks: Locks | None = None
    hub: Hub = field(default_factory=Hub)

    def check(self, wanted: Wanted, above: tuple[Wanted, ...] = ()) -> Checked:
        """Have the kernel and those that it uses on the disk, checked, and nothing of them run."""
        above = below(above, wanted)
        if (local := self._override(wanted)) is not None:
            return self.check_on_disk(local, str(local), above)
        kernel, variant, files = self._find(wanted)
        fetched = fetch(self.hub, kernel, variant, files)
        if self.locks is not None:
            self._check_lock(wanted, variant, files, fetched)
        return check_variant(
            fetched.directory,
            self.target,
            repository=wanted.repo_id,
            name=wanted.repo_id.rpartition("/")[2],
            revision=kernel.commit,
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

    def _check_lock(self, wanted: Wanted, variant: str, files: Files, fetched: Fetched) -> None:
        assert self.locks is not None
        digests = dict(self.locks.get(wanted).digests)
        if not digests:  # a file of the `kernels` package's; the commit alone is locked
            return
        if not files:
            raise OSError(
                f"{wanted}, variant {variant}: what is in the cache cannot be held against "
                f"{self.locks.source} without the Hub: load it once with the Hub in reach"
            )
        if digests.get(variant) != content_digest(files, fetched.sha256):
            raise ValueError(
                f"{wanted}, variant {variant}: is not the content that {self.locks.source} has "
                "locked; if it is meant to be another, run `kernelgraph lock` again"
            )

    def fits(self, wanted: Wanted, above: tuple[Wanted, ...] = ()) -> bool:
        """Whether there is a build, judging by names and metadata."""
        above = below(above, wanted)
        if (local := self._override(wanted)) is not None:
            metadata = read_metadata(variant_at(local, self.target, str(local)))
        else:
            kernel, variant, files = self._find(wanted)
            metadata, _ = read_remote_metadata(self.hub, kernel, variant, files)
        if self.check_arch:
            try:
                check_archs(metadata, self.target, gfx_of(self.target))
            except ValueError:
                return False
        return all(self.fits(used, above) for used in metadata.kernel_depends)

    def _override(self, wanted: Wanted) -> Path | None:
        path = local_kernels().get(wanted.repo_id) if self.locks is None else None
        if path is not None:
            _logger.info("%s is taken from %s, as LOCAL_KERNELS says", wanted.repo_id, path)
        return path

    def _find(self, wanted: Wanted) -> tuple[Resolved, str, Files]:
        """The commit, the variant that fits best, and its files; all of it may be run."""
        hub = self.hub
        if self.locks is None:
            kernel = resolve(hub, wanted)
        else:
            kernel = resolve(hub, Wanted(wanted.repo_id, self.locks.get(wanted).commit))
        check_trust(hub, kernel, self.trust_remote_code)
        variants = list_build(hub, kernel)
        system = System.detect(self.target.type)
        choice = choose(variants, system)
        if choice.best is None:
            error = no_variant(str(kernel), choice, system)
            later = None if self.locks else _later_version(hub, wanted, kernel, system)
            raise FileNotFoundError(f"{error}\n{later}") if later else error
        return kernel, choice.best, variants[choice.best]


def _later_version(hub: Hub, wanted: Wanted, kernel: Resolved, system: System) -> str | None:
    """What to say of a later version that has a build for this system, if there is one."""
    try:
        versions = list_versions(hub, wanted.repo_id)
        asked = [i for i, version in enumerate(versions) if version.commit == kernel]
        later = versions[asked[-1] + 1 :] if asked else versions
        for version in reversed(later[-_LATER:]):
            best = choose(list_build(hub, version.commit), system).best
            if best is not None:
                return f"its later version {version.name} has one that fits: {best}"
    except (OSError, ValueError) as error:  # never in the place of the error proper
        _logger.debug("%s: no later version could be looked for: %s", wanted, error)
    return None


_LATER = 4
"""How many of the newest versions are looked at, at one request each."""
