"""Small things that are found out once and kept on disk: JSON values under text keys.

Each value is a file of its own, in a directory for its kind. It is written beside and then moved
to its place, so that readers meet whole files whatever other processes do. A cache is no place of
truth: what cannot be read is found out again, and what cannot be written is not kept.
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
from typing import Any

logger = logging.getLogger("kernelgraph")

CHOICES = "choices"
"""The kind of what was measured to be fastest."""
_FORM = 1
"""Of the files; another is not read."""
_complained = False


def directory() -> Path:
    """Where the values are: ``KERNELGRAPH_CACHE_DIR``, else ``kernelgraph`` in the user's cache.

    Raises:
        FileNotFoundError: If the user has no home.
    """
    if own := os.environ.get("KERNELGRAPH_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    # A relative one is to be ignored: https://specifications.freedesktop.org/basedir-spec/latest/
    if os.path.isabs(base := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(base, "kernelgraph")
    try:
        return Path.home() / ".cache" / "kernelgraph"
    except RuntimeError:
        raise FileNotFoundError(
            "there is no home directory to keep a cache in: set KERNELGRAPH_CACHE_DIR"
        ) from None


def read(kind: str, key: str) -> Any:
    """The value that was written under ``key``; None where there is none that can be read."""
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


def write(kind: str, key: str, value: Any) -> None:
    """Keep ``value``, whole or not at all; not where the directory cannot be written into.

    Raises:
        TypeError, ValueError: If ``value`` is not what JSON can hold.
    """
    text = json.dumps({"form": _FORM, "key": key, "value": value}, allow_nan=False)
    try:
        path = _path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(beside, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
    except OSError as error:
        logger.debug("the cache cannot be written: %s", error)


def values(kind: str) -> Iterator[Any]:
    """All values of a kind that can be read.

    Raises:
        FileNotFoundError: As `directory` raises.
    """
    for path in sorted(_files(kind)):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            yield _content(path).get("value")


def entries() -> dict[str, int]:
    """How many values there are of each kind.

    Raises:
        FileNotFoundError: As `directory` raises.
    """
    found: dict[str, int] = {}
    for path in _files("*"):
        if path.suffix == ".json":
            found[path.parent.name] = found.get(path.parent.name, 0) + 1
    return dict(sorted(found.items()))


def clear(kind: str | None = None) -> int:
    """Remove all values, or all of a kind; how many there were.

    Raises:
        OSError: If one cannot be removed, or as `directory` raises.
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
    """The values and what writers that were killed have left."""
    for suffix in (".json", ".tmp"):
        yield from directory().glob(f"{kind}/{'[0-9a-f]' * 32}*{suffix}")


def _content(path: Path) -> dict[str, Any]:
    """What `write` wrote into a file.

    Raises:
        OSError: It cannot be read.
        ValueError, RecursionError: It is another's, or of another form.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or content.get("form") != _FORM:
        raise ValueError("not a value that was kept")
    return content


def _complain(path: Path) -> None:
    global _complained
    logger.log(
        logging.DEBUG if _complained else logging.WARNING,
        "%s in the cache is not what kernelgraph writes: it is ignored, and will be written over",
        path,
    )
    _complained = True


def remember(known: dict[Any, Any], key: Any, value: Any, most: int = 1024) -> None:
    """Put ``value`` into a table that never grows beyond ``most`` entries."""
    if len(known) >= most:
        known.clear()
    known[key] = value
