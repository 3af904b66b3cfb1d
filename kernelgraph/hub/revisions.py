"""Versions of a repository: which of its tags a bound means."""

from __future__ import annotations

import re
from collections.abc import Iterable

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

_TAG = re.compile(r"v\d+\.\d+\.\d+", re.ASCII)


def check_version(version: object) -> None:
    """Refuse what is neither a version number nor a bound.

    Raises:
        TypeError: ``version`` is neither an int nor a str.
        ValueError: It is negative, or not a PEP 440 version specifier.
    """
    if isinstance(version, bool) or not isinstance(version, (int, str)):
        raise TypeError(f"version: expected an int or a version specifier, got {version!r}")
    if isinstance(version, int):
        if version < 0:
            raise ValueError(f"version: expected 0 or more, got {version}")
        return
    try:
        specifiers = len(SpecifierSet(version))
    except InvalidSpecifier:
        specifiers = 0
    if not specifiers:
        raise ValueError(
            f'version: expected an int or a version specifier such as ">=0.1,<0.2", got {version!r}'
        )


def pick(tags: Iterable[str], specifier: str) -> str | None:
    """The tag ``v<major>.<minor>.<patch>`` with the highest version that fits ``specifier``.

    Pre-releases count only where the specifier itself mentions one. Other tags are left alone.
    """
    bound = SpecifierSet(specifier)
    with_prereleases = bool(bound.prereleases)
    fitting = [
        (version, tag)
        for tag in tags
        if (version := tag_version(tag)) and bound.contains(version, with_prereleases)
    ]
    return max(fitting)[1] if fitting else None


def tag_version(tag: str) -> Version | None:
    """The version that a tag names, or None for a tag of another shape."""
    if not _TAG.match(tag):
        return None
    try:
        version = Version(tag[1:])
    except InvalidVersion:
        return None
    return version if len(version.release) == 3 else None
