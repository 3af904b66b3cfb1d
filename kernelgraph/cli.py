"""The ``kernelgraph`` command."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with ``arguments``, by default those of the process."""
    parser = argparse.ArgumentParser(
        prog="kernelgraph", description="Hub kernels for PyTorch models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "demo", help="compile a small decoder with the example kernels, and time it"
    )
    parsed = parser.parse_args(arguments)
    {"demo": _demo}[parsed.command]()


def _demo() -> None:
    program = Path(__file__).parents[1] / "examples" / "demo.py"
    if not program.is_file():
        sys.exit(
            "kernelgraph: the demo is among the examples of a source checkout; clone the "
            "repository and install it from there with pip install -e ."
        )
    runpy.run_path(str(program), run_name="__main__")
