"""The commands about kernels: on the Hub, in its cache, or in a directory of this machine.

The functions import what they need when they are called, so that the command starts quickly.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kernelgraph.cli.console import ExitStatus, show

if TYPE_CHECKING:
    from kernelgraph.builds import Metadata, Wanted
    from kernelgraph.hub import Locks


def show_versions(parsed: argparse.Namespace) -> ExitStatus:
    """Print the versions of a repository on the Hub, and which of them fit here."""
    from kernelgraph.builds import System, choose
    from kernelgraph.hub import Hub, list_build, list_versions

    hub, system = Hub(), System.detect(_backend(parsed))
    rows = []
    for version in list_versions(hub, parsed.repo):
        best = choose(list_build(hub, version.commit), system).best
        rows.append({"version": version.name, "commit": version.commit.commit, "fits": best})
    show(parsed, rows, f"{parsed.repo} for {system}" if rows else "")
    if not rows:
        print(f"kernelgraph: {parsed.repo} has no versions", file=sys.stderr)
    return ExitStatus.DONE if any(row["fits"] for row in rows) else ExitStatus.NO


def show_info(parsed: argparse.Namespace) -> ExitStatus:
    """Print what a repository says of itself, and why each of its builds fits here or not."""
    from kernelgraph.builds import System
    from kernelgraph.cli.kernel_checks import fits

    system = System.detect(_backend(parsed))
    commit, names, read = _builds(parsed)
    found = fits(names, system)
    about: dict[str, object] = {
        "repository": parsed.target,
        "commit": commit,
        "system": str(system),
    }
    if found:
        metadata = read(found[0].variant)
        about |= {"name": metadata.name, "version": metadata.version, "license": metadata.license}
        about["python-depends"] = list(metadata.python_depends)
        about["kernel-depends"] = [str(wanted) for wanted in metadata.kernel_depends]
        about["archs"] = list(metadata.archs)
    rows = [dataclasses.asdict(fit) for fit in found]
    if parsed.json:
        print(json.dumps({**about, "variants": rows}, indent=2))
    else:
        for key, value in about.items():
            if value not in (None, []):
                print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
        show(parsed, [{**row, "fits": "yes" if row["fits"] else "no"} for row in rows])
    return ExitStatus.DONE if any(fit.fits for fit in found) else ExitStatus.NO


def _builds(
    parsed: argparse.Namespace,
) -> tuple[str | None, Sequence[str], Callable[[str], Metadata]]:
    """The commit, the names of the variants, and a function that reads a variant's metadata."""
    from kernelgraph.builds import builds_at, read_metadata
    from kernelgraph.hub import Hub, list_build, read_remote_metadata, resolve

    if _is_path(parsed):
        builds = {path.name: path for path in builds_at(Path(parsed.target), parsed.target)}
        return None, list(builds), lambda name: read_metadata(builds[name])
    hub = Hub()
    kernel = resolve(hub, _wanted(parsed))
    variants = list_build(hub, kernel)
    return (
        kernel.commit,
        list(variants),
        lambda name: read_remote_metadata(hub, kernel, name, variants[name])[0],
    )


def download_kernels(parsed: argparse.Namespace) -> ExitStatus:
    """Download a kernel, or those that a project has locked, with the kernels that they use."""
    from kernelgraph.cli.kernel_checks import download_with_dependencies
    from kernelgraph.hub import LOCKFILE, Finder, Hub

    locks = _project_locks(parsed)
    if locks is None and _is_path(parsed):
        raise FileNotFoundError(
            f"there is no {LOCKFILE} in {parsed.target}: run `kernelgraph lock {parsed.target}`"
        )
    finder = Finder(Hub(), parsed.trust_remote_code, locks)
    backend = None if parsed.all_variants else _backend(parsed)
    wanted = [lock.wanted for lock in locks.locks] if locks else [_wanted(parsed)]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for one in wanted:
        for kernel, variant, directory in download_with_dependencies(finder, one, backend):
            row = {"repository": str(kernel), "variant": variant, "directory": str(directory)}
            rows[str(kernel), variant] = row
    show(parsed, list(rows.values()))
    return ExitStatus.DONE


def lock_project(parsed: argparse.Namespace) -> ExitStatus:
    """Write ``kernels.lock`` for a project."""
    from kernelgraph.hub import LOCKFILE, Hub, lock, read_dependencies

    locks = lock(Hub(), read_dependencies(parsed.project / "pyproject.toml"))
    path = parsed.project / LOCKFILE
    path.write_text(locks.to_json())
    rows = [
        {"repository": str(one.wanted), "commit": one.commit, "variants": len(one.digests)}
        for one in locks.locks
    ]
    show(parsed, rows, f"written to {path}:")
    return ExitStatus.DONE


def verify_kernels(parsed: argparse.Namespace) -> ExitStatus:
    """Check the files of kernels on this machine, and print what is wrong with them."""
    from kernelgraph.cli.kernel_checks import verify_in_cache, verify_on_disk
    from kernelgraph.hub import Hub

    locks = _project_locks(parsed)
    if locks is not None:
        found = [one for lock in locks.locks for one in verify_in_cache(Hub(), lock.wanted, locks)]
    elif _is_path(parsed):
        found = list(verify_on_disk(Path(parsed.target), parsed.target))
    else:
        found = list(verify_in_cache(Hub(), _wanted(parsed)))
    rows = [
        {
            "repository": one.repository,
            "revision": one.revision,
            "variant": one.variant,
            "verified": one.problem or f"good by {one.by}",
        }
        for one in found
    ]
    if parsed.json:
        rows = [dataclasses.asdict(one) for one in found]
    show(parsed, rows)
    return ExitStatus.NO if any(one.problem for one in found) else ExitStatus.DONE


def _backend(parsed: argparse.Namespace) -> str:
    """The device type that kernels are wanted for."""
    from kernelgraph.builds import default_target

    return parsed.backend or default_target().type


def _wanted(parsed: argparse.Namespace) -> Wanted:
    from kernelgraph.builds import Wanted

    return Wanted(parsed.target, parsed.revision, parsed.version)


def _is_path(parsed: argparse.Namespace) -> bool:
    """Whether the target is a path of this machine, not a repository on the Hub."""
    return Path(parsed.target).exists()


def _project_locks(parsed: argparse.Namespace) -> Locks | None:
    """The locks of the target, if it is a project with a lock file."""
    from kernelgraph.hub import LOCKFILE, find_locks

    path = Path(parsed.target, LOCKFILE)
    return find_locks(path) if path.is_file() else None
