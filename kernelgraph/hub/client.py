"""Requests to the Hub, through `huggingface_hub`'s client and cache, each with a time limit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPO_TYPES = ("kernel", "model")
"""The repository types that a kernel may have on the Hub; older kernels are models."""


@dataclass(frozen=True)
class Resolved:
    """One commit of a repository."""

    repo_id: str
    repo_type: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repo_id} at {self.commit}"


@dataclass(frozen=True)
class Hub:
    """The Hub and the cache of files downloaded from it, as one load uses them.

    Args:
        user_agent: An addition to the user agent of each request, as for `huggingface_hub`.
        cache: The cache's directory; by default ``KERNELS_CACHE``, or else `huggingface_hub`'s.
    """

    user_agent: str | Mapping[str, str] | None = None
    cache: str | None = field(default_factory=lambda: os.environ.get("KERNELS_CACHE") or None)

    @cached_property
    def api(self) -> HfApi:
        """The client that sends the requests."""
        from huggingface_hub import HfApi

        agent = self.user_agent
        return HfApi(
            library_name="kernelgraph",
            user_agent=dict(agent) if isinstance(agent, Mapping) else agent,
        )

    @property
    def offline(self) -> bool:
        """Whether no request may be sent, because of ``HF_HUB_OFFLINE=1`` or `cache_only`."""
        from huggingface_hub import is_offline_mode

        return bool(is_offline_mode()) or _cache_only.get()

    @property
    def directory(self) -> Path:
        """The cache's directory."""
        from huggingface_hub import constants

        return Path(self.cache or constants.HF_HUB_CACHE).expanduser().resolve()

    def storage(self, repo_id: str, repo_type: str) -> Path:
        """The repository's directory in the cache, in `huggingface_hub`'s layout."""
        from huggingface_hub.file_download import repo_folder_name

        return self.directory / repo_folder_name(repo_id=repo_id, repo_type=repo_type)

    def snapshot(self, resolved: Resolved) -> Path:
        """The directory that has the files of a commit once they are downloaded."""
        storage = self.storage(resolved.repo_id, resolved.repo_type)
        return storage / "snapshots" / resolved.commit

    def note(self, repo_id: str, repo_type: str, question: str) -> Note:
        """The place in the cache for an answer of the Hub that the client itself does not keep."""
        digest = hashlib.sha256(question.encode()).hexdigest()[:32]
        path = self.storage(repo_id, repo_type) / "kernelgraph" / f"{digest}.json"
        return Note(path, question)


@dataclass(frozen=True)
class Note:
    """An answer of the Hub, kept beside the repository's files, so that it is deleted with them."""

    path: Path
    question: str

    def read(self) -> str | None:
        """The answer, or None if none is kept or the file cannot be understood."""
        try:
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(content, dict) or content.get("question") != self.question:
            return None
        answer = content.get("answer")
        return answer if isinstance(answer, str) else None

    def write(self, answer: str) -> None:
        """Keep the answer, whole or not at all; nothing happens if the cache is not writable."""
        if self.read() == answer:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(handle, "w") as stream:
                json.dump({"question": self.question, "answer": answer}, stream)
            os.replace(name, self.path)


def refused(error: BaseException) -> bool:
    """Whether the Hub answered and refused; after any other error an earlier answer may be used."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not isinstance(error, HfHubHTTPError):
        return isinstance(error, (NotOffered, HFValidationError))
    return error.response.status_code < 500 and error.response.status_code != 429


class NotOffered(ValueError):
    """The Hub answered, but it does not have the wanted version or commit."""


@contextlib.contextmanager
def asking(repo_id: str) -> Iterator[None]:
    """A context for requests: each has a time limit, and each error names the repository.

    Raises:
        FileNotFoundError: The Hub has no such repository or revision, or hides it from this user.
        ValueError: The Hub does not have the wanted version or commit, or a name is malformed.
        OSError: Any other error in the context.
    """
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with _limited():
            yield
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id}: the Hub has no such repository, or shows it only to those who are logged "
            "in and have access to it"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id}: the Hub has no such revision of it") from error
    except (NotOffered, HFValidationError) as error:
        raise ValueError(f"{repo_id}: {error}") from error
    except Exception as error:
        raise OSError(f"{repo_id}: could not be fetched from the Hub: {error}") from error


_limit_applies: ContextVar[bool] = ContextVar("limit_applies", default=False)
_cache_only: ContextVar[bool] = ContextVar("cache_only", default=False)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """A context whose requests have a time limit.

    Most calls of `huggingface_hub` set no time limit, so a Hub that accepts the connection and
    never answers would block forever. The whole process shares the session, so the limit applies
    only to requests that are sent in this context.
    """
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:
        hooks.append(_limit)
    token = _limit_applies.set(True)
    try:
        yield
    finally:
        _limit_applies.reset(token)


@contextlib.contextmanager
def cache_only(enabled: bool = True) -> Iterator[None]:
    """A context that sends no request, as with ``HF_HUB_OFFLINE=1``: only the cache is used."""
    token = _cache_only.set(enabled)
    try:
        yield
    finally:
        _cache_only.reset(token)


class _Request(Protocol):
    """A request of the client's HTTP library, which differs between versions of the client."""

    @property
    def url(self) -> object: ...

    @property
    def extensions(self) -> MutableMapping[str, object]: ...


def _limit(request: _Request) -> None:
    """Refuse the request in `cache_only`; give it the time limit for metadata if it has none."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if not _limit_applies.get():
        return
    if _cache_only.get():
        raise OfflineModeIsEnabled(f"cannot reach {request.url}: local_files_only is set")
    timeout = request.extensions.get("timeout")
    if not (isinstance(timeout, Mapping) and any(timeout.values())):
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
