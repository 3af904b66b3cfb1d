"""Kernels that a program has baked in: what is noted of them when it is saved.

A program names its kernels by their content: a commit on the Hub, or for a kernel from a disk the
hash of its files. Of the build that it was exported with, and of those that are put into its file,
every file is noted with its digest; of the others that the Hub lists, a digest of the listing.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernelgraph.builds import (
    UNLISTED,
    Checked,
    Origin,
    Wanted,
    builds_at,
    content_hash,
    encoded_digest,
    hash_files,
    is_commit,
    leads_out,
    module_kernel,
    read_metadata,
    read_wanted,
    verify,
)
from kernelgraph.hub import (
    Finder,
    Hub,
    check_kernel,
    check_local_kernel,
    content_digest,
    list_build,
    resolve,
)
from kernelgraph.selection import Target


@dataclass(frozen=True)
class Build:
    """One variant of a kernel, all of whose files are known."""

    package: str
    """The package in it; empty where it is itself the package."""
    sha256: Mapping[str, str]
    """The base64 digest of every file, by relative path."""

    @property
    def content(self) -> str:
        """The hash of the whole content, in hex."""
        return content_hash(self.sha256)


@dataclass(frozen=True)
class Baked:
    """A kernel, as the manifest of a program has it."""

    repository: str
    """The Hub id, or the path that it was loaded from."""
    name: str
    revision: str
    """The commit; of one from a disk, the hash of the content that it was exported with."""
    digests: Mapping[str, str]
    """Of each variant that the Hub lists, a digest of the listing."""
    builds: Mapping[str, Build]
    """By variant: the one that the program was exported with, and those in the program's file."""
    uses: tuple[tuple[Wanted, str], ...] = ()
    """The kernels that it uses: what it asks for, and the key."""

    @property
    def key(self) -> str:
        """What the manifest calls it."""
        return f"{self.repository}@{self.revision}"

    @property
    def commit(self) -> str | None:
        """The commit, of one from the Hub."""
        return self.revision if is_commit(self.revision) else None

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that there are, as far as is known."""
        return tuple(sorted({*self.digests, *self.builds}))

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision[:8]}"

    def to_json(self) -> Any:
        """As JSON."""
        builds = {
            variant: {"package": build.package, "files": dict(sorted(build.sha256.items()))}
            for variant, build in sorted(self.builds.items())
        }
        uses = [
            {"repo-id": w.repo_id, "revision": w.revision, "version": w.version, "kernel": key}
            for w, key in self.uses
        ]
        return {
            "repository": self.repository,
            "name": self.name,
            "revision": self.revision,
            "digests": dict(sorted(self.digests.items())),
            "builds": builds,
            "uses": uses,
        }

    @classmethod
    def from_json(cls, data: Any, source: str) -> Baked:
        """The inverse of `to_json`.

        Raises:
            ValueError: It is not such JSON; the message names ``source``.
        """
        repository, name, revision = (data[key] for key in ("repository", "name", "revision"))
        digests, builds = dict(data["digests"]), {}
        for variant, build in data["builds"].items():
            for file in (variant, *build["files"]):
                if leads_out(file) or "\0" in file:
                    raise ValueError(f"{source}: {file!r} is no path inside a kernel")
            builds[variant] = Build(build["package"], dict(build["files"]))
        texts = [repository, name, revision, *digests, *digests.values()]
        texts += [text for b in builds.values() for text in (b.package, *b.sha256.values())]
        if not all(isinstance(text, str) for text in texts) or "/" in "".join((*builds, *digests)):
            raise ValueError(f"{source}: {repository!r} is not described by texts")
        if any(leads_out(build.package) for build in builds.values() if build.package):
            raise ValueError(f"{source}: {repository!r} has a package outside of it")
        uses = tuple((read_wanted(source, "uses", used), used["kernel"]) for used in data["uses"])
        baked = cls(repository, name, revision, digests, builds, uses)
        # The names of ops are made from the revision.
        if not baked.commit and revision not in [build.content for build in builds.values()]:
            raise ValueError(f"{source}: kernel {baked} is not what the program was exported with")
        return baked


# --- noting -------------------------------------------------------------------------------------


def kernels_of(
    origin: Origin, module: str, target: Target
) -> tuple[str, Mapping[str, Baked], Mapping[str, Checked]]:
    """What to note of the kernel that a module belongs to, and the kernels on this machine.

    Args:
        origin: Where it comes from.
        module: The name of the module.
        target: The device that it was loaded for.

    Returns:
        The kernel's key; and by their keys, it and those that it uses.

    Raises:
        ValueError: It comes from no kernel repository.
        OSError: Its files cannot be found again.
    """
    kernel = module_kernel(module)
    if kernel is None:  # another package loaded it
        if not origin.variant:
            raise ValueError(
                f"{origin.repository} is no kernel repository, from which another process could "
                "load it: put the kernel into one"
            )
        finder = Finder(Hub(), trust_remote_code=True)  # it is running here already
        if is_commit(origin.revision):
            kernel = check_kernel(Wanted(origin.repository, origin.revision), target, finder)
        else:
            path = Path(origin.repository, "build", origin.variant)
            kernel = check_local_kernel(path, target, finder, origin.repository)
    found: dict[str, Baked] = {}
    here: dict[str, Checked] = {}
    return _note(kernel, found, here), found, here


def _note(kernel: Checked, found: dict[str, Baked], here: dict[str, Checked]) -> str:
    origin = kernel.origin
    wanted = {w.repo_id: w for w in read_metadata(kernel.directory).kernel_depends}
    used = kernel.dependencies.items()
    uses = tuple((wanted[repo_id], _note(one, found, here)) for repo_id, one in used)
    builds = {origin.variant: Build(kernel.package, _files_of(kernel))}
    repository = origin.repository
    if not is_commit(origin.revision):  # a path, which may have been a relative one
        build = kernel.directory.parent
        repository = str(build.parent if build.name == "build" else kernel.directory)
    baked = Baked(repository, origin.name, origin.revision, {}, builds, uses)
    found[baked.key], here[baked.key] = baked, kernel
    return baked.key


def noted_again(
    kernels: Mapping[str, Baked], key: str, kernel: Checked
) -> tuple[dict[str, Baked], dict[str, Checked]]:
    """What to note of a kernel that was baked in, had again as ``kernel``: as `kernels_of`, but
    that it is still the one that the program was exported with."""
    baked = kernels[key]
    builds = {**baked.builds, kernel.origin.variant: Build(kernel.package, _files_of(kernel))}
    found, here = {key: replace(baked, builds=builds)}, {key: kernel}
    for wanted, used in baked.uses:
        if wanted.repo_id in kernel.dependencies:
            more = noted_again(kernels, used, kernel.dependencies[wanted.repo_id])
            found, here = found | more[0], here | more[1]
    return found, here


def _files_of(kernel: Checked) -> Mapping[str, str]:
    """The digest of every file of a kernel that was loaded, its metadata's too."""
    unlisted = {
        name: encoded_digest(kernel.directory / name)
        for name in UNLISTED
        if (kernel.directory / name).is_file()
    }
    files = {**kernel.sha256, **unlisted}
    if content_hash(files) != kernel.content:
        raise ValueError(f"{kernel.directory} has changed since kernel {kernel.origin} was loaded")
    return files


def listed(baked: Baked, hub: Hub) -> Baked:
    """``baked`` with a digest of each variant that the Hub lists, where it can be asked."""
    if baked.commit is None:
        return baked
    try:
        kernel = resolve(hub, Wanted(baked.repository, baked.commit))
        variants = list_build(hub, kernel)
    except (OSError, ValueError):
        return baked
    return replace(
        baked, digests={v: content_digest(files, {}) for v, files in variants.items() if files}
    )


def every_build(baked: Baked, kernel: Checked, hub: Hub) -> tuple[Baked, dict[str, Path]]:
    """``baked`` with all variants of the kernel, and where they are; the Hub's are downloaded.

    Raises:
        ValueError: A variant is not what its metadata, or the Hub, says.
        OSError: The Hub could not be asked.
    """
    if baked.commit is None:
        build = kernel.directory.parent
        root = build.parent if build.name == "build" else kernel.directory
        directories = {path.name: path for path in builds_at(root, str(root))}
    else:
        finder = Finder(hub, trust_remote_code=True)  # it is running here already
        found = finder.find(Wanted(baked.repository, baked.commit))
        directories = {v: finder.fetch(found, v).directory for v in found.variants}
    builds = dict(baked.builds)
    for variant, directory in directories.items():
        if variant not in builds:
            verify(directory, read_metadata(directory))
            builds[variant] = Build(kernel.package, hash_files(directory))
    return replace(baked, builds=builds), directories


def blobs_of(build: Build, directory: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a build: the hex sha256 of each, and its content.

    Raises:
        ValueError: One has changed since it was noted.
    """
    for name, digest in build.sha256.items():
        content = (directory / name).read_bytes()
        if encoded_digest(content) != digest:
            raise ValueError(f"{directory / name} has changed since the kernel was loaded")
        yield hex_of(digest), content


def hex_of(digest: str) -> str:
    """A base64 digest in hex."""
    return b64decode(digest).hex()
