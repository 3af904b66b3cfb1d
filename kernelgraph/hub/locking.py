"""Locking: a commit, and a digest of each variant, for a project's kernels and those they use."""

from __future__ import annotations

from collections.abc import Iterable

from kernelgraph.hub.client import Hub
from kernelgraph.hub.fetching import content_digest, list_build, read_remote_metadata
from kernelgraph.hub.lockfile import Lock, Locks
from kernelgraph.hub.metadata import METADATA
from kernelgraph.hub.resolving import resolve
from kernelgraph.hub.revisions import Wanted, below


def lock(hub: Hub, dependencies: Iterable[Wanted]) -> Locks:
    """Lock what a project depends on, and, after that, the kernels that those use.

    Of the files only each variant's metadata is downloaded. Every variant is locked, whatever
    system this one is.

    Raises:
        FileNotFoundError: There is no such repository or revision.
        ValueError: No version fits, metadata cannot be understood, or kernels use each other.
        OSError: The Hub could not be asked.
    """
    dependencies = tuple(dependencies)
    found: dict[Wanted, Lock] = {}
    for wanted in dependencies:
        _lock(hub, wanted, (), found)
    order = [*dependencies, *(wanted for wanted in found if wanted not in dependencies)]
    return Locks(tuple(found[wanted] for wanted in order))


def _lock(hub: Hub, wanted: Wanted, above: tuple[Wanted, ...], found: dict[Wanted, Lock]) -> None:
    above = below(above, wanted)
    if wanted in found:
        return
    kernel = resolve(hub, wanted, anew=True)
    digests = []
    used: dict[Wanted, None] = {}
    for variant, files in sorted(list_build(hub, kernel).items()):
        if not files:
            raise OSError(f"{kernel}: cannot be locked without the Hub, only read from the cache")
        metadata, sha256 = read_remote_metadata(hub, kernel, variant, files)
        digests.append((variant, content_digest(files, {METADATA: sha256} if sha256 else {})))
        used |= dict.fromkeys(metadata.kernel_depends)
    found[wanted] = Lock(wanted, kernel.commit, tuple(digests))
    for dependency in used:
        _lock(hub, dependency, above, found)
