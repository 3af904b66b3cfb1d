"""Trust: whose code may be run. Loading a kernel runs the code of its repository."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from kernelgraph.builds import check_repo_id
from kernelgraph.hub.client import Hub, Resolved, asking

Trust: TypeAlias = bool | Sequence[str]
"""A ``trust_remote_code`` argument: all repositories, none, or a list of repository ids."""


def parse_trust(trust_remote_code: object) -> bool | tuple[str, ...]:
    """Check a ``trust_remote_code`` argument, and copy a list so that it cannot change later.

    Raises:
        TypeError: It is neither a bool nor a list of repository ids.
        ValueError: A repository id is malformed.
    """
    if isinstance(trust_remote_code, bool):
        return trust_remote_code
    if isinstance(trust_remote_code, str) or not isinstance(trust_remote_code, Sequence):
        raise TypeError(
            "trust_remote_code: expected a bool or a list of repository ids, got "
            f"{trust_remote_code!r}"
        )
    for repo_id in trust_remote_code:
        check_repo_id("trust_remote_code", repo_id)
    return tuple(trust_remote_code)


def check_trust(hub: Hub, kernel: Resolved, trust_remote_code: Trust) -> None:
    """Refuse a commit that neither the user nor the Hub trusts, before its code is downloaded.

    The Hub trusts the organisations that it calls trusted publishers. Its answer is kept for that
    one commit: the commit loads again without a request, also offline, and for another commit the
    Hub is asked again.

    Args:
        hub: The Hub to ask.
        kernel: The commit to be loaded.
        trust_remote_code: True, or the repository ids that the user trusts.

    Raises:
        FileNotFoundError: The Hub no longer has the commit.
        ValueError: Neither the user nor the Hub trusts the repository, or the Hub cannot be asked;
            the message says what the user can do.
    """
    if trust_remote_code is True:
        return
    if not isinstance(trust_remote_code, bool) and kernel.repo_id in trust_remote_code:
        return
    note = hub.note(kernel.repo_id, kernel.repo_type, f"trusted publisher of {kernel.commit}")
    if note.read() is not None:
        return
    try:
        with asking(kernel.repo_id):
            owner = _owner(hub, kernel)
            trusted = _is_trusted_publisher(hub, owner)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _refusal(kernel, f"whether to trust its owner could not be asked: {error}") from error
    if not trusted:
        raise _refusal(kernel, f"the Hub does not call its owner {owner} a trusted publisher")
    note.write(owner)


def _owner(hub: Hub, kernel: Resolved) -> str:
    # The Hub redirects the old name of a repository that has moved, so the requested name does not
    # say who owns the files that arrive.
    info = hub.api.repo_info(kernel.repo_id, repo_type=kernel.repo_type, revision=kernel.commit)
    return info.id.partition("/")[0]


def _is_trusted_publisher(hub: Hub, owner: str) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        overview = hub.api.get_organization_overview(owner)
    except HfHubHTTPError as error:
        if error.response.status_code == 404:  # a user, who cannot be a trusted publisher
            return False
        raise
    return getattr(overview, "trustedKernelPublisher", False) is True


def _refusal(kernel: Resolved, why: str) -> ValueError:
    return ValueError(
        f"{kernel.repo_id}: loading a kernel runs its repository's code, and {why}. If you trust "
        "it, pass trust_remote_code=True, or a list of the repository ids that you trust: "
        f'trust_remote_code=["{kernel.repo_id}"]; or load a copy that you have read, with '
        "LocalLayerRepository or get_local_kernel"
    )
