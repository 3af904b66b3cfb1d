"""How the Hub is asked: through `huggingface_hub`'s client and cache, and never without a limit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Older kernel repositories are of the Hub's type for models.
REPO_TYPES = ("kernel", "model")


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
    """The Hub, and the cache of what was downloaded from it, as one load sees them.

    Args:
        user_agent: What to add to the user agent of each request, as for `huggingface_hub`.
        cache: The cache's directory; by default ``KERNELS_CACHE``, or else `huggingface_hub`'s.
    """

    user_agent: str | Mapping[str, str] | None = None
    cache: str | None = field(default_factory=lambda: os.environ.get("KERNELS_CACHE") or None)

    @cached_property
    def api(self) -> HfApi:
        from huggingface_hub import HfApi

        agent = self.user_agent
        return HfApi(
            library_name="kernelgraph",
            user_agent=dict(agent) if isinstance(agent, Mapping) else agent,
        )

    @property
    def offline(self) -> bool:
        from huggingface_hub import is_offline_mode

        return bool(is_offline_mode()) or _cache_alone.get()

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
        """Where the files of a commit are, once downloaded."""
        storage = self.storage(resolved.repo_id, resolved.repo_type)
        return storage / "snapshots" / resolved.commit

    def note(self, repo_id: str, repo_type: str, question: str) -> Note:
        """The place for an answer of the Hub's that the client itself does not keep."""
        digest = hashlib.sha256(question.encode()).hexdigest()[:32]
        path = self.storage(repo_id, repo_type) / "kernelgraph" / f"{digest}.json"
        return Note(path, question)


@dataclass(frozen=True)
class Note:
    """An answer of the Hub's, kept beside the repository's files and gone when they are."""

    path: Path
    question: str

    def read(self) -> str | None:
        """The answer; None where there is none that can be understood."""
        try:
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(content, dict) or content.get("question") != self.question:
            return None
        answer = content.get("answer")
        return answer if isinstance(answer, str) else None

    def write(self, answer: str) -> None:
        """Keep the answer, whole or not at all; a cache that cannot be written is left as it is."""
        if self.read() == answer:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(handle, "w") as stream:
                json.dump({"question": self.question, "answer": answer}, stream)
            os.replace(name, self.path)


def refused(error: BaseException) -> bool:
    """Whether the Hub was there and said no. Otherwise what is known from before may serve."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not isinstance(error, HfHubHTTPError):
        return isinstance(error, (NotOffered, HFValidationError))
    return error.response.status_code < 500 and error.response.status_code != 429


class NotOffered(ValueError):
    """The Hub answered, and what is wanted is not there."""


@contextlib.contextmanager
def asking(repo_id: str) -> Iterator[None]:
    """Ask the Hub within: what goes wrong becomes an error that names the repository.

    Raises:
        FileNotFoundError: The Hub has no such repository or revision, or not for this user.
        ValueError: What is wanted is not there, or cannot be the name of anything.
        OSError: Anything else that went wrong on the way.
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
        raise OSError(f"{repo_id}: could not be had from the Hub: {error}") from error


_limit_applies: ContextVar[bool] = ContextVar("limit_applies", default=False)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Give up on a Hub that does not answer.

    Most calls of `huggingface_hub` have no time limit of their own, and a Hub that accepts the
    connection and then says nothing would be waited for without end. The session is shared with
    everybody in the process, so the limit counts only for what is asked here.
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


_cache_alone: ContextVar[bool] = ContextVar("cache_alone", default=False)


@contextlib.contextmanager
def cache_alone(yes: bool = True) -> Iterator[None]:
    """Ask nothing within, as with ``HF_HUB_OFFLINE=1``: what is in the cache has to do."""
    token = _cache_alone.set(yes)
    try:
        yield
    finally:
        _cache_alone.reset(token)


def _limit(request: Any) -> None:
    """A request hook: the time limit for one that has none, that of a file's metadata."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if _limit_applies.get() and _cache_alone.get():
        raise OfflineModeIsEnabled(f"cannot reach {request.url}: local_files_only is set")
    if _limit_applies.get() and not any((request.extensions.get("timeout") or {}).values()):
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
