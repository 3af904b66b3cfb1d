"""The command's arguments."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from kernelgraph.cli.console import STATUS_HELP

Add: TypeAlias = Callable[[str, str], argparse.ArgumentParser]
"""Adds a command, by its name and description, and returns its parser."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments; ``command`` is the name of the command."""
    parser = argparse.ArgumentParser(
        prog="kernelgraph", description="Hub kernels for PyTorch models.", epilog=STATUS_HELP
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=description, description=description, epilog=STATUS_HELP
        )

    def add_with_json(name: str, description: str) -> argparse.ArgumentParser:
        command = add(name, description)
        command.add_argument("--json", action="store_true", help="print JSON")
        return command

    _add_hub_commands(add_with_json)
    _add_local_commands(add_with_json)
    add("demo", "compile a small decoder with the example kernels, and time it")
    return parser


def _add_hub_commands(add: Add) -> None:
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

    command = add("verify", "compare kernels on this machine with their digests, listing and lock")
    command.add_argument("target", metavar="REPO|PATH|PROJECT", type=_target)
    _add_revision(command)


def _add_local_commands(add: Add) -> None:
    command = add("inspect", "what a saved program has baked in, and whether it would load here")
    command.add_argument("file", metavar="FILE", type=Path)

    add("explain", "what was measured to be fastest on this machine, and how long it took")

    command = add("cache", "what the cache of this machine has of findings about kernels")
    command.add_argument("action", nargs="?", choices=["show", "clear"], default="show")


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
    """A path of this machine, or else the id of a repository on the Hub."""
    return text if Path(text).exists() else _repo_id(text)


def _device_type(text: str) -> str:
    from kernelgraph.selection import target_of

    with _as_usage():
        return target_of(text).type


@contextlib.contextmanager
def _as_usage() -> Iterator[None]:
    """Turn a ValueError into an error of usage."""
    try:
        yield
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
