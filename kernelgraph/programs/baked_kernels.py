"""The records of the kernels that a program has baked in.

A program names its kernels by their content: a commit on the Hub, or for a kernel from a disk the
hash of its files. For the build that the program was exported with, and for those that are put into
its file, the record has a digest of every file. For the other builds that the Hub lists, it has a
digest of the listing.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

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
from kernelgraph.kernel import Kernel
from kernelgraph.programs.portable_json import Json, NotPortable, as_array, as_object, as_text
from kernelgraph.selection import Device, Mode, Selection, Target


@dataclass(frozen=True)
class Build:
    """One variant of a kernel, with a digest of every file."""

    package: str
    """The Python package in the variant; empty where the variant is the package itself."""
    sha256: Mapping[str, str]
    """The base64 digest of every file, by relative path."""

    @property
    def content(self) -> str:
        """The hash of the whole content, in hex."""
        return content_hash(self.sha256)


@dataclass(frozen=True)
class Baked:
    """The record of a kernel in the manifest of a program."""

    repository: str
    """The repository id on the Hub, or the path that the kernel was loaded from."""
    name: str
    revision: str
    """The commit; for a kernel from a disk, the hash of the files that it was exported with."""
    digests: Mapping[str, str]
    """For each variant that the Hub lists, a digest of the listing."""
    builds: Mapping[str, Build]
    """The build that the program was exported with and those in its file, by variant."""
    uses: tuple[tuple[Wanted, str], ...] = ()
    """The kernels that it uses: the dependency it declares, and the key of its record."""

    @property
    def key(self) -> str:
        """The key of the record in the manifest."""
        return f"{self.repository}@{self.revision}"

    @property
    def commit(self) -> str | None:
        """The commit; None for a kernel from a disk."""
        return self.revision if is_commit(self.revision) else None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision[:8]}"

    def to_json(self) -> Json:
        """Return the record as JSON."""
        builds: dict[str, Json] = {
            variant: {"package": build.package, "files": dict(sorted(build.sha256.items()))}
            for variant, build in sorted(self.builds.items())
        }
        uses: list[Json] = [
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
    def from_json(cls, data: Json, source: str) -> Baked:
        """Return the record from what `to_json` returned.

        Args:
            data: The JSON.
            source: The name of the program in errors.

        Raises:
            ValueError: If it is not such JSON.
            KeyError: If a part of it is missing.
        """
        parts = as_object(data)
        repository, name, revision = (
            as_text(parts[key]) for key in ("repository", "name", "revision")
        )
        digests = _texts(parts["digests"])
        builds = {
            variant: _build_from_json(variant, build, source)
            for variant, build in as_object(parts["builds"]).items()
        }
        if "/" in "".join((*builds, *digests)):
            raise ValueError(f"{source}: {repository!r} has a variant with a slash in its name")
        uses = tuple(
            (read_wanted(source, "uses", used), as_text(as_object(used)["kernel"]))
            for used in as_array(parts["uses"])
        )
        baked = cls(repository, name, revision, digests, builds, uses)
        # The names of ops are made from the revision.
        if not baked.commit and revision not in [build.content for build in builds.values()]:
            raise ValueError(f"{source}: kernel {baked} is not what the program was exported with")
        return baked


def _texts(data: Json) -> dict[str, str]:
    return {key: as_text(value) for key, value in as_object(data).items()}


def _build_from_json(variant: str, data: Json, source: str) -> Build:
    parts = as_object(data)
    build = Build(as_text(parts["package"]), _texts(parts["files"]))
    for file in (variant, *build.sha256):
        if leads_out(file) or "\0" in file:
            raise ValueError(f"{source}: {file!r} is no path inside a kernel")
    if build.package and leads_out(build.package):
        raise ValueError(f"{source}: variant {variant!r} has a package outside of it")
    return build


# --- kernels on this machine --------------------------------------------------------------------


class KernelRecords(NamedTuple):
    """The records of a kernel and of those that it uses, and what they are on this machine."""

    key: str
    """The key of the kernel."""
    baked: Mapping[str, Baked]
    """The records, by key."""
    checked: Mapping[str, Checked]
    """The kernels on this machine, by key."""


def record_kernel(origin: Origin, module: str, target: Target) -> KernelRecords:
    """Return the records of the kernel that a module belongs to.

    Args:
        origin: The origin of the module.
        module: The name of the module.
        target: The device that the kernel was loaded for.

    Raises:
        ValueError: If it comes from no kernel repository.
        OSError: If its files cannot be found again.
    """
    kernel = module_kernel(module)
    if kernel is None:
        kernel = _kernel_of_others(origin, target)
    baked: dict[str, Baked] = {}
    checked: dict[str, Checked] = {}
    return KernelRecords(_add_records(kernel, baked, checked), baked, checked)


def _kernel_of_others(origin: Origin, target: Target) -> Checked:
    """Find the files of a kernel that another package has loaded."""
    if not origin.variant:
        raise ValueError(
            f"{origin.repository} is no kernel repository, from which another process could "
            "load it: put the kernel into one"
        )
    finder = Finder(Hub(), trust_remote_code=True)  # its code runs here already
    if is_commit(origin.revision):
        return check_kernel(Wanted(origin.repository, origin.revision), target, finder)
    path = Path(origin.repository, "build", origin.variant)
    return check_local_kernel(path, target, finder, origin.repository)


def _add_records(kernel: Checked, baked: dict[str, Baked], checked: dict[str, Checked]) -> str:
    """Add the records of a kernel and of those that it uses; return its key."""
    origin = kernel.origin
    declared = {w.repo_id: w for w in read_metadata(kernel.directory).kernel_depends}
    uses = tuple(
        (declared[repo_id], _add_records(used, baked, checked))
        for repo_id, used in kernel.dependencies.items()
    )
    builds = {origin.variant: Build(kernel.package, _digests_of_files(kernel))}
    repository = origin.repository
    if not is_commit(origin.revision):  # a path, which may be a relative one
        build = kernel.directory.parent
        repository = str(build.parent if build.name == "build" else kernel.directory)
    record = Baked(repository, origin.name, origin.revision, {}, builds, uses)
    baked[record.key], checked[record.key] = record, kernel
    return record.key


def record_again(kernels: Mapping[str, Baked], key: str, kernel: Checked) -> KernelRecords:
    """Return the records of a kernel of a program that was loaded.

    As `record_kernel` does, but under the key that the kernel has in the program, and with the
    builds that the program was saved with.

    Args:
        kernels: The records in the program.
        key: The key of the kernel.
        kernel: The kernel on this machine.
    """
    old = kernels[key]
    builds = {**old.builds, kernel.origin.variant: Build(kernel.package, _digests_of_files(kernel))}
    baked, checked = {key: replace(old, builds=builds)}, {key: kernel}
    for wanted, used in old.uses:
        if wanted.repo_id in kernel.dependencies:
            _, more, more_checked = record_again(kernels, used, kernel.dependencies[wanted.repo_id])
            baked, checked = {**baked, **more}, {**checked, **more_checked}
    return KernelRecords(key, baked, checked)


def _digests_of_files(kernel: Checked) -> Mapping[str, str]:
    """Return the digest of every file of a kernel that was loaded, its metadata's too."""
    unlisted = {
        name: encoded_digest(kernel.directory / name)
        for name in UNLISTED
        if (kernel.directory / name).is_file()
    }
    files = {**kernel.sha256, **unlisted}
    if content_hash(files) != kernel.content:
        raise ValueError(f"{kernel.directory} has changed since kernel {kernel.origin} was loaded")
    return files


# --- other builds -------------------------------------------------------------------------------


def with_listing(baked: Baked, hub: Hub) -> Baked:
    """Return a record with a digest of each variant that the Hub lists, if the Hub can be asked."""
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


def with_every_build(baked: Baked, kernel: Checked, hub: Hub) -> tuple[Baked, dict[str, Path]]:
    """Return a record with all variants of the kernel, and the directory of each.

    The variants on the Hub are downloaded.

    Args:
        baked: The record.
        kernel: The kernel on this machine.
        hub: The Hub, and the cache.

    Raises:
        ValueError: If a variant is not what its metadata, or the Hub, says.
        OSError: If the Hub could not be asked.
    """
    if baked.commit is None:
        build = kernel.directory.parent
        root = build.parent if build.name == "build" else kernel.directory
        directories = {path.name: path for path in builds_at(root, str(root))}
    else:
        finder = Finder(hub, trust_remote_code=True)  # its code runs here already
        found = finder.find(Wanted(baked.repository, baked.commit))
        directories = {v: finder.fetch(found, v).directory for v in found.variants}
    builds = dict(baked.builds)
    for variant, directory in directories.items():
        if variant not in builds:
            verify(directory, read_metadata(directory))
            builds[variant] = Build(kernel.package, hash_files(directory))
    return replace(baked, builds=builds), directories


def blobs_of(build: Build, directory: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the hex sha256 and the content of each file of a build.

    Raises:
        ValueError: If a file has changed since it was recorded.
    """
    for name, digest in build.sha256.items():
        content = (directory / name).read_bytes()
        if encoded_digest(content) != digest:
            raise ValueError(f"{directory / name} has changed since the kernel was loaded")
        yield hex_of(digest), content


def hex_of(digest: str) -> str:
    """Return a base64 digest in hex."""
    return b64decode(digest).hex()


# --- kernels whose own ops are in programs ------------------------------------------------------


class TracedKernel(NamedTuple):
    """A kernel that was traced into its own ops."""

    records: KernelRecords
    device: str
    """The type of device that it was traced for."""


_traced: dict[str, TracedKernel] = {}


def traced_kernels() -> Mapping[str, TracedKernel]:
    """Return the kernels whose own ops are in programs of this process, by the ops' namespace."""
    return _traced


def record_traced(records: KernelRecords, device: str) -> str:
    """Record that a kernel's own ops are in a program; return their namespace.

    Raises:
        NotPortable: If the kernel's metadata does not say the namespace.
    """
    namespace = read_metadata(records.checked[records.key].directory).id
    if namespace is None:
        raise NotPortable(
            f"kernel {records.key} does not say what its ops are called: its metadata has no id"
        )
    _traced[namespace] = TracedKernel(records, device)
    return namespace


# --- kernels that may be missing ----------------------------------------------------------------


@dataclass(frozen=True)
class LoadedLayer:
    """A repository in name only: it holds one layer, which is loaded already."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        """Return the layer."""
        return self.layer


class LateKernel:
    """A kernel that is missing, and may arrive later.

    Args:
        name: The name of the kernel's layer.
        origin: The origin of the kernel.
    """

    def __init__(self, name: str, origin: Origin) -> None:
        self.kernel: Kernel | None = None

        def forward(module: nn.Module, *args: object, **kwargs: object) -> object:
            if self.kernel is None:
                raise RuntimeError("it is not on this machine: the program was loaded without it")
            return self.kernel.forward(module, *args, **kwargs)

        layer = type(name, (nn.Module,), {"forward": forward})
        selection = Selection(LoadedLayer(layer), Mode.FALLBACK, Device("cpu"))
        self.stand_in = Kernel(layer, origin, selection)
