"""Checks of kernels that run none of their code: which builds fit, and whether files are intact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kernelgraph.builds import (
    METADATA,
    UNLISTED,
    System,
    Wanted,
    below,
    builds_at,
    choose,
    digest_files,
    read_metadata,
    verify,
)
from kernelgraph.hub import (
    Finder,
    Hub,
    Lock,
    Locks,
    Resolved,
    content_digest,
    find_damage,
    list_build,
    resolve,
)


@dataclass(frozen=True)
class Fit:
    """Whether a variant fits a system."""

    variant: str
    fits: bool
    why: str
    """Why it does not fit; or ``best`` for the first of those that do."""


def fits(names: Iterable[str], system: System) -> list[Fit]:
    """Check which variants fit a system: those that do, the best first, and then the others."""
    choice = choose(names, system)
    found = [Fit(name, True, "best" if i == 0 else "") for i, name in enumerate(choice.fitting)]
    return found + [Fit(refusal.name, False, refusal.why) for refusal in choice.refused]


def download_with_dependencies(
    finder: Finder,
    wanted: Wanted,
    backend: str | None,
    above: tuple[Wanted, ...] = (),
) -> Iterator[tuple[Wanted, str, Path]]:
    """Download a kernel and those that it uses, without importing any.

    Args:
        finder: Finds and fetches the builds.
        wanted: The kernel.
        backend: The device type that the kernels are for; None for every variant.
        above: The kernels that use it.

    Yields:
        The kernel, the variant, and its directory, for each variant.

    Raises:
        FileNotFoundError, ValueError, OSError: As `Finder` raises, and where the files of a build
            are not those that its metadata lists.
    """
    above = below(above, wanted)
    found = finder.find(wanted)
    names = sorted(found.variants) if backend is None else [finder.best(found, backend)]
    used: dict[Wanted, None] = {}
    for variant in names:
        fetched = finder.fetch(found, variant)
        metadata = read_metadata(fetched.directory)
        files = {name: digest for name, digest in fetched.sha256.items() if name not in UNLISTED}
        verify(fetched.directory, metadata, files)
        used |= dict.fromkeys(metadata.kernel_depends)
        yield wanted, variant, fetched.directory
    for dependency in used:
        yield from download_with_dependencies(finder, dependency, backend, above)


@dataclass(frozen=True)
class Verified:
    """The result of checking one variant."""

    repository: str
    revision: str
    variant: str
    problem: str = ""
    """The first problem with the files; empty if there is none."""
    by: str = ""
    """The lists that the files agree with: the Hub's ``listing``, the ``lock``, and the ``digest``
    in the variant's own metadata."""


def verify_on_disk(path: Path, shown: str) -> Iterator[Verified]:
    """Compare the files of each variant of a repository on this machine with its metadata.

    Raises:
        FileNotFoundError: If there is no repository.
    """
    for directory in builds_at(path, shown):
        yield _verified(directory, shown, "", "")


def verify_in_cache(hub: Hub, wanted: Wanted, locks: Locks | None = None) -> Iterator[Verified]:
    """Compare each variant of a kernel in the cache with the Hub's listing, the lock and itself.

    No code is downloaded, and no file is repaired.

    Raises:
        FileNotFoundError, ValueError, OSError: As `resolve` raises, and if ``locks`` do not lock
            the kernel.
    """
    lock = locks.get(wanted) if locks else None
    kernel = resolve(hub, Wanted(wanted.repo_id, lock.commit) if lock else wanted)
    build = hub.snapshot(kernel) / "build"
    # Some directories have only the metadata, which ``info`` and ``lock`` download of each variant.
    names = [
        path.name
        for path in (sorted(build.iterdir()) if build.is_dir() else ())
        if not path.is_dir() or [inside.name for inside in path.iterdir()] != [METADATA]
    ]
    if not names:
        yield Verified(wanted.repo_id, kernel.commit, "", "no file of it is in the cache")
        return
    for name in names:
        problem, by = _compared_with_hub(hub, kernel, build / name, lock)
        yield _verified(build / name, wanted.repo_id, kernel.commit, by, problem)


def _compared_with_hub(
    hub: Hub, kernel: Resolved, directory: Path, lock: Lock | None
) -> tuple[str, str]:
    """The `Verified.problem` and `Verified.by` of comparing a variant with the listing and lock."""
    variants = list_build(hub, kernel)
    files = variants.get(directory.name)
    if files is None:
        return "the Hub lists no such variant", ""
    damage, sha256 = find_damage(directory, files)
    if damage:
        return f"not as the Hub lists it: {damage}", ""
    if not files:
        return "", ""
    if lock is None or not lock.digests:
        return "", "listing"
    if dict(lock.digests).get(directory.name) != content_digest(files, sha256):
        return "not the content that is locked", ""
    return "", "listing, lock"


def _verified(
    directory: Path, repository: str, revision: str, by: str, problem: str = ""
) -> Verified:
    """The result for a variant; where no problem is known yet, it is compared with its digests."""
    if not problem:
        try:
            metadata = read_metadata(directory)
            verify(directory, metadata, digest_files(directory))
            by = ", ".join(filter(None, [by, "digest" if metadata.digest else ""]))
            problem = "" if by else "nothing to compare its files with"
        except (ValueError, OSError) as error:
            problem = str(error)
    return Verified(repository, revision, directory.name, problem, by)
