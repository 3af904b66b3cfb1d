"""The file of a saved program: torch's own archive, with a manifest and more among its extra files.

The extra files of this package are in ``kernelgraph/``::

    manifest.json             the manifest, see `kernelgraph.archive.manifest`
    manifest.sha256           its digest
    references/<op>.<n>.pt2   the layers' own forwards, as programs
    files/<sha256>            the kernels' files, if the program was saved with them

All but the manifest and its digest are in base64 of zlib's format, since torch reads an extra file
as text. The manifest has the sha256 of every part of the archive, also of the weights, in which
torch itself notices no damage.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kernelgraph.archive.manifest import Manifest

_HOME = "kernelgraph/"
_MANIFEST, _DIGEST = f"{_HOME}manifest.json", f"{_HOME}manifest.sha256"


def reference_file(op: str, number: int) -> str:
    """Return the name of the extra file for a reference of an op."""
    return f"{_HOME}references/{op}.{number}.pt2"


def blob_file(sha256: str) -> str:
    """Return the name of the extra file for a file of a kernel."""
    return f"{_HOME}files/{sha256}"


# --- writing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to, which replaces ``path`` once the block has ended well."""
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        made = scratch / path.name
        yield made
        os.replace(made, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def add_manifest(path: Path, manifest: Manifest, extra: Mapping[str, bytes]) -> None:
    """Add extra files, and a manifest with the digests of all parts, to an archive of torch."""
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]

        def write(name: str, content: bytes) -> None:
            archive.writestr(f"{root}/extra/{name}", content)

        for name, content in extra.items():
            write(name, base64.b64encode(zlib.compress(content, 6)))
    with zipfile.ZipFile(path, "a") as archive:
        members = {name.partition("/")[2]: _sha256(archive, name) for name in archive.namelist()}
        content = json.dumps({**manifest.to_json(), "members": members}, indent=1).encode()
        write(_MANIFEST, content)
        write(_DIGEST, hashlib.sha256(content).hexdigest().encode())


def _sha256(archive: zipfile.ZipFile, name: str) -> str:
    """Return the hex sha256 of a part, read in blocks: compiled code can hold all the weights."""
    state = hashlib.sha256()
    with archive.open(name) as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()


# --- reading ------------------------------------------------------------------------------------


class Archive:
    """A saved program, opened for reading. All its parts are checked when it is opened.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no archive, has no manifest, or differs from its manifest.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.source = str(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        try:
            self._zip = zipfile.ZipFile(self.path)
            names = self._zip.namelist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.source}: it is no archive of torch's: {error}") from error
        self._root = names[0].partition("/")[0] if names else ""
        self._members = {name.partition("/")[2]: name for name in names}
        if len(self._members) != len(names) or {n.partition("/")[0] for n in names} != {self._root}:
            raise ValueError(f"{self.source}: it has two parts of one name, or of two archives")
        self.manifest = self._read_manifest()
        self._check_members()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exc: object) -> None:
        self._zip.close()

    def size(self, prefix: str = "") -> int:
        """Return the number of bytes in the file of the parts whose names start with ``prefix``."""
        sizes = ((i.filename.partition("/")[2], i.compress_size) for i in self._zip.infolist())
        return sum(size for name, size in sizes if name.startswith(prefix))

    def extra(self, name: str) -> bytes:
        """Return the content of an extra file of this package.

        Raises:
            KeyError: If there is none of this name.
            ValueError: If it cannot be decoded.
        """
        content = self._read(f"extra/{name}")
        try:
            return zlib.decompress(base64.b64decode(content, validate=True))
        except (ValueError, zlib.error) as error:
            raise ValueError(f"{self.source}: {name} is damaged: {error}") from error

    @cached_property
    def blobs(self) -> Mapping[str, bytes]:
        """The kernels' files in the archive, by their hex sha256."""
        prefix = f"extra/{blob_file('')}"
        names = {n.removeprefix(prefix) for n in self._members if n.startswith(prefix)}
        return _Blobs(names, lambda sha256: self.extra(blob_file(sha256)))

    # --- checks ---------------------------------------------------------------------------------

    def _read_manifest(self) -> Manifest:
        if f"extra/{_MANIFEST}" not in self._members or f"extra/{_DIGEST}" not in self._members:
            raise ValueError(
                f"{self.source}: it was not written by kernelgraph.save; torch.export.load loads "
                "a program that has no kernels in it"
            )
        content = self._read(f"extra/{_MANIFEST}")
        if self._read(f"extra/{_DIGEST}").decode("latin-1") != hashlib.sha256(content).hexdigest():
            raise ValueError(f"{self.source}: its manifest was changed")
        try:
            data = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.source}: its manifest is no JSON: {error}") from error
        return Manifest.from_json(data, self.source)

    def _check_members(self) -> None:
        expected = self.manifest.members
        found = self._members.keys() - {f"extra/{_MANIFEST}", f"extra/{_DIGEST}"}
        if found != expected.keys():
            differing = ", ".join(sorted(found ^ expected.keys())[:3])
            raise ValueError(f"{self.source}: parts of it were added or taken away: {differing}")
        for name, sha256 in expected.items():
            with self._naming_damage(name):
                actual = _sha256(self._zip, self._members[name])
            if actual != sha256:
                raise ValueError(f"{self.source}: {name} was changed")

    def _read(self, member: str) -> bytes:
        with self._naming_damage(member):
            return self._zip.read(self._members[member])

    @contextlib.contextmanager
    def _naming_damage(self, member: str) -> Iterator[None]:
        """Turn errors of `zipfile` into one that names the damaged part."""
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise ValueError(f"{self.source}: {member} is damaged: {error}") from error


@dataclass(frozen=True)
class _Blobs(Mapping[str, bytes]):
    """A mapping whose values are read from the archive at each access."""

    names: set[str]
    read: Callable[[str], bytes]

    def __getitem__(self, key: str) -> bytes:
        if key not in self.names:
            raise KeyError(key)
        return self.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, key: object) -> bool:
        return key in self.names
