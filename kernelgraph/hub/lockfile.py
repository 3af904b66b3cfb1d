"""The lock file ``kernels.lock``: the commit and the content at which each repository is loaded.

The file is a JSON list of objects with two members::

    {"dependency": {"repo-id": "owner/name", "version": 1},
     "lock": {"commit": "<40 hex digits>", "digests": {"<variant>": "sha256-<hex>"}}}

``dependency`` is what the project or a kernel asks for, in the format of ``kernel-depends`` in a
kernel's metadata: ``version`` may also be a specifier, and ``revision`` may replace it. The
project's own dependencies come first, then those of their kernels. Lock files of the `kernels`
package have the same format without ``digests``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kernelgraph.builds import METADATA, Wanted, below, is_commit, read_wanted
from kernelgraph.hub.client import Hub
from kernelgraph.hub.fetcher import content_digest, list_build, read_remote_metadata
from kernelgraph.hub.resolver import resolve
from kernelgraph.selection import type_name

LOCKFILE = "kernels.lock"
"""The name of a lock file."""
_DIGEST = re.compile(r"sha256-[0-9a-f]{64}")


@dataclass(frozen=True)
class Lock:
    """The lock of one repository."""

    wanted: Wanted
    commit: str
    digests: tuple[tuple[str, str], ...] = ()
    """Pairs of a variant and its `content_digest`, sorted; empty if the file has no digests."""


@dataclass(frozen=True)
class Locks:
    """A parsed lock file."""

    locks: tuple[Lock, ...]
    source: str = LOCKFILE
    """The name of the file in errors."""

    def of(self, repo_id: str) -> Lock:
        """Return the lock of a repository that the project itself depends on.

        Raises:
            ValueError: The repository is not locked.
        """
        for lock in self.locks:
            if lock.wanted.repo_id == repo_id:
                return lock
        raise self._not_locked(repo_id)

    def get(self, wanted: Wanted) -> Lock:
        """Return the lock of exactly this repository and revision or version.

        Raises:
            ValueError: It is not locked.
        """
        for lock in self.locks:
            if lock.wanted == wanted:
                return lock
        raise self._not_locked(str(wanted))

    def _not_locked(self, what: str) -> ValueError:
        locked = ", ".join(str(lock.wanted) for lock in self.locks) or "nothing"
        return ValueError(
            f"{what} is not in {self.source}, which locks {locked}: add it to "
            "[tool.kernels.dependencies] in pyproject.toml and run `kernelgraph lock`"
        )

    def to_json(self) -> str:
        """Return the content of the lock file."""
        return json.dumps([_entry(lock) for lock in self.locks], indent=2) + "\n"


def parse_locks(data: bytes | str, source: str = LOCKFILE) -> Locks:
    """Parse the content of a lock file; errors name it ``source``.

    Raises:
        ValueError: The content is malformed; the message says what was expected where.
    """
    try:
        content = json.loads(data if isinstance(data, str) else data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected a JSON list: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{source}: expected a JSON list, got {reprlib.repr(content)}")
    locks = [_parse_lock(source, i, entry) for i, entry in enumerate(content)]
    seen = set()
    for lock in locks:
        if lock.wanted in seen:
            raise ValueError(f"{source}: {lock.wanted} is locked twice")
        seen.add(lock.wanted)
    return Locks(tuple(locks), source)


def _parse_lock(source: str, i: int, entry: object) -> Lock:
    def expected(what: str, got: object) -> ValueError:
        return ValueError(f"{source}: [{i}]: expected {what}, got {reprlib.repr(got)}")

    if not isinstance(entry, dict) or not isinstance(locked := entry.get("lock"), dict):
        raise expected('an object with "dependency" and "lock"', entry)
    wanted = read_wanted(source, f"[{i}].dependency", entry.get("dependency"))
    commit = locked.get("commit")
    if not isinstance(commit, str) or not is_commit(commit):
        raise expected('a commit of 40 hex digits as "lock.commit"', commit)
    digests = locked.get("digests", {})
    if not isinstance(digests, dict) or not all(
        isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests.values()
    ):
        raise expected('an object of "sha256-" digests as "lock.digests"', digests)
    return Lock(wanted, commit, tuple(sorted(digests.items())))


def _entry(lock: Lock) -> dict[str, object]:
    wanted = lock.wanted
    asked = {"revision": wanted.ref} if wanted.version is None else {"version": wanted.version}
    locked: dict[str, object] = {"commit": lock.commit}
    if lock.digests:
        locked["digests"] = dict(lock.digests)
    return {"dependency": {"repo-id": wanted.repo_id, **asked}, "lock": locked}


# --- the files of a project -----------------------------------------------------------------------


def read_dependencies(pyproject: Path) -> tuple[Wanted, ...]:
    """Read ``[tool.kernels.dependencies]`` of a ``pyproject.toml``: the kernels to lock.

    Each entry is ``"owner/name" = version``, where the version is a number or a specifier; or
    ``"owner/name" = table``, where the table has ``version`` or ``revision``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not TOML, has no such table, or an entry is malformed.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        content: object = tomllib.loads(pyproject.read_bytes().decode())
    except ValueError as error:
        raise ValueError(f"{pyproject}: {error}") from error
    for key in ("tool", "kernels", "dependencies"):
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        raise ValueError(
            f"{pyproject}: expected a table [tool.kernels.dependencies], with entries such as "
            '"owner/name" = 1'
        )
    dependencies = []
    for repo_id, asked in content.items():
        table = asked if isinstance(asked, Mapping) else {"version": asked}
        key = f"tool.kernels.dependencies.{repo_id}"
        dependencies.append(read_wanted(str(pyproject), key, {**table, "repo-id": repo_id}))
    return tuple(dependencies)


def find_locks(lockfile: str | os.PathLike[str] | None) -> Locks:
    """Read a lock file: the given one, or that of the caller.

    The caller is the package of the nearest calling function outside of this library. Its lock
    file is the ``kernels.lock`` in the metadata that it was installed with, or else the one in the
    working directory.

    Raises:
        TypeError: ``lockfile`` is not a path.
        FileNotFoundError: There is no such file.
        ValueError: The content is malformed.
    """
    if lockfile is None:
        if (locks := _locks_of_caller()) is not None:
            return locks
        lockfile = LOCKFILE
        if not os.path.exists(lockfile):
            raise FileNotFoundError(
                f"there is no {LOCKFILE} in the working directory, and the calling package was "
                "installed with none: run `kernelgraph lock`, or pass lockfile"
            )
    if not isinstance(lockfile, (str, os.PathLike)):
        raise TypeError(f"lockfile: expected a path or None, got {type_name(lockfile)}")
    path = Path(lockfile).expanduser()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no lock file {path}: run `kernelgraph lock`") from None
    return parse_locks(data, str(lockfile))


def _locks_of_caller() -> Locks | None:
    own = __name__.partition(".")[0]
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] == own:
        if frame.f_back is None:
            return None
        frame = frame.f_back
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    if package in ("", "__main__"):
        return None
    for name in importlib.metadata.packages_distributions().get(package, ()):
        if (text := importlib.metadata.distribution(name).read_text(LOCKFILE)) is not None:
            return parse_locks(text, f"{LOCKFILE} of {name}")
    return None


# --- locking --------------------------------------------------------------------------------------


def lock(hub: Hub, dependencies: Iterable[Wanted]) -> Locks:
    """Lock the dependencies of a project, then the kernels that those use.

    Every variant is locked, also those for other systems. Of each only the metadata is downloaded.

    Raises:
        FileNotFoundError: There is no such repository or revision.
        ValueError: No version fits, metadata cannot be understood, or kernels use each other.
        OSError: The Hub could not be asked.
    """
    dependencies = tuple(dependencies)
    found: dict[Wanted, Lock] = {}
    for wanted in dependencies:
        _add_lock(hub, wanted, (), found)
    order = [*dependencies, *(wanted for wanted in found if wanted not in dependencies)]
    return Locks(tuple(found[wanted] for wanted in order))


def _add_lock(
    hub: Hub, wanted: Wanted, above: tuple[Wanted, ...], found: dict[Wanted, Lock]
) -> None:
    above = below(above, wanted)
    if wanted in found:
        return
    kernel = resolve(hub, wanted, refresh=True)
    digests = []
    used: dict[Wanted, None] = {}
    for variant, files in sorted(list_build(hub, kernel).items()):
        if not files:
            raise OSError(f"{kernel}: cannot be locked while offline: lock it with network access")
        metadata, sha256 = read_remote_metadata(hub, kernel, variant, files)
        digests.append((variant, content_digest(files, {METADATA: sha256} if sha256 else {})))
        used |= dict.fromkeys(metadata.kernel_depends)
    found[wanted] = Lock(wanted, kernel.commit, tuple(digests))
    for dependency in used:
        _add_lock(hub, dependency, above, found)
