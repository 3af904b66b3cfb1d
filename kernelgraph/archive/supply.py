"""Obtains the kernels of a saved program where the program is loaded.

A kernel comes from the first of these places that has it:

1. the program's own file, if it was saved with the kernel in it. The files are unpacked to a place
   in the cache that is named by their content, and used from there like a local repository, also by
   other programs whose manifests have the same content;
2. the Hub or its cache, at the commit that the program was exported with;
3. for a kernel that was loaded from a disk, the directory that it was in.

In each case every file has to be the one whose digest is in the manifest. For a build that was not
on the machine that saved the program, the Hub has to list the same files for the commit as it did
then. Nothing is imported here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kernelgraph.builds import (
    Checked,
    System,
    Wanted,
    check_variant,
    choose,
    encoded_digest,
    hash_files,
    no_variant,
    parse_variant,
)
from kernelgraph.hub import (
    REPO_TYPES,
    Finder,
    Hub,
    Lock,
    Locks,
    Trust,
    check_kernel,
    check_local_kernel,
    check_trust,
    content_digest,
    find_damage,
    list_build,
    resolve,
)
from kernelgraph.programs import Baked, Build, hex_of
from kernelgraph.selection import Target


@dataclass(frozen=True)
class Supply:
    """The source of one program's kernels.

    Args:
        kernels: The program's kernels, by key.
        blobs: The kernels' files in the program's own file, by hex sha256.
        trust_remote_code: See `kernelgraph.load`.
        source: The program's name in errors.
        hub: The Hub, and the cache.
    """

    kernels: Mapping[str, Baked]
    blobs: Mapping[str, bytes]
    trust_remote_code: Trust
    source: str
    hub: Hub = field(default_factory=Hub)

    # --- questions, which need neither the Hub nor a write ---------------------------------------

    def bundled(self, baked: Baked) -> dict[str, Build]:
        """Return the variants of a kernel that are in the program's file."""
        return {
            variant: build
            for variant, build in baked.builds.items()
            if all(hex_of(digest) in self.blobs for digest in build.sha256.values())
        }

    def fits(self, baked: Baked, system: System, *, listed: bool = False) -> bool:
        """Return whether a build that is here fits ``system`` by its name; with ``listed``, one of
        those that the Hub listed."""
        if listed:
            return choose(baked.digests, system).best is not None
        return _best(self._local(baked), system) is not None

    def on_disk(self, baked: Baked, system: System) -> bool:
        """Return whether the directory that a kernel was loaded from has a build that fits by its
        name."""
        path = Path(baked.repository)
        there = {v: b for v, b in baked.builds.items() if (path / "build" / v).is_dir()}
        if path.is_dir() and path.name in baked.builds:
            there[path.name] = baked.builds[path.name]
        return _best(there, system) is not None

    def _local(self, baked: Baked) -> dict[str, Build]:
        """Return the variants in the program's file, and those unpacked from any file before."""
        unpacked = {
            variant: build
            for variant, build in baked.builds.items()
            if _is_whole(self._unpacked(variant, build), build)
        }
        return unpacked | self.bundled(baked)

    # --- a kernel, checked ----------------------------------------------------------------------

    def obtain(self, key: str, target: Target) -> Checked:
        """Put a kernel and those that it uses on the disk and check them; import none of them.

        Args:
            key: The kernel's key.
            target: The device that it is to run on.

        Raises:
            FileNotFoundError: If no build of it fits, or it is nowhere.
            ValueError: If nobody vouches for it, it is for other devices, or it differs from what
                the manifest says.
            ImportError: If a Python package that it needs is not installed.
            OSError: If the Hub could not be asked.
        """
        baked = self.kernels[key]
        local = self._local(baked)
        best = _best(local, System.detect(target.type))
        if best is not None:
            checked = self._from_file(baked, best, local[best], target)
        elif baked.commit is not None:
            finder = Finder(self.hub, self.trust_remote_code, self._locks())
            checked = check_kernel(Wanted(baked.repository, baked.commit), target, finder)
        else:
            checked = self._from_disk(baked, local, target)
        self._compare(baked, checked)
        return checked

    def _from_file(self, baked: Baked, variant: str, build: Build, target: Target) -> Checked:
        directory = self.unpack(variant, build)
        self._check_trust(baked, directory, build)
        used = dict(baked.uses)

        def dependency(wanted: Wanted) -> Checked:
            if wanted not in used:
                raise ValueError(
                    f"{self.source}: kernel {baked} wants {wanted}, which is not in it"
                )
            return self.obtain(used[wanted], target)

        return check_variant(
            directory,
            target,
            repository=baked.repository,
            name=baked.name,
            revision=baked.commit,
            package_name=build.package or None,
            dependency=dependency,
        )

    def _check_trust(self, baked: Baked, directory: Path, build: Build) -> None:
        """Refuse files that neither the user nor the Hub vouches for.

        The Hub vouches for what it lists for a commit of a trusted publisher. The cache notes that
        a content is what the Hub lists for a commit, so that the Hub is asked once.
        """
        trust = self.trust_remote_code
        if trust is True or (not isinstance(trust, bool) and baked.repository in trust):
            return
        if baked.commit is None:
            raise ValueError(
                f"{self.source}: loading it runs the code of kernel {baked}, which came from a "
                "disk, so that only you can vouch for it: pass trust_remote_code=True"
            )
        question = f"content {build.content} of {baked.commit}, a trusted publisher's"
        notes = {t: self.hub.note(baked.repository, t, question) for t in REPO_TYPES}
        if any(note.read() for note in notes.values()):
            return
        try:
            kernel = resolve(self.hub, Wanted(baked.repository, baked.commit))
        except OSError as error:
            raise ValueError(
                f"{self.source}: loading it runs the code of kernel {baked}, and whether to trust "
                f"its owner could not be asked ({error}): pass trust_remote_code=True if you do"
            ) from error
        check_trust(self.hub, kernel, trust)
        files = list_build(self.hub, kernel).get(directory.name)
        damage = find_damage(directory, files)[0] if files else "it lists no such build"
        if damage:
            raise ValueError(
                f"{self.source}: its copy of kernel {kernel}, variant {directory.name}, is not "
                f"what the Hub vouches for ({damage}): pass trust_remote_code=True if you do"
            )
        notes[kernel.repo_type].write(directory.name)

    def _from_disk(self, baked: Baked, local: Mapping[str, Build], target: Target) -> Checked:
        if local:
            system = System.detect(target.type)
            raise no_variant(f"{baked} in {self.source}", choose(local, system), system)
        if self.trust_remote_code is not True:
            raise ValueError(
                f"{self.source}: loading it runs the code of kernel {baked} on this machine's "
                "disk: pass trust_remote_code=True if that is what you want"
            )
        path = Path(baked.repository).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(
                f"{self.source}: kernel {baked} came from a disk and is not in the file, nor is "
                "there such a directory here: save the program with bundle=True"
            )
        finder = Finder(self.hub, True, self._locks())
        return check_local_kernel(path.absolute(), target, finder, baked.repository)

    def _locks(self) -> Locks:
        """Return locks that pin the program's kernels to their commits."""
        commits = {key: b.commit for key, b in self.kernels.items() if b.commit is not None}
        wanted = {Wanted(self.kernels[key].repository, c): c for key, c in commits.items()}
        for baked in self.kernels.values():
            wanted |= {used: commits[key] for used, key in baked.uses if key in commits}
        return Locks(tuple(Lock(w, commit) for w, commit in wanted.items()), self.source)

    def _compare(self, baked: Baked, checked: Checked) -> None:
        """Refuse a kernel that differs from what the manifest says."""
        variant = checked.origin.variant
        if (build := baked.builds.get(variant)) is not None:
            same = build.content == checked.content
        elif baked.commit is None:
            same = False
        else:
            kernel = resolve(self.hub, Wanted(baked.repository, baked.commit))
            files = list_build(self.hub, kernel).get(variant) or {}
            same = not baked.digests or baked.digests.get(variant) == content_digest(files, {})
        if not same:
            raise ValueError(
                f"{self.source}: kernel {baked}, variant {variant}, is not what the program was "
                f"saved with (it is in {checked.directory})"
            )

    # --- unpacking ------------------------------------------------------------------------------

    def unpack(self, variant: str, build: Build) -> Path:
        """Write a variant in the program's file to the cache, and return its directory there.

        A copy that is already there is kept if it is whole, and replaced if it is not.

        Raises:
            ValueError: If a file is not what the manifest says.
        """
        directory = self._unpacked(variant, build)
        if _is_whole(directory, build):
            return directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=directory.parent, prefix="."))
        try:
            for name, digest in build.sha256.items():
                content = self.blobs[hex_of(digest)]
                if encoded_digest(content) != digest:
                    raise ValueError(
                        f"{self.source}: {name} of variant {variant} was changed in it"
                    )
                path = made / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            shutil.rmtree(directory, ignore_errors=True)
            try:
                os.replace(made, directory)
            except OSError:  # another process was faster
                if not _is_whole(directory, build):
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return directory

    def _unpacked(self, variant: str, build: Build) -> Path:
        """Return the directory in the cache for a variant; it may not exist."""
        cache = self.hub.directory / "kernelgraph" / "unpacked"
        return cache / build.content / "build" / variant


def _is_whole(directory: Path, build: Build) -> bool:
    """Return whether a directory has exactly the files of a build."""
    try:
        return directory.is_dir() and hash_files(directory) == dict(build.sha256)
    except (OSError, ValueError):
        return False


def _best(builds: Mapping[str, Build], system: System) -> str | None:
    """Return the variant that fits best by its name; one that is alone and whose name says nothing
    of systems always fits."""
    if len(builds) == 1 and parse_variant(name := next(iter(builds))) is None:
        return name
    return choose(builds, system).best
