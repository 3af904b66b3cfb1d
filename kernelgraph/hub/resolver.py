"""From a wanted revision or version of a repository to one commit of it, online and offline."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from packaging.version import Version

from kernelgraph.builds import Wanted, branch_version, is_commit, pick, tag_version
from kernelgraph.hub.client import REPO_TYPES, Hub, NotOffered, Resolved, asking, refused

_logger = logging.getLogger("kernelgraph")


def resolve(hub: Hub, wanted: Wanted, *, refresh: bool = False) -> Resolved:
    """Find the commit that is wanted.

    A commit that is in the cache costs no request; anything else costs one, or two for older
    repositories of the type model. If the Hub cannot be reached, the commit is the last answer to
    the same question.

    Args:
        hub: The Hub and the cache.
        wanted: The repository, and its wanted revision or version.
        refresh: Whether to accept only an answer that the Hub gives now.

    Raises:
        FileNotFoundError: The Hub has no such repository or revision; the message lists the
            versions of the repository.
        ValueError: No tag fits the specifier; the message lists the tags.
        OSError: The Hub could not be reached, and no earlier answer is known.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if not refresh and (cached := _in_cache(hub, wanted)) is not None:
        return cached
    missing: Exception | None = None
    try:
        with asking(wanted.repo_id):
            for repo_type in REPO_TYPES:
                try:
                    commit = _ask(hub, wanted, repo_type, refresh)
                    return Resolved(wanted.repo_id, repo_type, commit)
                except RepositoryNotFoundError as error:
                    missing = error
                except Exception as error:
                    if refresh or refused(error):
                        raise
                    return _recall(hub, wanted, error)
            assert missing is not None
            raise missing
    except FileNotFoundError as error:
        if not isinstance(error.__cause__, RevisionNotFoundError):
            raise
        there = ", ".join(v.name for v in list_versions(hub, wanted.repo_id)) or "none"
        raise FileNotFoundError(
            f"{wanted.repo_id}: there is no {wanted.ref}; its versions are: {there}"
        ) from error.__cause__


def _in_cache(hub: Hub, wanted: Wanted) -> Resolved | None:
    """The wanted commit, if a commit hash is wanted and some of its files are in the cache."""
    if wanted.bound is None and is_commit(wanted.ref):
        for repo_type in REPO_TYPES:
            resolved = Resolved(wanted.repo_id, repo_type, wanted.ref)
            if hub.snapshot(resolved).is_dir():
                return resolved
    return None


def _ask(hub: Hub, wanted: Wanted, repo_type: str, refresh: bool) -> str:
    """The commit hash that the Hub gives as the answer."""
    repo_id = wanted.repo_id
    if wanted.bound is not None:
        refs = hub.api.list_repo_refs(repo_id, repo_type=repo_type)
        commits = {ref.name: ref.target_commit for ref in refs.tags}
        tag = pick(commits, wanted.bound)
        if tag is None:
            there = ", ".join(name for name in commits if tag_version(name)) or "none"
            raise NotOffered(f"no version fits {wanted.bound!r}; there are: {there}")
        commit = _commit(commits[tag])
        hub.note(repo_id, repo_type, str(wanted)).write(commit)
        return commit
    if refresh or is_commit(wanted.ref):
        # `resolve_revision` does not check a commit hash, and it may answer from the cache.
        commit = _commit(hub.api.repo_info(repo_id, repo_type=repo_type, revision=wanted.ref).sha)
        if is_commit(wanted.ref) and commit != wanted.ref:
            raise NotOffered(f"{wanted.ref} is no commit of it")
        return commit
    return _commit(
        hub.api.resolve_revision(
            repo_id, repo_type=repo_type, revision=wanted.ref, cache_dir=hub.cache
        ).resolved
    )


def _recall(hub: Hub, wanted: Wanted, error: Exception) -> Resolved:
    """The last answer; without one, raise the ``error`` that kept the Hub from answering."""
    from huggingface_hub.errors import RevisionResolutionError

    for repo_type in REPO_TYPES:
        commit = None
        if wanted.bound is not None:
            commit = hub.note(wanted.repo_id, repo_type, str(wanted)).read()
        elif not is_commit(wanted.ref):
            try:
                commit = hub.api.resolve_revision(
                    wanted.repo_id,
                    repo_type=repo_type,
                    revision=wanted.ref,
                    cache_dir=hub.cache,
                    local_files_only=True,
                ).resolved
            except RevisionResolutionError:
                continue
        if commit is not None:
            if not hub.offline:
                _logger.warning("%s: the last answer of the Hub is used, because %s", wanted, error)
            return Resolved(wanted.repo_id, repo_type, _commit(commit))
    raise error


def _commit(text: str | None) -> str:
    """Check a commit hash that came from the Hub or the cache."""
    if text is None or not is_commit(text):
        raise ValueError(f"expected a commit hash, got {text!r}: from the Hub, or from the cache")
    return text


@dataclass(frozen=True)
class PublishedVersion:
    """A branch ``v<N>`` or a tag ``v<major>.<minor>.<patch>``, with its commit."""

    name: str
    commit: Resolved
    is_tag: bool
    version: Version


def list_versions(hub: Hub, repo_id: str) -> list[PublishedVersion]:
    """List the versions of a repository: branches before tags, each from the oldest on.

    Raises:
        FileNotFoundError, OSError: As for `resolve`.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with asking(repo_id):
        for repo_type in REPO_TYPES:
            try:
                refs = hub.api.list_repo_refs(repo_id, repo_type=repo_type)
                break
            except RepositoryNotFoundError:
                if repo_type == REPO_TYPES[-1]:
                    raise
        groups = ((False, refs.branches, branch_version), (True, refs.tags, tag_version))
        found = [
            PublishedVersion(
                ref.name, Resolved(repo_id, repo_type, _commit(ref.target_commit)), is_tag, version
            )
            for is_tag, references, version_of in groups
            for ref in references
            if (version := version_of(ref.name)) is not None
        ]
    return sorted(found, key=lambda version: (version.is_tag, version.version))
