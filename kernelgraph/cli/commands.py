"""The ``kernelgraph`` command."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelgraph.report import table

if TYPE_CHECKING:
    from kernelgraph.builds import Metadata, Wanted
    from kernelgraph.hub import Locks

# What the command returns.
DONE, NO, USAGE, UNREACHABLE = range(4)

_STATUS = (
    "exit status: 0 done; 1 no (nothing fits, a file is not what it should be, there is no such "
    "repository, nobody vouches for it); 2 wrong usage; 3 the Hub could not be asked, try again"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments``, by default those of the process; the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(_COMMANDS[parsed.command](parsed))
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
        return DONE
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"kernelgraph: {error}", file=sys.stderr)
        is_no = not isinstance(error, OSError) or isinstance(error, FileNotFoundError)
        return NO if is_no else UNREACHABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kernelgraph", description="Hub kernels for PyTorch models.", epilog=_STATUS
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, description: str, *, as_json: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=description, description=description, epilog=_STATUS)
        if as_json:
            added.add_argument("--json", action="store_true", help="print JSON")
        return added

    command = add("versions", "which versions a repository on the Hub has, and which fit here")
    command.add_argument("repo", metavar="REPO", type=_repo_id)
    _add_backend(command)

    command = add("info", "which builds a repository has, and why each fits here or not")
    command.add_argument("target", metavar="REPO|PATH", type=_target)
    _add_revision(command)
    _add_backend(command)

    command = add("download", "download a kernel, or those that a project has locked")
    command.add_argument("target", metavar="REPO|PROJECT", type=_target)
    _add_revision(command)
    _add_backend(command)
    command.add_argument("--all-variants", action="store_true", help="not only the one that fits")
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="also from owners that the Hub does not call trusted publishers",
    )

    command = add("lock", "write kernels.lock for what a project's pyproject.toml depends on")
    command.add_argument("project", metavar="PROJECT", nargs="?", default=".", type=Path)

    command = add("verify", "hold what is on this machine against its digests, listing and lock")
    command.add_argument("target", metavar="REPO|PATH|PROJECT", type=_target)
    _add_revision(command)

    command = add("inspect", "what a saved program has baked in, and whether it would load here")
    command.add_argument("file", metavar="FILE", type=Path)

    add("explain", "what was measured to be fastest on this machine, and how long it took")

    command = add("cache", "what is kept on this machine of what was found out about kernels")
    command.add_argument("action", nargs="?", choices=["show", "clear"], default="show")

    add("demo", "compile a small decoder with the example kernels, and time it", as_json=False)
    return parser


def _add_revision(command: argparse.ArgumentParser) -> None:
    either = command.add_mutually_exclusive_group()
    either.add_argument("--revision", help="a branch, a tag or a commit; by default main")
    either.add_argument("--version", type=_version, help='a number, or a bound such as ">=0.1"')


def _add_backend(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--backend",
        type=_device_type,
        help="the device type that is meant; by default the one that torch can use",
    )


def _version(text: str) -> int | str:
    from kernelgraph.builds import check_version

    version = int(text) if text.isdecimal() else text
    with _as_usage():
        check_version(version)
    return version


def _repo_id(text: str) -> str:
    from kernelgraph.builds import check_repo_id

    with _as_usage():
        check_repo_id("REPO", text)
    return text


def _target(text: str) -> str:
    return text if Path(text).exists() else _repo_id(text)


def _device_type(text: str) -> str:
    from kernelgraph.selection import target_of

    with _as_usage():
        return target_of(text).type


@contextlib.contextmanager
def _as_usage() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _backend(parsed: argparse.Namespace) -> str:
    from kernelgraph.builds import default_target

    return parsed.backend or default_target().type


def _wanted(parsed: argparse.Namespace) -> Wanted:
    from kernelgraph.builds import Wanted

    return Wanted(parsed.target, parsed.revision, parsed.version)


def _is_path(parsed: argparse.Namespace) -> bool:
    return Path(parsed.target).exists()


def _project_locks(parsed: argparse.Namespace) -> Locks | None:
    """The locks of the project that is meant, if one is."""
    from kernelgraph.hub import LOCKFILE, find_locks

    path = Path(parsed.target, LOCKFILE)
    return find_locks(path) if path.is_file() else None


def _show(parsed: argparse.Namespace, rows: list[dict[str, Any]], head: str = "") -> None:
    """Print rows that are alike, for people or as JSON."""
    if parsed.json:
        print(json.dumps(rows, indent=2))
        return
    if head:
        print(head)
    if rows:
        cells = [tuple("" if cell is None else str(cell) for cell in row.values()) for row in rows]
        print(*table(tuple(rows[0]), cells), sep="\n")


# --- the commands -------------------------------------------------------------------------------


def _versions(parsed: argparse.Namespace) -> int:
    from kernelgraph.builds import System, choose
    from kernelgraph.hub import Hub, list_build, list_versions

    hub, system = Hub(), System.detect(_backend(parsed))
    rows = []
    for version in list_versions(hub, parsed.repo):
        best = choose(list_build(hub, version.commit), system).best
        rows.append({"version": version.name, "commit": version.commit.commit, "fits": best})
    _show(parsed, rows, f"{parsed.repo} for {system}" if rows else "")
    if not rows:
        print(f"kernelgraph: {parsed.repo} has no versions", file=sys.stderr)
    return DONE if any(row["fits"] for row in rows) else NO


def _info(parsed: argparse.Namespace) -> int:
    from kernelgraph.builds import System
    from kernelgraph.cli.kernel_checks import fits

    system = System.detect(_backend(parsed))
    commit, names, read = _builds(parsed)
    found = fits(names, system)
    about: dict[str, Any] = {"repository": parsed.target, "commit": commit, "system": str(system)}
    if found:
        said = read(found[0].variant)
        about |= {"name": said.name, "version": said.version, "license": said.license}
        about["python-depends"] = list(said.python_depends)
        about["kernel-depends"] = [str(wanted) for wanted in said.kernel_depends]
        about["archs"] = list(said.archs)
    rows = [dataclasses.asdict(fit) for fit in found]
    if parsed.json:
        print(json.dumps({**about, "variants": rows}, indent=2))
    else:
        for key, value in about.items():
            if value not in (None, []):
                print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
        _show(parsed, [{**row, "fits": "yes" if row["fits"] else "no"} for row in rows])
    return DONE if any(fit.fits for fit in found) else NO


def _builds(
    parsed: argparse.Namespace,
) -> tuple[str | None, Sequence[str], Callable[[str], Metadata]]:
    """The commit, the variants there, and how one's metadata is read."""
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


def _download(parsed: argparse.Namespace) -> int:
    from kernelgraph.cli.kernel_checks import download
    from kernelgraph.hub import LOCKFILE, Finder, Hub

    locks = _project_locks(parsed)
    if locks is None and _is_path(parsed):
        raise FileNotFoundError(
            f"there is no {LOCKFILE} in {parsed.target}: run `kernelgraph lock {parsed.target}`"
        )
    finder = Finder(Hub(), parsed.trust_remote_code, locks)
    backend = None if parsed.all_variants else _backend(parsed)
    wanted = [lock.wanted for lock in locks.locks] if locks else [_wanted(parsed)]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in wanted:
        for kernel, variant, directory in download(finder, one, backend):
            row = {"repository": str(kernel), "variant": variant, "directory": str(directory)}
            rows[str(kernel), variant] = row
    _show(parsed, list(rows.values()))
    return DONE


def _lock(parsed: argparse.Namespace) -> int:
    from kernelgraph.hub import LOCKFILE, Hub, lock, read_dependencies

    locks = lock(Hub(), read_dependencies(parsed.project / "pyproject.toml"))
    path = parsed.project / LOCKFILE
    path.write_text(locks.to_json())
    rows = [
        {"repository": str(one.wanted), "commit": one.commit, "variants": len(one.digests)}
        for one in locks.locks
    ]
    _show(parsed, rows, f"written to {path}:")
    return DONE


def _verify(parsed: argparse.Namespace) -> int:
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
    _show(parsed, rows)
    return NO if any(one.problem for one in found) else DONE


def _inspect(parsed: argparse.Namespace) -> int:
    from kernelgraph.archive import inspect

    found = inspect(parsed.file)
    if parsed.json:
        print(json.dumps({**dataclasses.asdict(found), "loads": not found.problems}, indent=2))
        return NO if found.problems else DONE
    for key, value in found.about.items():
        print(f"{key}: {value}")
    for rows in (found.kernels, found.ops):
        wide = ("calls", "uses", "schema", "key")
        flat = [{k: _cell(v) for k, v in row.items() if k not in wide} for row in rows]
        print()
        _show(parsed, flat)
    print()
    calls = [
        {"path": call["path"], "op": op["op"], "operands": _cell(call["operands"])}
        for op in found.ops
        for call in op["calls"]
    ]
    _show(parsed, calls)
    print("\nit would load here" if not found.problems else "\nit would not load here:")
    print(*found.problems, sep="\n", end="\n" if found.problems else "")
    return NO if found.problems else DONE


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cache(parsed: argparse.Namespace) -> int:
    from kernelgraph import cache

    rows = [{"kind": kind, "entries": count} for kind, count in cache.entries().items()]
    if parsed.action == "clear":
        cache.clear()
    done = "cleared: " if parsed.action == "clear" else ""
    _show(parsed, rows, f"{done}{cache.directory()}")
    return DONE


def _explain(parsed: argparse.Namespace) -> int:
    from kernelgraph import cache

    rows: list[dict[str, object]] = []
    for value in cache.values(cache.CHOICES):
        if isinstance(value, dict) and isinstance(value.get("about"), dict):
            chosen = {"chosen": value.get("how"), "times": value.get("why")}
            rows.append({**value["about"], **chosen})
    rows.sort(key=str)
    _show(parsed, rows, f"{len(rows)} kinds of call in {cache.directory()}")
    return DONE


def _demo(parsed: argparse.Namespace) -> int:
    program = Path(__file__).parents[1] / "examples" / "demo.py"
    if not program.is_file():
        raise FileNotFoundError(
            "the demo is among the examples of a source checkout; clone the repository and "
            "install it from there with pip install -e ."
        )
    runpy.run_path(str(program), run_name="__main__")
    return DONE


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "versions": _versions,
    "info": _info,
    "download": _download,
    "lock": _lock,
    "verify": _verify,
    "inspect": _inspect,
    "cache": _cache,
    "explain": _explain,
    "demo": _demo,
}
