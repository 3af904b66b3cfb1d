"""The metadata of a build: the content of its ``metadata.json``.

The format is that of the Hub's kernel repositories: ``id``, ``name``, ``version``, ``license``,
``python-depends``, ``kernel-depends``, ``backend`` (``type``, ``archs``) and ``digest``
(``algorithm``, ``files``: relative path to base64 digest). Every key is optional here, because
older builds lack some of them or have no such file. Unknown keys are ignored.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kernelgraph.builds.wanted import Wanted

T = TypeVar("T")

METADATA = "metadata.json"
ALGORITHMS = ("sha256", "sha384", "sha512", "blake2b")


@dataclass(frozen=True)
class Digest:
    """The digests that a build lists: pairs of a relative path and a base64 digest, by path."""

    algorithm: str
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Metadata:
    """A parsed ``metadata.json``; a key that it lacks is None or empty."""

    id: str | None = None
    name: str | None = None
    version: int | str | None = None
    license: str | None = None
    python_depends: tuple[str, ...] = ()
    """The general requirements, and those for the build's own backend."""
    kernel_depends: tuple[Wanted, ...] = ()
    """The kernels that this one uses."""
    backend: str | None = None
    archs: tuple[str, ...] = ()
    digest: Digest | None = None


def read_metadata(directory: Path) -> Metadata:
    """Read the metadata of the variant in ``directory``; it is empty where there is no such file.

    Raises:
        ValueError: The file does not follow the format; the message names the file, the key and
            the value that was expected there.
    """
    path = directory / METADATA
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Metadata()
    return parse_metadata(data, str(path))


def parse_metadata(data: bytes, source: str = METADATA) -> Metadata:
    """Parse the content of a ``metadata.json``; errors name ``source`` as the file.

    Raises:
        ValueError: As for `read_metadata`.
    """
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: expected a JSON object, got {reprlib.repr(content)}")
    top = _Object(source, content)
    backend = top.nested("backend") or _Object(source, {})
    backend_type = backend.text("type")
    return Metadata(
        id=top.text("id"),
        name=top.text("name"),
        version=top.version(),
        license=top.text("license"),
        python_depends=_python_depends(top, backend_type),
        kernel_depends=_kernel_depends(top),
        backend=backend_type,
        archs=backend.texts("archs"),
        digest=_digest(top),
    )


@dataclass(frozen=True)
class _Object:
    """One JSON object, with typed access to its keys; null counts as absent."""

    source: str
    content: Mapping[str, object]
    prefix: str = ""
    """The keys that lead to this object, each followed by a dot."""

    def error(self, key: str, expected: str, got: object) -> ValueError:
        return ValueError(
            f'{self.source}: "{self.prefix}{key}": expected {expected}, got {reprlib.repr(got)}'
        )

    def get(self, key: str, cls: type[T], expected: str) -> T | None:
        value = self.content.get(key)
        # A bool is an int in Python, but not a number in JSON.
        if value is not None and (not isinstance(value, cls) or isinstance(value, bool)):
            raise self.error(key, expected, value)
        return value

    def text(self, key: str) -> str | None:
        return self.get(key, str, "a string")

    def version(self) -> int | str | None:
        value = self.content.get("version")
        if isinstance(value, str):
            return value
        return self.get("version", int, "a number or a string")

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.get(key, list, "a list of strings") or []
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, "a list of strings", values)
        return tuple(values)

    def nested(self, key: str) -> _Object | None:
        content = self.get(key, dict, "an object")
        return None if content is None else _Object(self.source, content, f"{self.prefix}{key}.")


def _python_depends(top: _Object, backend: str | None) -> tuple[str, ...]:
    """The requirements from a list, or from a dict of lists by backend.

    Of such a dict, the list ``general`` and the one of the build's own backend count.
    """
    key = "python-depends"
    by_backend = top.content.get(key)
    if not isinstance(by_backend, dict):
        return top.texts(key)
    lists = _Object(top.source, by_backend, f"{key}.")
    return tuple(
        requirement
        for name in by_backend
        for requirement in lists.texts(name)
        if name in ("general", backend)
    )


def _kernel_depends(top: _Object) -> tuple[Wanted, ...]:
    """A list of objects with a ``repo-id`` and either a ``version`` or a ``revision``."""
    key = "kernel-depends"
    entries = top.get(key, list, "a list of objects") or []
    return tuple(read_wanted(top.source, f"{key}[{i}]", entry) for i, entry in enumerate(entries))


def read_wanted(source: str, key: str, content: object) -> Wanted:
    """Parse a dependency on a kernel, as ``metadata.json`` and lock files write it.

    Args:
        source: The file that errors name.
        key: The key that errors name.
        content: The value of that key.

    Raises:
        ValueError: It does not follow the format; the message names ``source`` and ``key``.
    """
    if not isinstance(content, dict):
        raise ValueError(f'{source}: "{key}": expected an object, got {reprlib.repr(content)}')
    entry = _Object(source, content, f"{key}.")
    repo_id = entry.text("repo-id")
    revision = entry.text("revision")
    version = entry.version()
    try:
        if repo_id is None or (revision is None) == (version is None):
            raise ValueError('expected "repo-id", and either "version" or "revision"')
        return Wanted(repo_id, revision, version)
    except ValueError as error:
        raise ValueError(f'{source}: "{key}": {error}') from error


def _digest(top: _Object) -> Digest | None:
    digest = top.nested("digest")
    if digest is None:
        return None
    algorithm = digest.text("algorithm")
    if algorithm not in ALGORITHMS:
        raise digest.error("algorithm", f"one of {', '.join(ALGORITHMS)}", algorithm)
    listed = digest.nested("files")
    if listed is None:
        raise digest.error("files", "an object", None)
    files = []
    for name in listed.content:
        value = listed.text(name)
        if value is None:
            raise listed.error(name, "a string", None)
        if leads_out(name):
            raise digest.error("files", "paths inside the variant's directory", name)
        files.append((name, value))
    return Digest(algorithm, tuple(sorted(files)))


# An absolute path, one on a drive, one with a step upwards, or an empty one; with either slash.
_LEADS_OUT = re.compile(r"$|[/\\]|.:|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)


def leads_out(path: str) -> bool:
    """Whether a relative path leads out of the directory where it starts, on any system."""
    return _LEADS_OUT.match(path) is not None
