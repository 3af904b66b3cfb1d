"""Getting a variant from the Hub into the cache. `huggingface_hub` does the talking."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kernelgraph.hub.revisions import pick, tag_version
from kernelgraph.hub.variants import System, choose, no_variant

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Older kernel repositories are of the Hub's type for models.
_REPO_TYPES = ("kernel", "model")


@dataclass(frozen=True)
class Fetched:
    """A variant in the cache."""

    directory: Path
    commit: str


def fetch(
    repo_id: str, *, revision: str | None, version: int | str | None, device_type: str
) -> Fetched:
    """Resolve what was asked for to a commit, and download the one variant of it that fits.

    Args:
        repo_id: The repository.
        revision: A branch, a tag or a commit; with ``version`` None too, the branch main.
        version: ``N`` for the branch ``v<N>``, or a specifier for the highest tag that fits.
        device_type: What the kernel is for.

    Raises:
        FileNotFoundError: No variant fits; the message says why each was refused.
        ValueError: No tag fits the specifier; the message says which there are.
        OSError: The Hub could not be asked, or has no such repository or revision; the message
            names the repository.
    """
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi(library_name="kernelgraph")
    cache = os.environ.get("KERNELS_CACHE") or None
    with _naming(repo_id):
        repo_type, commit, names = _look_up(api, repo_id, revision, version, cache)
    system = System.detect(device_type)
    choice = choose(names, system)
    if choice.best is None:
        raise no_variant(f"{repo_id} at {commit}", choice, system)
    with _naming(repo_id):
        snapshot = snapshot_download(
            repo_id,
            repo_type=repo_type,
            revision=commit,
            cache_dir=cache,
            allow_patterns=[f"build/{choice.best}/*"],
            ignore_patterns=["*/__pycache__/*", "*.pyc"],
            library_name="kernelgraph",
        )
    return Fetched(Path(os.path.abspath(snapshot), "build", choice.best), commit)


def _look_up(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    version: int | str | None,
    cache: str | None,
) -> tuple[str, str, list[str]]:
    """The repository's type, the commit, and the names of the variants there."""
    from huggingface_hub.errors import (
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionResolutionError,
    )

    first: Exception | None = None
    for repo_type in _REPO_TYPES:
        try:
            asked = _revision(api, repo_id, repo_type, revision, version)
            resolved = api.resolve_revision(
                repo_id, repo_type=repo_type, revision=asked, cache_dir=cache
            )
            commit = resolved.resolved
            return repo_type, commit, _variants(api, repo_id, repo_type, commit, cache)
        except (RepositoryNotFoundError, RevisionResolutionError, OfflineModeIsEnabled) as error:
            first = first or error
    assert first is not None
    raise first


def _revision(
    api: HfApi, repo_id: str, repo_type: str, revision: str | None, version: int | str | None
) -> str:
    if version is None:
        return revision or "main"
    if isinstance(version, int):
        return f"v{version}"
    tags = [ref.name for ref in api.list_repo_refs(repo_id, repo_type=repo_type).tags]
    tag = pick(tags, version)
    if tag is None:
        there = ", ".join(tag for tag in tags if tag_version(tag)) or "none"
        raise ValueError(f"no version fits {version!r}; there are: {there}")
    return tag


def _variants(
    api: HfApi, repo_id: str, repo_type: str, commit: str, cache: str | None
) -> list[str]:
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, EntryNotFoundError

    try:  # A commit never changes, so what an earlier download has listed is still right.
        files = get_cached_repo_tree(repo_id, repo_type=repo_type, revision=commit, cache_dir=cache)
    except CachedRepoTreeNotFoundError:
        pass
    else:
        parts = [file.path.split("/") for file in files]
        return sorted({p[1] for p in parts if p[0] == "build" and len(p) > 2})
    try:
        entries = api.list_repo_tree(
            repo_id, path_in_repo="build", repo_type=repo_type, revision=commit
        )
        return [entry.path.rpartition("/")[2] for entry in entries]
    except EntryNotFoundError:
        return []


@contextlib.contextmanager
def _naming(repo_id: str) -> Iterator[None]:
    """Make what goes wrong on the way to the Hub an OSError or ValueError naming the repository."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{repo_id}: {error}") from error
    except Exception as error:
        raise OSError(f"{repo_id}: could not be had from the Hub: {error}") from error
