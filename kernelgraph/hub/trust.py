"""Whose code may be run: loading a kernel runs what its repository holds."""

from __future__ import annotations

from collections.abc import Sequence


def check_trust(repo_id: str, trust_remote_code: bool | Sequence[str]) -> None:
    """Refuse a Hub repository that the user has not allowed.

    Raises:
        ValueError: ``trust_remote_code`` is neither True nor a list with ``repo_id`` in it.
    """
    if trust_remote_code is True:
        return
    if not isinstance(trust_remote_code, bool) and repo_id in trust_remote_code:
        return
    raise ValueError(
        f"{repo_id}: loading a kernel runs its repository's code, and nothing allows that here. "
        "If you trust it, pass trust_remote_code=True, or a list of the repository ids that you "
        f'trust: trust_remote_code=["{repo_id}"]; or load a copy that you have read, with '
        "LocalLayerRepository or get_local_kernel"
    )
