"""Whose code may be run: loading a kernel runs what its repository holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernelgraph.builds import check_repo_id
from kernelgraph.hub.client import Hub, Resolved, asking

Trust = bool | Sequence[str]
"""What `trust_remote_code` may be."""


def allowed(trust_remote_code: Any) -> bool | tuple[str, ...]:
    """``trust_remote_code`` in a form that nobody changes later.

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
    """Refuse a commit that neither the user nor the Hub vouches for; no code of it is here yet.

    The Hub vouches for the organisations that it calls trusted publishers. Its word is kept for
    the commit for which it was given, so that this commit loads again without a request and
    offline, while another one is asked for anew.

    Args:
        hub: The Hub to ask.
        kernel: What is to be loaded.
        trust_remote_code: True, or the repository ids that the user trusts.

    Raises:
        FileNotFoundError: The Hub no longer has it.
        ValueError: Nobody vouches for it, or the Hub cannot be asked; the message names the ways
            out.
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
    # The Hub forwards the old name of a repository that has moved, so the name that was asked for
    # does not say who owns what arrives.
    info = hub.api.repo_info(kernel.repo_id, repo_type=kernel.repo_type, revision=kernel.commit)
    return info.id.partition("/")[0]


def _is_trusted_publisher(hub: Hub, owner: str) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        overview = hub.api.get_organization_overview(owner)
    except HfHubHTTPError as error:
        if error.response.status_code == 404:  # a user, and only organisations are vouched for
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
