"""The output of a command: an exit status, and rows printed for people or as JSON."""

from __future__ import annotations

import argparse
import enum
import json
from collections.abc import Mapping, Sequence

from kernelgraph.report import table


class ExitStatus(enum.IntEnum):
    """The exit status of the command."""

    DONE = 0
    NO = 1
    """The answer is no, or what was asked for is not there."""
    USAGE = 2
    """The arguments are wrong: argparse exits with this."""
    UNREACHABLE = 3
    """The Hub could not be asked."""
    INTERRUPTED = 130
    """The user pressed Ctrl-C: 128 and the number of SIGINT."""


STATUS_HELP = (
    "exit status: 0 done; 1 no (nothing fits, a file is not what it should be, there is no such "
    "repository, nobody vouches for it); 2 wrong usage; 3 the Hub could not be asked, try again"
)
"""The help text about `ExitStatus`."""


def show(parsed: argparse.Namespace, rows: Sequence[Mapping[str, object]], head: str = "") -> None:
    """Print rows with equal keys, as JSON if that is asked for, else as a table below ``head``."""
    if parsed.json:
        print(json.dumps(rows, indent=2))
        return
    if head:
        print(head)
    if rows:
        cells = [["" if cell is None else str(cell) for cell in row.values()] for row in rows]
        print(*table(list(rows[0]), cells), sep="\n")


def cell(value: object) -> str:
    """The text of a table's cell that has ``value``."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
