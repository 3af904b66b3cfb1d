"""The revision of a repository that is wanted: a name in git, a version, or a range of versions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from kernelgraph.selection import type_name

_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TAG = re.compile(r"v\d+\.\d+\.\d+", re.ASCII)
# Characters and sequences that git forbids in every ref name, and those that would make the name
# a path that leads elsewhere.
_NOT_IN_A_REF = re.compile(r"\.\.|^[/.-]|[/.]$|//|@\{|[\x00-\x20\x7f~^:?*\[\\\ud800-\udfff]")


@dataclass(frozen=True)
class Wanted:
    """A repository on the Hub, with the revision or the version that is wanted of it, if any.

    Args:
        repo_id: The repository, ``owner/name``.
        revision: A branch, a tag or a commit; the branch main where neither is given.
        version: ``N`` for the branch ``v<N>``; or a PEP 440 specifier such as ``">=0.1,<0.2"``,
            for the highest of the tags ``v<major>.<minor>.<patch>`` that fits.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is malformed, or both ``revision`` and ``version`` are given.
    """

    repo_id: str
    revision: str | None = None
    version: int | str | None = None

    def __post_init__(self) -> None:
        check_repo_id("repo_id", self.repo_id)
        if self.revision is not None:
            check_name("revision", self.revision)
            if _NOT_IN_A_REF.search(self.revision):
                raise ValueError(
                    f"revision: expected a branch, a tag or a commit, got {self.revision!r}"
                )
        if self.version is not None:
            check_version(self.version)
            if self.revision is not None:
                raise ValueError(f"{self.repo_id}: pass revision or version, not both")

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.repo_id} version {self.version}"
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    @property
    def bound(self) -> str | None:
        """The version specifier; None where none is given."""
        return self.version if isinstance(self.version, str) else None

    @property
    def ref(self) -> str:
        """The branch, tag or commit; without meaning where a version specifier is given."""
        return self.revision or ("main" if self.version is None else f"v{self.version}")


def below(above: tuple[Wanted, ...], wanted: Wanted) -> tuple[Wanted, ...]:
    """Extend ``above``, the chain of kernels of which each uses the next, by ``wanted``.

    Raises:
        ValueError: ``wanted`` is in the chain already, so the kernels use each other in a cycle.
    """
    if wanted in above:
        cycle = " -> ".join(map(str, (*above[above.index(wanted) :], wanted)))
        raise ValueError(f"kernels that use each other cannot be loaded: {cycle}")
    return (*above, wanted)


def is_commit(text: str) -> bool:
    """Whether ``text`` is a full commit hash."""
    return _COMMIT.fullmatch(text) is not None


def check_name(argument: str, value: object) -> str:
    """Return ``value`` if it is a str that is not empty.

    Raises:
        TypeError, ValueError: It is not; the message names the argument.
    """
    if not isinstance(value, str):
        raise TypeError(f"{argument}: expected a str, got {type_name(value)}")
    if not value:
        raise ValueError(f"{argument}: expected a name, got an empty str")
    return value


def check_repo_id(argument: str, value: object) -> None:
    """Refuse a value that is not a repository id, ``owner/name``.

    Raises:
        TypeError, ValueError: The message names the argument.
    """
    if not _REPO_ID.fullmatch(check_name(argument, value)):
        raise ValueError(f"{argument}: expected owner/name, got {value!r}")


def check_version(version: object) -> None:
    """Refuse a value that is neither a version number nor a PEP 440 version specifier.

    Raises:
        TypeError: ``version`` is neither an int nor a str.
        ValueError: It is negative, or not a version specifier.
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
    """Pick the tag ``v<major>.<minor>.<patch>`` with the highest version that fits ``specifier``.

    Pre-releases count only where the specifier itself mentions one. Tags of another form are
    ignored.

    Returns:
        None where no tag fits.
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
    """The version that a tag names; None for a tag of another form."""
    if not _TAG.match(tag):
        return None
    try:
        version = Version(tag[1:])
    except InvalidVersion:
        return None
    return version if len(version.release) == 3 else None


def branch_version(branch: str) -> Version | None:
    """The version ``N`` that a branch ``v<N>`` names; None for a branch of another form."""
    return Version(branch[1:]) if re.fullmatch(r"v\d{1,9}", branch, re.ASCII) else None
