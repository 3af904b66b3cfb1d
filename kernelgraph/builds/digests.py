"""The digests of a variant's files: computed, and compared with those in its metadata.

Every function here sees the same files: those under the variant's directory, bytecode left out,
and no link that leads out of it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from kernelgraph.builds.metadata import ALGORITHMS, METADATA, Metadata

# No digest can list these: the file that holds it, and the signature made over that file.
UNLISTED = (METADATA, f"{METADATA}.sigstore")


def hash_files(directory: Path, algorithm: str = "sha256") -> dict[str, str]:
    """The base64 digest of each file of the variant in ``directory``, bytecode left out.

    Raises:
        ValueError: As for `files_in`.
    """
    return {name: encoded_digest(path, algorithm) for name, path in files_in(directory)}


def digest_files(directory: Path, algorithm: str = "sha256") -> dict[str, str]:
    """The digest of each file of the variant in ``directory``, as ``digest.files`` lists them.

    The list leaves out ``metadata.json`` itself, its signature, and bytecode.

    Raises:
        ValueError: The algorithm is not one that a digest may use; or as for `files_in`.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"unknown digest algorithm {algorithm!r}: there are {', '.join(ALGORITHMS)}"
        )
    hashes = hash_files(directory, algorithm)
    return {name: digest for name, digest in hashes.items() if name not in UNLISTED}


def content_hash(sha256: Mapping[str, str]) -> str:
    """The hash of a variant's whole content, in hex.

    The metadata belongs to the content, because it names the kernel and its devices; the
    metadata's signature does not.

    Args:
        sha256: The digests of the variant's files, from `hash_files`.
    """
    hashed = {file: digest for file, digest in sha256.items() if file not in UNLISTED[1:]}
    # Names of ops contain this hash, so the order of the files must not change: metadata is last.
    order = sorted(hashed, key=lambda file: (file == METADATA, file))
    lines = [f"{file}\0{hashed[file]}\n" for file in order]
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

    Metadata without a digest passes: there is nothing to check against.

    Args:
        directory: The variant.
        metadata: Its metadata.
        sha256: The result of ``digest_files(directory)``, where the caller has it already.

    Raises:
        ValueError: A file is missing, has changed or is not listed; the message names it. Also
            as for `digest_files`.
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
    """Whether a path is that of bytecode, which is never downloaded, listed or used."""
    return name.endswith((".pyc", ".pyo")) or "__pycache__" in name.split("/")


def files_in(directory: Path) -> Iterator[tuple[str, Path]]:
    """The files under ``directory``, bytecode left out, by relative path with forward slashes.

    Raises:
        ValueError: Something there is neither a file nor a directory, or it is a link that leads
            out of ``directory``. Links into the blobs of huggingface_hub's cache are allowed.
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
            if entry.is_symlink() and not _stays_inside(entry.path, inside):
                raise ValueError(f"{directory}: {relative} is a link that leads out of it")
            if entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, f"{relative}/"))
            elif _is_file(entry):
                yield relative, directory / relative
            else:
                raise ValueError(f"{directory}: {relative} is neither a file nor a directory")


def _blobs(root: Path) -> Iterator[Path]:
    # In huggingface_hub's cache every file of a snapshot is a link into the repository's blobs,
    # and one of those may be a link into the blobs that all repositories share.
    for parent in root.parents:
        if parent.name == "snapshots":
            for blobs in (parent.parent / "blobs", parent.parent.parent / "blobs"):
                if blobs.is_dir():
                    yield blobs.resolve()


def _stays_inside(link: str, inside: list[str]) -> bool:
    # Most links in huggingface_hub's cache lead to a plain file directly in one of the allowed
    # directories; the slow realpath, which looks at each directory on the way, is for the others.
    parent = os.path.dirname(link)  # no part of this path is itself a link
    end = os.path.normpath(os.path.join(parent, os.readlink(link)))
    if os.path.dirname(end) in inside and stat.S_ISREG(_mode(end)):
        return True
    return any(Path(os.path.realpath(link)).is_relative_to(place) for place in inside)


def _mode(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # links in a circle
        return False
