"""Results kept on disk between processes: JSON values under text keys.

Each value is a file of its own, in a directory for its kind. It is written under a temporary name
and then moved to its place, so readers only ever see whole files, whatever other processes do.
The cache is never the only source of a value: a value that cannot be read is computed again, and
a value that cannot be written is not kept.

The same idea within one process is `remember`: a table that is emptied before it grows too large.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")

logger = logging.getLogger("kernelgraph")

CHOICES = "choices"
"""The kind of the values that say which program was measured to be fastest."""
_FORMAT = 1
"""The version of the files' format; files of another version are not read."""
_complained = False
"""Whether this process has warned of a file that it cannot understand: it does so once."""


def directory() -> Path:
    """The cache's directory: ``KERNELGRAPH_CACHE_DIR``, else ``kernelgraph`` in the user's cache.

    Raises:
        FileNotFoundError: If the user has no home directory.
    """
    if own := os.environ.get("KERNELGRAPH_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    # A relative path is to be ignored: https://specifications.freedesktop.org/basedir-spec/latest/
    if os.path.isabs(base := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(base, "kernelgraph")
    try:
        return Path.home() / ".cache" / "kernelgraph"
    except RuntimeError:
        raise FileNotFoundError(
            "there is no home directory to keep a cache in: set KERNELGRAPH_CACHE_DIR"
        ) from None


def read(kind: str, key: str) -> Any:
    """The JSON value last written under ``key``; None if there is none, or it cannot be read.

    Another program may have changed the file: the caller checks what the value is.
    """
    try:
        path = _path(kind, key)
        content = _content(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.debug("the cache cannot be read: %s", error)
        return None
    except (ValueError, RecursionError):
        _complain(path)
        return None
    if content.get("key") != key:
        _complain(path)
        return None
    return content.get("value")


def write(kind: str, key: str, value: object) -> None:
    """Write ``value`` under ``key``, whole or not at all.

    Where the directory cannot be written to, nothing is kept, and that is no error.

    Raises:
        TypeError, ValueError: If JSON cannot represent ``value``.
    """
    text = json.dumps({"form": _FORMAT, "key": key, "value": value}, allow_nan=False)
    try:
        path = _path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        logger.debug("the cache cannot be written: %s", error)


def values(kind: str) -> Iterator[Any]:
    """Yields each value of a kind that can be read.

    Raises:
        FileNotFoundError: As `directory` raises.
    """
    for path in sorted(_files(kind)):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            yield _content(path).get("value")


def entries() -> dict[str, int]:
    """The number of values of each kind.

    Raises:
        FileNotFoundError: As `directory` raises.
    """
    found: dict[str, int] = {}
    for path in _files("*"):
        if path.suffix == ".json":
            found[path.parent.name] = found.get(path.parent.name, 0) + 1
    return dict(sorted(found.items()))


def clear(kind: str | None = None) -> int:
    """Remove all values, or all of one kind, and return how many were removed.

    Raises:
        OSError: If a file cannot be removed, or as `directory` raises.
    """
    count = 0
    for path in _files(kind or "*"):
        try:
            path.unlink()
        except FileNotFoundError:  # another process was quicker
            continue
        count += path.suffix == ".json"
    return count


def _path(kind: str, key: str) -> Path:
    return directory() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _files(kind: str) -> Iterator[Path]:
    """Yields the files of values, and the temporary files that killed writers have left."""
    for suffix in (".json", ".tmp"):
        yield from directory().glob(f"{kind}/{'[0-9a-f]' * 32}*{suffix}")


def _content(path: Path) -> dict[str, Any]:
    """The content of a file that `write` wrote.

    Raises:
        OSError: If the file cannot be read.
        ValueError, RecursionError: If another program wrote it, or it is of another format.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or content.get("form") != _FORMAT:
        raise ValueError("not a file that kernelgraph wrote")
    return content


def _complain(path: Path) -> None:
    global _complained
    logger.log(
        logging.DEBUG if _complained else logging.WARNING,
        "%s in the cache is not what kernelgraph writes: it is ignored, and will be written over",
        path,
    )
    _complained = True


def remember(known: dict[K, V], key: K, value: V, most: int = 1024) -> None:
    """Put ``value`` into ``known``, a table that never grows beyond ``most`` entries.

    A full table is emptied first: to find out an entry again is cheaper than to keep count, at
    each look-up, of which entries are in use.
    """
    if len(known) >= most:
        known.clear()
    known[key] = value
