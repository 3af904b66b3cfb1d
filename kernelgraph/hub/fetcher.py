"""From a commit to the files of one variant on the disk, each as the Hub lists it.

The Hub's listing of a commit has a hash of each file: git's own, or the sha256 of a file in git's
large file storage. `huggingface_hub` keeps the listing in the cache, beside the files. So every
load notices a file that was damaged on its way or in the cache, also in builds whose metadata has
no digest. A damaged variant is downloaded again where the Hub can be reached. The digest in the
metadata is a separate check: `kernelgraph.builds.check_variant` makes it for every build.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kernelgraph.builds import (
    METADATA,
    Metadata,
    encoded_digest,
    files_in,
    is_bytecode,
    leads_out,
    read_metadata,
)
from kernelgraph.hub.client import Hub, Resolved, asking

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

_BYTECODE = ["*/__pycache__/*", "*.pyc", "*.pyo"]
_ATTEMPTS = 3
"""How many times a variant is downloaded until it is as listed."""


# --- the listing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """The content of one file, as the Hub lists it."""

    git_id: str
    sha256: str | None
    """In hex, for files in git's large file storage."""


Files: TypeAlias = Mapping[str, Blob]
"""The files of one variant by relative path, without bytecode; empty where they are not known."""


# A commit's listing never changes, and in a large repository it is long.
_listings: dict[Path, Mapping[str, Files]] = {}


def list_build(hub: Hub, kernel: Resolved, *, refresh: bool = False) -> Mapping[str, Files]:
    """List the files of each variant of a commit, from the cache if it has the listing.

    Offline and without a listing in the cache, the variants are the directories on the disk, and
    their files are not known.

    Args:
        hub: The Hub and the cache.
        kernel: The commit.
        refresh: Whether to ask the Hub even if the cache has the listing.

    Raises:
        ValueError: A path in the listing leads out of its directory.
        OSError: The Hub could not be asked.
    """
    snapshot = hub.snapshot(kernel)
    if refresh or snapshot not in _listings:
        entries = None if refresh else _cached_listing(hub, kernel)
        if entries is None:
            if hub.offline and (build := snapshot / "build").is_dir():
                return {path.name: {} for path in build.iterdir() if path.is_dir()}
            entries = _ask_for_listing(hub, kernel)
        _listings[snapshot] = _by_variant(kernel, entries)
    return _listings[snapshot]


def _cached_listing(hub: Hub, kernel: Resolved) -> Iterable[RepoFile] | None:
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return get_cached_repo_tree(
            kernel.repo_id,
            repo_type=kernel.repo_type,
            revision=kernel.commit,
            cache_dir=hub.cache,
        )
    except CachedRepoTreeNotFoundError:
        return None


def _ask_for_listing(hub: Hub, kernel: Resolved) -> Iterable[RepoFile]:
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    with asking(kernel.repo_id):
        # If the Hub cannot be reached, some versions of the client repeat the request for a
        # listing for 20 seconds and more; this request fails at once.
        hub.api.repo_info(kernel.repo_id, repo_type=kernel.repo_type, revision=kernel.commit)
        try:
            listed = hub.api.list_repo_tree(
                kernel.repo_id,
                "build",
                recursive=True,
                repo_type=kernel.repo_type,
                revision=kernel.commit,
            )
            return [entry for entry in listed if isinstance(entry, RepoFile)]
        except EntryNotFoundError:
            return []


def _by_variant(kernel: Resolved, entries: Iterable[RepoFile]) -> Mapping[str, Files]:
    variants: dict[str, dict[str, Blob]] = {}
    for entry in entries:
        root, _, path = entry.path.partition("/")
        variant, _, name = path.partition("/")
        if root != "build" or not name or is_bytecode(name):
            continue
        if leads_out(path):
            raise ValueError(f"{kernel}: {entry.path} is no path inside its build/")
        sha256 = entry.lfs.sha256 if entry.lfs else None
        variants.setdefault(variant, {})[name] = Blob(entry.blob_id, sha256)
    return variants


def read_remote_metadata(
    hub: Hub, kernel: Resolved, variant: str, files: Files
) -> tuple[Metadata, str | None]:
    """Read the metadata of one variant without downloading the rest of the variant.

    Returns:
        The metadata, and the base64 sha256 of its file; None for a variant without metadata.

    Raises:
        ValueError: The metadata cannot be understood.
        OSError: The Hub could not be asked.
    """
    if files and METADATA not in files:
        return Metadata(), None
    with asking(kernel.repo_id):
        path = hub.api.hf_hub_download(
            kernel.repo_id,
            f"build/{variant}/{METADATA}",
            repo_type=kernel.repo_type,
            revision=kernel.commit,
            cache_dir=hub.cache,
        )
    return read_metadata(Path(path).parent), encoded_digest(Path(path))


def content_digest(files: Files, sha256: Mapping[str, str]) -> str:
    """Compute the digest that a lock file has for a variant; no code is downloaded for it.

    It covers the listed hash of each file, and in place of the metadata's listed hash its sha256.
    So it covers the sha256 of every file if the metadata has a digest.

    Args:
        files: The listing.
        sha256: Base64 digests by relative path; only that of the metadata is used.
    """
    lines = []
    for name, blob in sorted(files.items()):
        known = sha256.get(name) if name == METADATA else None
        lines.append(f"{name}\0{known or blob.sha256 or blob.git_id}\n")
    return f"sha256-{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


# --- the files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fetched:
    """A variant whose files are in the cache, each as the Hub lists it."""

    directory: Path
    sha256: Mapping[str, str]
    """The base64 digest of every file in the directory, by relative path."""
    files: Files
    """The listing that the files were compared with."""


def fetch(hub: Hub, kernel: Resolved, variant: str, files: Files) -> Fetched:
    """Put the files of a variant into the cache, each as it is listed.

    A variant that is whole is only read. Missing files are downloaded, and a variant with a damaged
    file is downloaded again.

    Raises:
        ValueError: The Hub serves another content than it lists, or no longer lists the variant;
            the message names the files.
        OSError: Files are missing or damaged, and the Hub could not be asked for them.
    """
    directory = hub.snapshot(kernel) / "build" / variant
    damage, sha256 = find_damage(directory, files)
    if not damage:
        return Fetched(directory, sha256, files)
    with _repository_lock(hub.storage(kernel.repo_id, kernel.repo_type)):
        return _repair(hub, kernel, variant, files)


def _repair(hub: Hub, kernel: Resolved, variant: str, files: Files) -> Fetched:
    """Download a variant until it is as listed."""
    where = f"{kernel}, variant {variant}"
    directory = hub.snapshot(kernel) / "build" / variant
    for attempt in range(_ATTEMPTS + 1):
        damage, sha256 = find_damage(directory, files)  # another process may have repaired it
        if not damage:
            return Fetched(directory, sha256, files)
        if hub.offline:
            raise OSError(
                f"{where}: cannot be loaded from the cache while offline ({damage}): load it once "
                "with network access"
            )
        if attempt == _ATTEMPTS:
            raise ValueError(f"{where}: what was downloaded is not what the Hub lists: {damage}")
        try:
            if not damage.only_missing:  # the listing in the cache may be what is damaged
                files = _list_again(hub, kernel, variant)
                damage, _ = find_damage(directory, files)
            if not damage.only_missing:
                _remove(hub, kernel, directory)
            _download(hub, kernel, variant, force=bool(damage.changed))
        except OSError as error:
            raise OSError(f"{error} (the cached copy of {where} is not whole: {damage})") from error
    raise AssertionError("unreachable")


def _list_again(hub: Hub, kernel: Resolved, variant: str) -> Files:
    """The files of a variant as the Hub lists them now, in place of the listing in the cache."""
    variants = list_build(hub, kernel, refresh=True)
    if variant not in variants:
        raise ValueError(f"{kernel}, variant {variant}: the Hub does not list it any more")
    listing = hub.storage(kernel.repo_id, kernel.repo_type) / "trees" / f"{kernel.commit}.json"
    _check_deletion(hub, kernel, listing)
    listing.unlink(missing_ok=True)
    return variants[variant]


def _remove(hub: Hub, kernel: Resolved, directory: Path) -> None:
    """Remove a variant's directory from the cache, with the links in it but not their targets.

    The client's downloads then link to the contents in the cache, or with ``force`` replace them.
    """
    _check_deletion(hub, kernel, directory)
    if directory.is_symlink() or directory.is_file():
        directory.unlink()
    else:
        shutil.rmtree(directory, ignore_errors=True)  # if it fails, so does the download


def _check_deletion(hub: Hub, kernel: Resolved, path: Path) -> None:
    """Refuse to delete ``path`` if a link on the way to it leads elsewhere.

    The repository's own folder in the cache may be a link, to another disk for instance.

    Raises:
        OSError: There is such a link.
    """
    storage, folder = hub.storage(kernel.repo_id, kernel.repo_type), path.parent
    if folder.resolve() != storage.resolve() / folder.relative_to(storage):
        raise OSError(
            f"{kernel.repo_id}: {folder} leads out of the cache, where nothing is deleted: remove "
            "the link and load the kernel again"
        )


def _download(hub: Hub, kernel: Resolved, variant: str, *, force: bool) -> None:
    """Download the files of a variant that it lacks; with ``force`` all of them."""
    with asking(kernel.repo_id):
        hub.api.snapshot_download(
            kernel.repo_id,
            repo_type=kernel.repo_type,
            revision=kernel.commit,
            cache_dir=hub.cache,
            allow_patterns=[f"build/{glob.escape(variant)}/*"],
            ignore_patterns=_BYTECODE,
            force_download=force,
        )


@contextlib.contextmanager
def _repository_lock(storage: Path) -> Iterator[None]:
    """Let one process at a time download or repair files of a repository in a shared cache."""
    from filelock import FileLock

    # On a file system without locks two processes may do the same work twice; the client still
    # puts each downloaded file in its place whole.
    lock = None
    with contextlib.suppress(OSError, NotImplementedError):
        folder = storage.parent / ".locks" / storage.name
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "kernelgraph.lock")
        lock.acquire()
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


# --- damage ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """The differences between the files on the disk and the listed ones; false without any."""

    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    unreadable: str = ""
    """Why the directory could not be read; then nothing else is known."""

    def __bool__(self) -> bool:
        return not self.only_missing or bool(self.missing)

    @property
    def only_missing(self) -> bool:
        """Whether all files on the disk are as listed."""
        return not (self.changed or self.unlisted or self.unreadable)

    def __str__(self) -> str:
        groups = {"missing": self.missing, "changed": self.changed, "not listed": self.unlisted}
        shown = [f"{group}: {', '.join(names)}" for group, names in groups.items() if names]
        return "; ".join([*shown, *filter(None, [self.unreadable])])


def find_damage(directory: Path, files: Files) -> tuple[Damage, Mapping[str, str]]:
    """Compare a variant on the disk with its listing.

    Returns:
        The damage, and the base64 sha256 of each file by relative path.
    """
    if directory.is_symlink():
        return Damage(unreadable=f"{directory.name} is a link"), {}
    if not directory.is_dir():
        if directory.exists():
            return Damage(unreadable=f"{directory.name} is no directory"), {}
        return Damage(missing=tuple(sorted(files)) or (directory.name,)), {}
    sha256, changed = {}, []
    try:
        for name, path in files_in(directory):
            sha256[name], same = _hash(path, files.get(name))
            if not same:
                changed.append(name)
    except (ValueError, OSError) as error:
        return Damage(unreadable=str(error)), {}
    if not files:  # nothing to compare with
        return Damage(), sha256
    missing, unlisted = files.keys() - sha256.keys(), sha256.keys() - files.keys()
    # A directory in the place of a file: the client would take it for the file.
    occupied = {name for name in missing if os.path.lexists(directory / name)}
    return Damage(
        missing=tuple(sorted(missing - occupied)),
        changed=tuple(sorted([*changed, *occupied])),
        unlisted=tuple(sorted(unlisted)),
    ), sha256


def _hash(path: Path, blob: Blob | None) -> tuple[str, bool]:
    """The base64 sha256 of a file, and whether the file is as listed; True if it is not listed."""
    if blob is None or blob.sha256 is not None:
        sha256 = encoded_digest(path)
        return sha256, blob is None or blob.sha256 == b64decode(sha256).hex()
    content = path.read_bytes()
    git_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return encoded_digest(content), git_id == blob.git_id
