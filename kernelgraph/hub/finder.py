"""Finding a kernel that may be run: its commit, who vouches for it, and the variant that fits.

Every path from a repository id to files goes through here: loading, downloading, verifying.
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
"""How many of the newest versions are looked at for a build that fits, at one request each."""


@dataclass(frozen=True)
class Found:
    """One commit of a repository, whose code may be run, and the files of its variants."""

    wanted: Wanted
    kernel: Resolved
    variants: Mapping[str, Files]


@dataclass(frozen=True)
class Finder:
    """How kernels are found.

    Args:
        hub: The Hub, and the cache.
        trust_remote_code: What the user vouches for.
        locks: Where only what is locked counts, that.
    """

    hub: Hub
    trust_remote_code: Trust = False
    locks: Locks | None = None

    def override(self, wanted: Wanted) -> Path | None:
        """What ``LOCAL_KERNELS`` has in the place of a repository; nothing overrides a lock.

        Raises:
            ValueError: The setting is malformed.
        """
        path = local_kernels().get(wanted.repo_id) if self.locks is None else None
        if path is not None:
            _logger.info("%s is taken from %s, as LOCAL_KERNELS says", wanted.repo_id, path)
        return path

    def find(self, wanted: Wanted) -> Found:
        """Resolve, ask for trust, and list the variants; no code is downloaded.

        Raises:
            FileNotFoundError: There is no such repository or revision.
            ValueError: No version fits, it is not locked, or nobody vouches for it.
            OSError: The Hub could not be asked.
        """
        pinned = wanted
        if self.locks is not None:
            pinned = Wanted(wanted.repo_id, self.locks.get(wanted).commit)
        kernel = resolve(self.hub, pinned)
        check_trust(self.hub, kernel, self.trust_remote_code)
        return Found(wanted, kernel, list_build(self.hub, kernel))

    def best(self, found: Found, backend: str) -> str:
        """The variant that fits best.

        Raises:
            FileNotFoundError: None fits; the message says why each does not, and which later
                version has one.
        """
        system = System.detect(backend)
        choice = choose(found.variants, system)
        if choice.best is not None:
            return choice.best
        error = no_variant(str(found.kernel), choice, system)
        later = None if self.locks else self._later_version(found, system)
        raise FileNotFoundError(f"{error}\n{later}") if later else error

    def fetch(self, found: Found, variant: str) -> Fetched:
        """Have a variant in the cache, as it is listed and locked.

        Raises:
            ValueError: It is not as listed, or not as locked.
            OSError: It could not be had from the Hub.
        """
        fetched = fetch(self.hub, found.kernel, variant, found.variants[variant])
        locked = dict(self.locks.get(found.wanted).digests) if self.locks else {}
        if not locked:  # also a file of the `kernels` package's, which locks the commit alone
            return fetched
        assert self.locks is not None
        where = f"{found.wanted}, variant {variant}"
        if not fetched.files:
            raise OSError(
                f"{where}: what is in the cache cannot be held against {self.locks.source} "
                "without the Hub: load it once with the Hub in reach"
            )
        if locked.get(variant) != content_digest(fetched.files, fetched.sha256):
            raise ValueError(
                f"{where}: is not the content that {self.locks.source} has locked; if it is "
                "meant to be another, run `kernelgraph lock` again"
            )
        return fetched

    def _later_version(self, found: Found, system: System) -> str | None:
        """What to say of a later version that has a build for this system, if there is one."""
        try:
            versions = list_versions(self.hub, found.kernel.repo_id)
            for version in reversed(_later(versions, found)[-_LATER:]):
                best = choose(list_build(self.hub, version.commit), system).best
                if best is not None:
                    return f"its later version {version.name} has one that fits: {best}"
        except (OSError, ValueError) as error:  # never in the place of the error proper
            _logger.debug("%s: no later version could be looked for: %s", found.wanted, error)
        return None


def _later(versions: Sequence[PublishedVersion], found: Found) -> list[PublishedVersion]:
    """Those of ``versions`` that come after the one found, and are of its kind.

    Where what was found is none of them, such as the branch main, all of the branches; or of the
    tags, if there are no branches.
    """
    is_tag = found.wanted.bound is not None
    kinds = [[v for v in versions if v.is_tag == kind] for kind in (is_tag, not is_tag)]
    of_kind = kinds[0] or kinds[1]
    asked = [i for i, version in enumerate(of_kind) if version.commit == found.kernel]
    return of_kind[asked[-1] + 1 :] if asked else of_kind


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
