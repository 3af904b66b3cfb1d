"""What a saved program says of its ops: read, checked and understood before anything of it is used.

The manifest is JSON among the extra files of torch's own archive, in ``kernelgraph/``::

    manifest.json             the ops, each with its form, its kernel and its calls; the kernels
    manifest.sha256           of that file
    references/<op>.<n>.pt2   the layers' own forwards, as programs
    files/<sha256>            the kernels' files, where they were put in

Other than the manifest these are base64 of zlib's format, since torch takes an extra file for text.
The manifest has the sha256 of every part of the archive, the weights too, in which torch itself
finds no damage. A digest keeps nobody from making another file, with another digest: whether to
trust the one who made it is asked elsewhere.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import reprlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kernelgraph.archive.compatibility import release_of
from kernelgraph.programs import Baked

FORMAT = "kernelgraph program"
VERSION = 1
_HOME = "kernelgraph/"
_MANIFEST, _DIGEST = f"{_HOME}manifest.json", f"{_HOME}manifest.sha256"

Json = Any


@dataclass(frozen=True)
class Op:
    """An op of the program."""

    name: str
    """As the graph has it, without its namespace."""
    kernel: str
    """The kernel's key."""
    stem: str
    """The name that kernel and form have together; ``name`` may have ``_training`` behind it."""
    form: Json
    """See `kernelgraph.programs.program_ops.Form`."""
    references: tuple[Json, ...]
    """See `kernelgraph.programs.references.Reference`."""
    untraced: str
    """Why there is no reference for some call."""
    device: str
    """The type."""
    schema: str
    calls: tuple[tuple[str, tuple[str, ...]], ...]
    """Of each call the path of the layer in the model, and what its operands are, for people."""

    def to_json(self) -> Json:
        """As JSON."""
        return {
            "kernel": self.kernel,
            "stem": self.stem,
            "form": self.form,
            "references": list(self.references),
            "untraced": self.untraced,
            "device": self.device,
            "schema": self.schema,
            "calls": [[path, list(operands)] for path, operands in self.calls],
        }


@dataclass(frozen=True)
class Manifest:
    """What a program says of itself."""

    kind: str
    """``program``, or ``aot`` where it is compiled."""
    torch: str
    """The version of torch that it was made with."""
    kernelgraph: str
    ops: Mapping[str, Op]
    kernels: Mapping[str, Baked]
    traced: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """The kernels whose own ops are in the program, by the ops' namespace: the key, and the type
    of device."""
    members: Mapping[str, str] = field(default_factory=dict)
    """The hex sha256 of each part of the archive but the manifest."""

    def to_json(self) -> Json:
        """As JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "torch": self.torch,
            "kernelgraph": self.kernelgraph,
            "ops": {name: op.to_json() for name, op in sorted(self.ops.items())},
            "kernels": {key: kernel.to_json() for key, kernel in sorted(self.kernels.items())},
            "traced": {name: list(kernel) for name, kernel in sorted(self.traced.items())},
            "members": dict(sorted(self.members.items())),
        }

    @classmethod
    def from_json(cls, data: Json, source: str) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            ValueError: It is not such JSON, or of a later version; the message names ``source``.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{source}: expected a {FORMAT}, got {reprlib.repr(data)}")
        if data.get("version") != VERSION:
            raise ValueError(
                f"{source}: its manifest is of version {data.get('version')}, and this kernelgraph "
                f"reads version {VERSION}: save the program again, or load it with "
                f"kernelgraph {data.get('kernelgraph')}"
            )
        try:
            kernels = {k: Baked.from_json(v, source) for k, v in data["kernels"].items()}
            ops = {name: _op(name, op) for name, op in data["ops"].items()}
            made = cls(
                data["kind"],
                data["torch"],
                data["kernelgraph"],
                ops,
                kernels,
                {str(name): (str(k), str(d)) for name, (k, d) in data["traced"].items()},
                dict(data["members"]),
            )
            known = {key for kernel in kernels.values() for _, key in kernel.uses}
            known |= {op.kernel for op in ops.values()} | {k for k, _ in made.traced.values()}
            wrong = [key for key, kernel in kernels.items() if kernel.key != key]
            if missing := [*(known - kernels.keys()), *wrong]:
                raise ValueError(f"there is no kernel {missing[0]}")
            release_of(made.torch)
            if made.kind not in ("program", "aot"):
                raise ValueError(f"there is no kind {made.kind!r}")
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{source}: its manifest cannot be understood: {type(error).__name__}: {error}"
            ) from error
        return made


def _op(name: str, data: Json) -> Op:
    texts = [data[key] for key in ("kernel", "stem", "untraced", "device", "schema")]
    if not all(isinstance(text, str) for text in (name, *texts)) or not name.isidentifier():
        raise ValueError(f"{name!r} is no op")
    return Op(
        name,
        data["kernel"],
        data["stem"],
        data["form"],
        tuple(data["references"]),
        data["untraced"],
        data["device"],
        data["schema"],
        tuple((str(path), tuple(map(str, operands))) for path, operands in data["calls"]),
    )


# --- the archive --------------------------------------------------------------------------------


def reference_file(op: str, number: int) -> str:
    """The extra file that holds a reference."""
    return f"{_HOME}references/{op}.{number}.pt2"


def blob_file(sha256: str) -> str:
    """The extra file that holds a file of a kernel."""
    return f"{_HOME}files/{sha256}"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A place to write a file of the same name to, which takes ``path`` once it is whole."""
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        made = scratch / path.name
        yield made
        os.replace(made, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def add_manifest(path: Path, manifest: Manifest, extra: Mapping[str, bytes]) -> None:
    """Put a manifest, and the files that it speaks of, into an archive that torch has written."""
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
    """Of a part of an archive, in hex; compiled code can be as large as its weights."""
    state = hashlib.sha256()
    with archive.open(name) as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()


class Archive:
    """A saved program. What is read of it is checked first.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no archive, has no manifest, or is not as it was saved.
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

    def _read(self, member: str) -> bytes:
        with self._reading(member):
            return self._zip.read(self._members[member])

    def _sha256(self, member: str) -> str:
        with self._reading(member):
            return _sha256(self._zip, self._members[member])

    @contextlib.contextmanager
    def _reading(self, member: str) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise ValueError(f"{self.source}: {member} is damaged: {error}") from error

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
        hashed = self.manifest.members
        there = self._members.keys() - {f"extra/{_MANIFEST}", f"extra/{_DIGEST}"}
        if there != hashed.keys():
            differing = ", ".join(sorted(there ^ hashed.keys())[:3])
            raise ValueError(f"{self.source}: parts of it were added or taken away: {differing}")
        for name, sha256 in hashed.items():
            if self._sha256(name) != sha256:
                raise ValueError(f"{self.source}: {name} was changed")

    def size(self, prefix: str = "") -> int:
        """How many bytes of the file are parts whose names start with ``prefix``."""
        sizes = ((i.filename.partition("/")[2], i.compress_size) for i in self._zip.infolist())
        return sum(size for name, size in sizes if name.startswith(prefix))

    def extra(self, name: str) -> bytes:
        """An extra file of ours.

        Raises:
            KeyError: There is none.
            ValueError: It cannot be understood.
        """
        content = self._read(f"extra/{name}")
        try:
            return zlib.decompress(base64.b64decode(content, validate=True))
        except (ValueError, zlib.error) as error:
            raise ValueError(f"{self.source}: {name} is damaged: {error}") from error

    @cached_property
    def blobs(self) -> Mapping[str, bytes]:
        """The files of kernels that are in it, by their hex sha256."""
        prefix = f"extra/{blob_file('')}"
        names = {n.removeprefix(prefix) for n in self._members if n.startswith(prefix)}
        return _Blobs(names, lambda sha256: self.extra(blob_file(sha256)))


@dataclass(frozen=True)
class _Blobs(Mapping[str, bytes]):
    """Each is read when it is asked for."""

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
