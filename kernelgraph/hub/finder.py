"""The way from a wanted repository to files that may be run: commit, trust, variant, download.

Loading, downloading and checking a kernel all go through `Finder`, so none can skip a step.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernelgraph.builds import System, Wanted, check_repo_id, choose, no_variant
from kernelgraph.hub.client import Hub, Resolved
from kernelgraph.hub.fetcher import Fetched, Files, content_digest, fetch, list_build
from kernelgraph.hub.lockfile import Locks
from kernelgraph.hub.resolver import PublishedVersion, list_versions, resolve
from kernelgraph.hub.trust import Trust, check_trust

_logger = logging.getLogger("kernelgraph")

_LATER = 4
"""How many of the newest versions are searched for a build that fits; each costs one request."""


@dataclass(frozen=True)
class Found:
    """One commit of a repository whose code may be run, with the files of its variants."""

    wanted: Wanted
    kernel: Resolved
    variants: Mapping[str, Files]


@dataclass(frozen=True)
class Finder:
    """Finds kernels under the settings of one load.

    Args:
        hub: The Hub and the cache.
        trust_remote_code: The repositories that the user trusts.
        locks: The lock file, if only locked commits and contents may be loaded.
    """

    hub: Hub
    trust_remote_code: Trust = False
    locks: Locks | None = None

    def override(self, wanted: Wanted) -> Path | None:
        """Find the path that ``LOCAL_KERNELS`` sets for a repository; nothing overrides a lock.

        Raises:
            ValueError: The setting is malformed.
        """
        path = local_kernels().get(wanted.repo_id) if self.locks is None else None
        if path is not None:
            _logger.info("%s is loaded from %s, as LOCAL_KERNELS says", wanted.repo_id, path)
        return path

    def find(self, wanted: Wanted) -> Found:
        """Resolve the commit, check trust, and list the variants; no code is downloaded.

        Raises:
            FileNotFoundError: There is no such repository or revision.
            ValueError: No version fits, the kernel is not locked, or its repository is not trusted.
            OSError: The Hub could not be asked.
        """
        pinned = wanted
        if self.locks is not None:
            pinned = Wanted(wanted.repo_id, self.locks.get(wanted).commit)
        kernel = resolve(self.hub, pinned)
        check_trust(self.hub, kernel, self.trust_remote_code)
        return Found(wanted, kernel, list_build(self.hub, kernel))

    def best(self, found: Found, backend: str) -> str:
        """Choose the variant that fits a device type best.

        Raises:
            FileNotFoundError: None fits; the message says why each does not, and which later
                version has one that does.
        """
        system = System.detect(backend)
        choice = choose(found.variants, system)
        if choice.best is not None:
            return choice.best
        error = no_variant(str(found.kernel), choice, system)
        later = None if self.locks else self._later_version(found, system)
        raise FileNotFoundError(f"{error}\n{later}") if later else error

    def fetch(self, found: Found, variant: str) -> Fetched:
        """Put a variant into the cache, and check it against the listing and the lock.

        Raises:
            ValueError: A file is not as listed, or the content is not as locked.
            OSError: A file is missing or damaged, and the Hub could not be asked for it.
        """
        fetched = fetch(self.hub, found.kernel, variant, found.variants[variant])
        locked = dict(self.locks.get(found.wanted).digests) if self.locks else {}
        if not locked:  # also with a lock file of the `kernels` package: it has only commits
            return fetched
        assert self.locks is not None
        where = f"{found.wanted}, variant {variant}"
        if not fetched.files:
            raise OSError(
                f"{where}: the cached files cannot be checked against {self.locks.source} while "
                "offline: load it once with network access"
            )
        if locked.get(variant) != content_digest(fetched.files, fetched.sha256):
            raise ValueError(
                f"{where}: is not the content that {self.locks.source} has locked; if it is "
                "meant to be another, run `kernelgraph lock` again"
            )
        return fetched

    def _later_version(self, found: Found, system: System) -> str | None:
        """A sentence about a later version that has a build for this system, if there is one."""
        try:
            versions = list_versions(self.hub, found.kernel.repo_id)
            for version in reversed(_later(versions, found)[-_LATER:]):
                best = choose(list_build(self.hub, version.commit), system).best
                if best is not None:
                    return f"its later version {version.name} has one that fits: {best}"
        except (OSError, ValueError) as error:  # the caller's own error says more
            _logger.debug("%s: later versions could not be searched: %s", found.wanted, error)
        return None


def _later(versions: Sequence[PublishedVersion], found: Found) -> list[PublishedVersion]:
    """The versions after the found one: tags if a specifier was given, else branches.

    If there are none of those, the others; all of them if the found commit is not a version, such
    as that of the branch main.
    """
    is_tag = found.wanted.bound is not None
    same = [version for version in versions if version.is_tag == is_tag]
    candidates = same or list(versions)
    positions = [i for i, version in enumerate(candidates) if version.commit == found.kernel]
    return candidates[positions[-1] + 1 :] if positions else candidates


def local_kernels() -> dict[str, Path]:
    """Read ``LOCAL_KERNELS``, which sets paths for repositories: ``org/a=/path:org/b=/path``.

    Raises:
        ValueError: The setting is malformed.
    """
    setting = os.environ.get("LOCAL_KERNELS", "")
    overrides = {}
    # A path may contain colons, so an entry ends where the next one begins.
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
