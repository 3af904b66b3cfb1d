"""The commands about what is on this machine: saved programs, the cache, and the examples.

The functions import what they need when they are called, so that the command starts quickly.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
from pathlib import Path

from kernelgraph.cli.console import ExitStatus, cell, show


def inspect_program(parsed: argparse.Namespace) -> ExitStatus:
    """Print what a saved program has baked in, and whether it would load here."""
    from kernelgraph.archive import inspect

    found = inspect(parsed.file)
    if parsed.json:
        print(json.dumps({**dataclasses.asdict(found), "loads": not found.problems}, indent=2))
        return ExitStatus.NO if found.problems else ExitStatus.DONE
    for key, value in found.about.items():
        print(f"{key}: {value}")
    for rows in (found.kernels, found.ops):
        wide = ("calls", "uses", "schema", "key")
        flat = [{k: cell(v) for k, v in row.items() if k not in wide} for row in rows]
        print()
        show(parsed, flat)
    print()
    calls = [
        {"path": call["path"], "op": op["op"], "operands": cell(call["operands"])}
        for op in found.ops
        for call in op["calls"]
    ]
    show(parsed, calls)
    print("\nit would load here" if not found.problems else "\nit would not load here:")
    print(*found.problems, sep="\n", end="\n" if found.problems else "")
    return ExitStatus.NO if found.problems else ExitStatus.DONE


def explain_choices(parsed: argparse.Namespace) -> ExitStatus:
    """Print which programs were measured to be fastest on this machine, with their times."""
    from kernelgraph import cache

    rows: list[dict[str, object]] = []
    for value in cache.values(cache.CHOICES):
        if isinstance(value, dict) and isinstance(value.get("about"), dict):
            chosen = {"chosen": value.get("how"), "times": value.get("why")}
            rows.append({**value["about"], **chosen})
    rows.sort(key=str)
    show(parsed, rows, f"{len(rows)} kinds of call in {cache.directory()}")
    return ExitStatus.DONE


def show_cache(parsed: argparse.Namespace) -> ExitStatus:
    """Print how many values of each kind the cache has; remove them if that is asked for."""
    from kernelgraph import cache

    rows = [{"kind": kind, "entries": count} for kind, count in cache.entries().items()]
    if parsed.action == "clear":
        cache.clear()
    done = "cleared: " if parsed.action == "clear" else ""
    show(parsed, rows, f"{done}{cache.directory()}")
    return ExitStatus.DONE


def run_demo(parsed: argparse.Namespace) -> ExitStatus:
    """Run ``examples/demo.py`` of the source checkout."""
    program = Path(__file__).parents[2] / "examples" / "demo.py"
    if not program.is_file():
        raise FileNotFoundError(
            "the demo is among the examples of a source checkout; clone the repository and "
            "install it from there with pip install -e ."
        )
    runpy.run_path(str(program), run_name="__main__")
    return ExitStatus.DONE
