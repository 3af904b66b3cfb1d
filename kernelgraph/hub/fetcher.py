"""From a commit to the files of one variant on the disk, each as the Hub lists it.

The Hub's listing of a commit has the hash that git, or git's large file storage, knows each file
by; `huggingface_hub` keeps the listing beside the files. So a file that was damaged on its way or
in the cache is noticed, also in builds whose metadata has no digest, and replaced where the Hub
can be reached. The digest in the metadata is another matter: `loading` holds every build to it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import shutil
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelgraph.builds import (
    METADATA,
    Metadata,
    encoded_digest,
    files_in,
    is_bytecode,
    leaves,
    read_metadata,
)
from kernelgraph.hub.client import Hub, Resolved, asking

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

_BYTECODE = ["*/__pycache__/*", "*.pyc", "*.pyo"]
_ATTEMPTS = 3


@dataclass(frozen=True)
class Blob:
    """A file's content, as the Hub lists it."""

    git_id: str
    sha256: str | None
    """In hex, for files in git's large file storage."""


Files = Mapping[str, Blob]
"""The files of one variant, bytecode aside, by their paths in it."""


@dataclass(frozen=True)
class Fetched:
    """A variant whose files are in the cache, each as the Hub lists it."""

    directory: Path
    sha256: Mapping[str, str]
    """The base64 digest of every file there, by relative path."""
    files: Files
    """The listing that they were held against."""


# A commit's listing never changes, and in a large repository it is long.
_listings: dict[Path, Mapping[str, Files]] = {}


def list_build(hub: Hub, kernel: Resolved, *, anew: bool = False) -> Mapping[str, Files]:
    """The files of each variant of a commit, from the cache where an earlier load has listed them.

    Offline, and without a listing in the cache, the variants there are those on the disk, and
    nothing is known of their files.

    Raises:
        ValueError: A path in the listing leads out of its directory.
        OSError: The Hub could not be asked.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    snapshot = hub.snapshot(kernel)
    if anew or snapshot not in _listings:
        try:
            if anew:
                raise CachedRepoTreeNotFoundError
            entries: Iterable[RepoFile] = get_cached_repo_tree(
                kernel.repo_id,
                repo_type=kernel.repo_type,
                revision=kernel.commit,
                cache_dir=hub.cache,
            )
        except CachedRepoTreeNotFoundError:
            if hub.offline and (build := snapshot / "build").is_dir():
                return {path.name: {} for path in build.iterdir() if path.is_dir()}
            entries = _ask_for_listing(hub, kernel)
        _listings[snapshot] = _by_variant(kernel, entries)
    return _listings[snapshot]


def _ask_for_listing(hub: Hub, kernel: Resolved) -> list[RepoFile]:
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    where: dict[str, Any] = {"repo_type": kernel.repo_type, "revision": kernel.commit}
    with asking(kernel.repo_id):
        # Where the Hub cannot be reached, some versions of the client ask for a listing again and
        # again, for 20 seconds and more; and for this once.
        hub.api.repo_info(kernel.repo_id, **where)
        try:
            listed = hub.api.list_repo_tree(kernel.repo_id, "build", recursive=True, **where)
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
        if leaves(path):
            raise ValueError(f"{kernel}: {entry.path} is no path inside its build/")
        sha256 = entry.lfs.sha256 if entry.lfs else None
        variants.setdefault(variant, {})[name] = Blob(entry.blob_id, sha256)
    return variants


def read_remote_metadata(
    hub: Hub, kernel: Resolved, variant: str, files: Files
) -> tuple[Metadata, str | None]:
    """The metadata of one variant, without the rest of it; and its sha256, where it has any.

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
    """What a lock file holds for a variant: a digest that needs no code to be downloaded.

    It is made of the hash of each file by which the Hub lists it, and of the metadata's own
    sha256; so of the sha256 of every file, where the metadata has a digest.
    """
    lines = []
    for name, blob in sorted(files.items()):
        known = sha256.get(name) if name == METADATA else None
        lines.append(f"{name}\0{known or blob.sha256 or blob.git_id}\n")
    return f"sha256-{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def fetch(hub: Hub, kernel: Resolved, variant: str, files: Files) -> Fetched:
    """Have the files of a variant in the cache, each as it is listed; a whole one is only read.

    Raises:
        ValueError: A file in the cache is not what the Hub lists and could not be replaced, or
            the Hub serves another content than it lists; the message names the files.
        OSError: The Hub could not be asked, or not all files could be had.
    """
    directory = hub.snapshot(kernel) / "build" / variant
    damage, sha256 = compare(directory, files)
    if not damage:
        return Fetched(directory, sha256, files)
    with _alone(hub.storage(kernel.repo_id, kernel.repo_type)):
        return _mend(hub, kernel, variant, files)


def _mend(hub: Hub, kernel: Resolved, variant: str, files: Files) -> Fetched:
    """Download what is missing, and what is there but is not as listed."""
    where = f"{kernel}, variant {variant}"
    directory = hub.snapshot(kernel) / "build" / variant
    for attempt in range(_ATTEMPTS + 1):
        damage, sha256 = compare(directory, files)  # another process may have been faster
        if not damage:
            return Fetched(directory, sha256, files)
        if hub.offline:
            raise OSError(
                f"{where}: cannot be loaded from the cache without the Hub ({damage}): load it "
                "once with the Hub in reach"
            )
        if attempt == _ATTEMPTS:
            raise ValueError(f"{where}: what was downloaded is not what the Hub lists: {damage}")
        try:
            if not damage.only_missing:  # then it may as well be the listing that is damaged
                files = _list_anew(hub, kernel, variant)
                damage, _ = compare(directory, files)
            _replace(hub, kernel, directory, damage)
        except OSError as error:
            raise OSError(f"{error} (of {where} the cache is not whole: {damage})") from error
    raise AssertionError("unreachable")


def _list_anew(hub: Hub, kernel: Resolved, variant: str) -> Files:
    variants = list_build(hub, kernel, anew=True)
    if variant not in variants:
        raise ValueError(f"{kernel}, variant {variant}: the Hub does not list it any more")
    storage = hub.storage(kernel.repo_id, kernel.repo_type)
    (storage / "trees" / f"{kernel.commit}.json").unlink(missing_ok=True)
    return variants[variant]


def _replace(hub: Hub, kernel: Resolved, directory: Path, damage: Damage) -> None:
    within = f"build/{directory.name}"
    if damage.unreadable:
        if directory.is_symlink():
            directory.unlink()
        shutil.rmtree(directory, ignore_errors=True)
    for name in (*damage.changed, *damage.unlisted):
        (directory / name).unlink(missing_ok=True)
    for name in damage.missing:
        shutil.rmtree(directory / name, ignore_errors=True)  # where it is a directory
    if damage.changed:
        _download(hub, kernel, [f"{within}/{name}" for name in damage.changed], force=True)
    _download(hub, kernel, [f"{within}/*"])


def _download(hub: Hub, kernel: Resolved, paths: list[str], *, force: bool = False) -> None:
    patterns = [glob.escape(path) for path in paths] if force else paths
    with asking(kernel.repo_id):
        hub.api.snapshot_download(
            kernel.repo_id,
            repo_type=kernel.repo_type,
            revision=kernel.commit,
            cache_dir=hub.cache,
            allow_patterns=patterns,
            ignore_patterns=_BYTECODE,
            force_download=force,
        )


@contextlib.contextmanager
def _alone(storage: Path) -> Iterator[None]:
    """Among the processes that share a cache, one at a time mends a repository in it."""
    from filelock import FileLock

    # Where a file system has no locks, the client's downloads still put each file in its place
    # whole; only the work may be done twice.
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


# --- comparing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """How the files on the disk are not those that are listed."""

    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    unreadable: str = ""

    def __bool__(self) -> bool:
        return bool(self.missing or self.changed or self.unlisted or self.unreadable)

    @property
    def only_missing(self) -> bool:
        return not (self.changed or self.unlisted or self.unreadable)

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "changed": self.changed, "not listed": self.unlisted}
        shown = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
        return "; ".join([*shown, *filter(None, [self.unreadable])])


def compare(directory: Path, files: Files) -> tuple[Damage, Mapping[str, str]]:
    """What is wrong with a variant on the disk, and the sha256 of each of its files."""
    if directory.is_symlink():
        return Damage(unreadable=f"{directory.name} is a link"), {}
    if not directory.is_dir():
        return Damage(missing=tuple(sorted(files)) or (directory.name,)), {}
    sha256, changed = {}, []
    try:
        for name, path in files_in(directory):
            sha256[name], good = _hash(path, files.get(name))
            if not good:
                changed.append(name)
    except (ValueError, OSError) as error:
        return Damage(unreadable=str(error)), {}
    if not files:  # nothing is known of them
        return Damage(), sha256
    missing, unlisted = files.keys() - sha256.keys(), sha256.keys() - files.keys()
    return Damage(tuple(sorted(missing)), tuple(changed), tuple(sorted(unlisted))), sha256


def _hash(path: Path, blob: Blob | None) -> tuple[str, bool]:
    """A file's base64 sha256, and whether it is the listed one; True where none is listed."""
    if blob is None or blob.sha256 is not None:
        sha256 = encoded_digest(path)
        return sha256, blob is None or blob.sha256 == b64decode(sha256).hex()
    content = path.read_bytes()
    git_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return encoded_digest(content), git_id == blob.git_id
