"""What a build says of itself in ``metadata.json``, and whether its files are what it says.

The format is that of the Hub's kernel repositories: ``id``, ``name``, ``version``, ``license``,
``python-depends``, ``kernel-depends``, ``backend`` (``type``, ``archs``) and ``digest``
(``algorithm``, ``files``: relative path to base64 digest), all optional here, because older builds
lack some or have no such file. Keys that are not known are left alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelgraph.builds.wanted import Wanted

if TYPE_CHECKING:
    from kernelgraph.selection import Target

METADATA = "metadata.json"
ALGORITHMS = ("sha256", "sha384", "sha512", "blake2b")

# No digest can list these: the file it stands in, and the signature made over that file.
UNLISTED = (METADATA, f"{METADATA}.sigstore")


@dataclass(frozen=True)
class Digest:
    """The digests that a build lists: pairs of a relative path and a base64 digest, by path."""

    algorithm: str
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Metadata:
    """A parsed ``metadata.json``; what it does not say is None or empty."""

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
    """The metadata of the variant in ``directory``; empty where it has none.

    Raises:
        ValueError: The file is not what the format says; the message names the file, the key and
            what was expected there.
    """
    path = directory / METADATA
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Metadata()
    return parse_metadata(data, str(path))


def parse_metadata(data: bytes, source: str = METADATA) -> Metadata:
    """Parse the content of a ``metadata.json``; ``source`` is the file that errors name.

    Raises:
        ValueError: As for `read_metadata`.
    """
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: expected a JSON object, got {reprlib.repr(content)}")
    top = _Reader(source, content)
    backend = _Reader(source, top.get("backend", dict, "an object") or {}, "backend.")
    backend_type = backend.text("type")
    return Metadata(
        id=top.text("id"),
        name=top.text("name"),
        version=top.get("version", (int, str), "a number or a string"),
        license=top.text("license"),
        python_depends=_python_depends(top, backend_type),
        kernel_depends=_kernel_depends(top),
        backend=backend_type,
        archs=backend.texts("archs"),
        digest=_digest(top),
    )


@dataclass(frozen=True)
class _Reader:
    """Typed access to the keys of one JSON object; null counts as absent."""

    source: str
    content: dict[str, Any]
    prefix: str = ""

    def error(self, key: str, expected: str, got: object) -> ValueError:
        return ValueError(
            f'{self.source}: "{self.prefix}{key}": expected {expected}, got {reprlib.repr(got)}'
        )

    def get(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        value = self.content.get(key)
        # To Python a bool is an int, to JSON it is not a number.
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise self.error(key, expected, value)
        return value

    def text(self, key: str) -> str | None:
        value: str | None = self.get(key, str, "a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.get(key, list, "a list of strings") or []
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, "a list of strings", values)
        return tuple(values)


def _python_depends(top: _Reader, backend: str | None) -> tuple[str, ...]:
    """A list, or lists by backend, of which ``general`` and the build's own are meant."""
    key = "python-depends"
    if not isinstance(by_backend := top.content.get(key), dict):
        return top.texts(key)
    lists = _Reader(top.source, by_backend, f"{key}.")
    return tuple(
        requirement
        for name in by_backend
        for requirement in lists.texts(name)
        if name in ("general", backend)
    )


def _kernel_depends(top: _Reader) -> tuple[Wanted, ...]:
    """A list of objects with a ``repo-id`` and either a ``version`` or a ``revision``."""
    key = "kernel-depends"
    entries = top.get(key, list, "a list of objects") or []
    return tuple(read_wanted(top.source, f"{key}[{i}]", entry) for i, entry in enumerate(entries))


def read_wanted(source: str, key: str, content: object) -> Wanted:
    """A dependency on a kernel, as ``metadata.json`` and lock files write it.

    Raises:
        ValueError: It is not what the format says; the message names ``source`` and ``key``.
    """
    if not isinstance(content, dict):
        raise ValueError(f'{source}: "{key}": expected an object, got {reprlib.repr(content)}')
    entry = _Reader(source, content, f"{key}.")
    repo_id = entry.text("repo-id")
    revision = entry.text("revision")
    version = entry.get("version", (int, str), "a number or a string")
    try:
        if repo_id is None or (revision is None) == (version is None):
            raise ValueError('expected "repo-id", and either "version" or "revision"')
        return Wanted(repo_id, revision, version)
    except ValueError as error:
        raise ValueError(f'{source}: "{key}": {error}') from error


def _digest(top: _Reader) -> Digest | None:
    content = top.get("digest", dict, "an object")
    if content is None:
        return None
    digest = _Reader(top.source, content, "digest.")
    algorithm = digest.text("algorithm")
    if algorithm not in ALGORITHMS:
        raise digest.error("algorithm", f"one of {', '.join(ALGORITHMS)}", algorithm)
    files = digest.get("files", dict, "an object")
    if files is None:
        raise digest.error("files", "an object", files)
    for name, value in files.items():
        if not isinstance(value, str):
            raise _Reader(top.source, files, "digest.files.").error(name, "a string", value)
        if leaves(name):
            raise digest.error("files", "paths inside the variant's directory", name)
    return Digest(algorithm, tuple(sorted(files.items())))


# Absolute, on a drive, with a step upwards, or no path at all; with either kind of slash.
_LEAVES = re.compile(r"$|[/\\]|.:|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)


def leaves(name: str) -> bool:
    """Whether a relative path leads out of where it starts, on any system."""
    return _LEAVES.match(name) is not None


# --- the files on disk ------------------------------------------------------------------------


def hash_files(directory: Path, algorithm: str = "sha256") -> dict[str, str]:
    """The base64 digest of each file of the variant in ``directory``, bytecode aside."""
    return {name: encoded_digest(path, algorithm) for name, path in files_in(directory)}


def digest_files(directory: Path, algorithm: str = "sha256") -> dict[str, str]:
    """The digest of each file of the variant in ``directory``, as ``digest.files`` lists them.

    Left out are ``metadata.json`` itself, its signature, and bytecode.

    Raises:
        ValueError: The algorithm is not one that a digest may use, or something there is neither
            a file nor a directory, or a link that leads out of ``directory``.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"unknown digest algorithm {algorithm!r}: there are {', '.join(ALGORITHMS)}"
        )
    hashes = hash_files(directory, algorithm)
    return {name: digest for name, digest in hashes.items() if name not in UNLISTED}


def content_hash(sha256: Mapping[str, str]) -> str:
    """The hash of a variant's whole content, in hex, given its `hash_files`.

    The metadata belongs to the content: it names the kernel and its devices.
    """
    known = {file: digest for file, digest in sha256.items() if file not in UNLISTED[1:]}
    # Where the metadata stands is part of the hash, and so of the names of ops.
    order = sorted(known, key=lambda file: (file == METADATA, file))
    lines = [f"{file}\0{known[file]}\n" for file in order]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def encoded_digest(file: Path | bytes, algorithm: str = "sha256") -> str:
    """The base64 digest of a file, or of bytes."""
    state = hashlib.new(algorithm)
    if isinstance(file, bytes):
        state.update(file)
    else:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                state.update(block)
    return base64.b64encode(state.digest()).decode()


def verify(directory: Path, metadata: Metadata, sha256: Mapping[str, str] | None = None) -> None:
    """Check every file of the variant in ``directory`` against the digest in its metadata.

    Metadata without a digest has nothing to check against.

    Args:
        directory: The variant.
        metadata: What was read from it.
        sha256: What ``digest_files(directory)`` returned, where the caller has it already.

    Raises:
        ValueError: A file is missing, has changed or is not listed; the message names it. Also
            what `digest_files` raises.
    """
    if metadata.digest is None:
        return
    algorithm = metadata.digest.algorithm
    if algorithm == "sha256" and sha256 is not None:
        found = sha256
    else:
        found = digest_files(directory, algorithm)
    listed = {name: value for name, value in metadata.digest.files if not is_bytecode(name)}
    problems = {
        "missing": sorted(listed.keys() - found.keys()),
        "changed": sorted(n for n in listed.keys() & found.keys() if listed[n] != found[n]),
        "not listed": sorted(found.keys() - listed.keys()),
    }
    shown = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
    if shown:
        raise ValueError(f"{directory} does not match the digest in its {METADATA}: {shown}")


def is_bytecode(name: str) -> bool:
    """Whether a path is that of bytecode, which is never downloaded, listed nor used."""
    return name.endswith((".pyc", ".pyo")) or "__pycache__" in name.split("/")


def files_in(directory: Path) -> Iterator[tuple[str, Path]]:
    """The files under ``directory``, bytecode aside, by relative path with forward slashes.

    Raises:
        ValueError: Something there is neither a file nor a directory, or a link that leads out.
    """
    root = directory.resolve()
    inside = [str(place) for place in (root, *_blobs(root))]
    folders = [(str(root), "")]
    while folders:
        folder, prefix = folders.pop()
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            relative = prefix + entry.name
            if is_bytecode(relative):
                continue
            if entry.is_symlink() and not _leads_inside(entry.path, inside):
                raise ValueError(f"{directory}: {relative} is a link that leads out of it")
            if entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, f"{relative}/"))
            elif _is_file(entry):
                yield relative, directory / relative
            else:
                raise ValueError(f"{directory}: {relative} is neither a file nor a directory")


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # links in a circle
        return False


def _leads_inside(link: str, inside: list[str]) -> bool:
    # A link to a plain file right in one of the places, which is what there is in
    # huggingface_hub's cache, needs no look at each directory on the way.
    parent = os.path.dirname(link)  # of which no part is a link itself
    end = os.path.normpath(os.path.join(parent, os.readlink(link)))
    if os.path.dirname(end) in inside and stat.S_ISREG(_mode(end)):
        return True
    return any(Path(os.path.realpath(link)).is_relative_to(place) for place in inside)


def _mode(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0


def _blobs(root: Path) -> Iterator[Path]:
    # In huggingface_hub's cache every file of a snapshot is a link into the repository's blobs,
    # and one of those may be a link into the blobs that all repositories share.
    for parent in root.parents:
        if parent.name == "snapshots":
            for blobs in (parent.parent / "blobs", parent.parent.parent / "blobs"):
                if blobs.is_dir():
                    yield blobs.resolve()


# --- the device ---------------------------------------------------------------------------------


def gfx_of(target: Target) -> str | None:
    """The ROCm architecture of the current device, where there is one."""
    if target.type != "rocm":
        return None
    import torch

    if torch.version.hip is None or not torch.cuda.is_available():
        return None
    return getattr(torch.cuda.get_device_properties(), "gcnArchName", None)


class OtherDevice(ValueError):
    """A build was compiled for other devices."""


_CUDA_ARCH = re.compile(r"(\d{1,3})\.(\d)([af]?)(\+PTX)?", re.ASCII)


def check_archs(metadata: Metadata, target: Target, gfx: str | None = None) -> None:
    """Refuse a build that was compiled for other devices than ``target``.

    CUDA: code for 8.0 runs on 8.0 and later minor versions of 8; ``9.0a`` on 9.0 alone; ``10.0f``
    on its family, like code without a suffix; ``9.0+PTX`` is compiled on the spot for anything
    newer. ROCm: the names have to be the same. A notation that is not known refuses nothing, nor
    does a device of which nothing is known.

    Args:
        metadata: Of the build.
        target: The device that it is wanted for.
        gfx: The device's ROCm architecture, such as ``gfx942``, where it is known.

    Raises:
        OtherDevice: The build excludes the device; the message names its archs and the device.
    """
    if not metadata.archs or metadata.backend != target.type:
        return
    device = None
    if target.type == "cuda" and target.capability is not None:
        capability = target.capability
        if not any(_cuda_arch_runs_on(arch, capability) for arch in metadata.archs):
            device = f"cuda {capability // 10}.{capability % 10}"
    if target.type == "rocm" and gfx is not None:
        # Features may follow the name, of which archs say nothing: gfx90a:sramecc+:xnack-.
        name = gfx.split(":")[0]
        if name not in {arch.split(":")[0] for arch in metadata.archs}:
            device = name
    if device is not None:
        raise OtherDevice(f"built for {', '.join(metadata.archs)}, and this device is {device}")


def _cuda_arch_runs_on(arch: str, capability: int) -> bool:
    parts = _CUDA_ARCH.fullmatch(arch)
    if parts is None:
        return True
    built = int(parts[1]) * 10 + int(parts[2])
    if parts[3] == "a":
        return built == capability
    if parts[4]:
        return built <= capability
    return built <= capability and built // 10 == capability // 10
