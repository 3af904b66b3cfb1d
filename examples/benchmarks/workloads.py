"""Times six workloads of a decoder in six ways: eager, compiled, with kernels, with CUDA graphs.

    python examples/benchmarks/workloads.py [dense-decode] [moe-training] ... [--columns eager ...]

The workloads are decode, prefill and a training step, of a dense decoder and of one with a mixture
of experts (moe). The example decoder has no KV cache: decode is one token of each sequence through
the model, which is what these layers see of it. A training step is as in training.py. The columns:

- eager, and kernelized: the model as it is, and after ``kernelize``;
- inductor, and hubkernels: compiled without kernels and with them;
- inductor+graphs, and hubkernels+graphs: the same with CUDA graphs (``mode="reduce-overhead"``).

The reference of the experts has a loop that depends on the data. Inductor breaks the graph there.

The kernels are liger-kernel's on a GPU where the package is installed, else the example
repository's. ``--policy`` is hubkernels' option; without it the backend has its defaults. Each
column prints what it computed, which shows a column that computes something else.

Times are medians of one run in which the columns take turns. Targets: hubkernels at most 1.02 of
the best of eager, inductor and kernelized; hubkernels+graphs at most 1.02 of the best of all the
others; for experts hubkernels at most 0.9 of kernelized, and inductor at least 5 of hubkernels.

A first call is that of a new process which has compiled nothing before, and includes what is
imported for it. With cold caches each of the two backends has caches of its own; a second process
finds them warm. The time of its call is the median of three. Target: hubkernels at most 1.05 of
inductor in the second process.
``--no-second`` leaves out the second processes, ``--no-first`` all that only make a first call;
the caches are then the same for all, which saves time, and where two columns have one graph, they
have one program, of the same choices of Inductor's.

Elsewhere than on a GPU it is a tiny version without CUDA graphs; with ``--no-first`` it takes two
minutes on two cores, and else six, since each cold cache of Inductor starts with C++ headers.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from programs import (
    DEVICE,
    MODELS,
    Inference,
    Kernels,
    Program,
    calling,
    decoder,
    kernel_sets,
    machine,
    mapped,
    median_ms,
    seconds,
)
from torch import nn

from kernelgraph import Mode, kernelize, last_report
from kernelgraph.report import Report


class Workload(NamedTuple):
    model: str
    """Of `programs.MODELS`."""
    layers: int
    tokens: tuple[int, int]
    training: bool = False


class Column(NamedTuple):
    backend: str = ""
    """The ``mode`` of torch.compile; empty: not compiled."""
    graphs: bool = False
    kernelized: bool = False


WORKLOADS = {
    "cuda": {
        "dense-decode": Workload("dense", 16, (8, 1)),
        "dense-prefill": Workload("dense", 16, (4, 2048)),
        "dense-training": Workload("dense", 8, (4, 1024), training=True),
        "moe-decode": Workload("experts", 4, (8, 1)),
        "moe-prefill": Workload("experts", 4, (2, 2048)),
        "moe-training": Workload("experts", 4, (2, 1024), training=True),
    },
    "cpu": {
        "dense-decode": Workload("dense", 1, (8, 1)),
        "dense-prefill": Workload("dense", 1, (2, 64)),
        "dense-training": Workload("dense", 1, (2, 64), training=True),
        "moe-decode": Workload("experts", 1, (8, 1)),
        "moe-prefill": Workload("experts", 1, (2, 64)),
        "moe-training": Workload("experts", 1, (2, 64), training=True),
    },
}[DEVICE]
COLUMNS = {
    "eager": Column(),
    "kernelized": Column(kernelized=True),
    "inductor": Column("inductor"),
    "hubkernels": Column("hubkernels"),
    "inductor+graphs": Column("inductor", graphs=True),
    "hubkernels+graphs": Column("hubkernels", graphs=True),
}
if DEVICE == "cpu":
    COLUMNS = {name: column for name, column in COLUMNS.items() if not column.graphs}
PLAIN = ("eager", "kernelized", "inductor")
"""The columns that hubkernels is compared with."""
COMPILED = ("inductor", "hubkernels")
"""The columns whose first calls are compared."""
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "KERNELGRAPH_CACHE_DIR")
WARM_UP = 3
"""Calls before the measured ones. CUDA graphs are recorded in the second and run in the third."""
SECOND_PROCESSES = 3
ROUNDS = 100 if DEVICE == "cuda" else 20
SECONDS = 1.5 if DEVICE == "cuda" else 0.5
"""The seconds for the turns of a program; it gets at least three."""


def program(
    column: Column, model: nn.Module, kernels: Kernels, training: bool, policy: str | None
) -> Program:
    """Return the column's way to run ``model``. Nothing is compiled yet."""
    kind = Program if training else Inference
    if column.kernelized:
        mode = Mode.TRAINING if training else Mode.INFERENCE
        model = kernelize(copy.deepcopy(model), mode=mode)
    if not column.backend:
        return kind(model, model, kernels)
    how: dict[str, Any] = {"mode": "reduce-overhead"} if column.graphs else {}
    if policy and column.backend == "hubkernels":
        # torch.compile takes a mode or options. The second option is what the mode stands for.
        how = {"options": {"policy": policy, "triton.cudagraphs": column.graphs}}
    compiled = torch.compile(calling(model), backend=column.backend, **how)
    return kind(model, compiled, kernels)


def measure(parsed: argparse.Namespace) -> dict[str, Any]:
    """Run the columns of one workload in this process.

    Returns:
        By column ``first``, seconds, ``told``, what it computed, and ``ms``; where it failed
        ``failed`` instead. Under ``chosen`` what was decided for hubkernels.
    """
    workload = WORKLOADS[parsed.names[0]]
    kernels = kernel_sets()[parsed.kernels]
    # Each layer's call after a graph break is compiled once for each backend.
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    model = decoder(dataclasses.replace(MODELS[workload.model], layers=workload.layers))
    input_ids = torch.randint(model.config.vocab, workload.tokens, device=DEVICE)
    done: dict[str, Any] = {"columns": {}, "chosen": []}
    programs: dict[str, Program] = {}
    with mapped(kernels):
        # hubkernels comes first, since its first call must be that of a new process.
        for name in sorted(parsed.columns, key="hubkernels".__ne__):
            column = COLUMNS[name]
            use_caches(parsed.child / ("" if parsed.no_first else column.backend))
            try:
                made = program(column, model, kernels, workload.training, parsed.policy)
                took = [seconds(made, input_ids) for _ in range(WARM_UP)]
                made.begin()
                told = made.told(made.step(input_ids))
                made.begin()
            except Exception as error:
                # Dynamo names the origin of the error in the first line, the error in the second.
                lines = f"{type(error).__name__}: {error}".splitlines()
                done["columns"][name] = {"failed": " ".join(lines[:2])}
                continue
            programs[name] = made
            done["columns"][name] = {"first": took[0], "told": told}
            if name == "hubkernels" and (report := last_report()):
                done["chosen"] = chosen(report)
        if not parsed.only_first:
            for name, ms in median_ms(programs, input_ids, ROUNDS, SECONDS).items():
                done["columns"][name]["ms"] = ms
    return done


def use_caches(folder: Path) -> None:
    """Keep what is compiled from here on in ``folder``."""
    for name in CACHES:
        os.environ[name] = str(folder / name.lower())


def chosen(report: Report) -> list[str]:
    """Return the decisions, a line for each kind of layer."""
    alike = Counter((d.layer, d.outcome) for d in report.decisions)
    return [f"{layer}, {count}: {outcome}" for (layer, outcome), count in alike.items()]


def child(
    parsed: argparse.Namespace, name: str, columns: list[str], caches: Path, *only: str
) -> subprocess.Popen[str]:
    """Start a process that measures ``columns`` of the workload ``name``."""
    policy = ["--policy", parsed.policy] if parsed.policy else []
    only += ("--no-first",) if parsed.no_first else ()
    return subprocess.Popen(
        [
            *(sys.executable, __file__, name, "--columns", *columns),
            *("--kernels", parsed.kernels, *policy, "--child", str(caches), *only),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str], columns: list[str]) -> dict[str, Any]:
    """Return what `measure` returned in the process; all columns have failed if it has."""
    out = process.communicate()[0]
    if process.returncode == 0:
        return dict(json.loads(out.splitlines()[-1]))
    failed = {"failed": f"the process exited with {process.returncode}"}
    return {"columns": dict.fromkeys(columns, failed), "chosen": []}


def first_call(done: dict[str, Any], column: str) -> float:
    """Return the seconds of a column's first call; NaN where it failed."""
    return float(done["columns"][column].get("first", math.nan))


def run(parsed: argparse.Namespace, name: str, caches: Path) -> dict[str, float]:
    """Measure a workload in new processes, print it, and return its ms by column."""
    compared = not parsed.no_first and set(COMPILED) <= set(parsed.columns)
    first: dict[str, dict[str, float]] = {}

    def start(column: str) -> subprocess.Popen[str]:
        return child(parsed, name, [column], caches, "--only-first")

    if compared:
        inductor = result(start("inductor"), ["inductor"])
    done = result(child(parsed, name, parsed.columns, caches), parsed.columns)
    if compared:
        both = {"inductor": inductor, "hubkernels": done}
        first["cold"] = {column: first_call(both[column], column) for column in COMPILED}
    if compared and not parsed.no_second:
        calls: dict[str, list[float]] = {column: [] for column in COMPILED}
        for _ in range(SECOND_PROCESSES):
            # At the same time, so that a machine that is slower for a while slows both.
            started = {column: start(column) for column in COMPILED}
            for column, process in started.items():
                calls[column].append(first_call(result(process, [column]), column))
        first["warm"] = {column: statistics.median(took) for column, took in calls.items()}
    show(name, done, first)
    return {column: got["ms"] for column, got in done["columns"].items() if "ms" in got}


def show(name: str, done: dict[str, Any], first: dict[str, dict[str, float]]) -> None:
    """Print the measurements of a workload."""
    workload = WORKLOADS[name]
    print(f"\n{name}: {workload.layers} layers, tokens {list(workload.tokens)}")
    columns = {column: done["columns"][column] for column in COLUMNS if column in done["columns"]}
    for column, got in columns.items():
        what = f"failed: {got['failed']}" if "failed" in got else f"{got['ms']:9.3f} ms"
        print(f"  {column:<18} {what}{'   ' + got['told'] if 'told' in got else ''}")
    ms = {column: got["ms"] for column, got in columns.items() if "ms" in got}
    for what, ratio, aim in ratios(ms, workload.model == "experts"):
        print(f"  {what} {ratio:.3f} (aim: {aim})")
    for caches, by in first.items():
        told = ", ".join(f"{column} {took:.2f} s" for column, took in by.items())
        aim = " (aim: at most 1.05)" if caches == "warm" else ""
        ratio = by["hubkernels"] / by["inductor"]
        print(f"  first call, {caches} caches: {told}, ratio {ratio:.2f}{aim}")
    for line in done["chosen"]:
        print(f"  {line}")
    sys.stdout.flush()


def ratios(ms: dict[str, float], experts: bool) -> Iterator[tuple[str, float, str]]:
    """Return each comparison, its ratio and its target, for the columns that ran."""
    for column, others in (("hubkernels", PLAIN), ("hubkernels+graphs", tuple(COLUMNS))):
        others = tuple(other for other in others if other in ms and other != column)
        if column in ms and others:
            best = min(others, key=ms.__getitem__)
            what = f"{column} / the best of {', '.join(others)} ({best})"
            yield what, ms[column] / ms[best], "at most 1.02"
    if experts:
        for over, under, aim in (
            ("hubkernels", "kernelized", "at most 0.9"),
            ("inductor", "hubkernels", "at least 5"),
        ):
            if over in ms and under in ms:
                yield f"{over} / {under}", ms[over] / ms[under], aim


def table(rows: dict[str, dict[str, float]], columns: list[str]) -> None:
    """Print the milliseconds of all workloads."""
    print(f"\n{'ms':<16}" + "".join(f"  {column:>9}" for column in columns))
    for name, ms in rows.items():
        cells = {c: f"{ms[c]:.3f}" if c in ms else "failed" for c in columns}
        print(f"{name:<16}" + "".join(f"  {cell:>{max(9, len(c))}}" for c, cell in cells.items()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Six workloads of a decoder in six ways.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(WORKLOADS)}; else all")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--kernels", choices=("examples", "liger"), help="liger needs a GPU")
    parser.add_argument("--policy", help="hubkernels' option; else its default")
    parser.add_argument("--no-second", action="store_true", help="no second processes")
    parser.add_argument("--no-first", action="store_true", help="nor any for first calls alone")
    # Of the processes that this one starts: the folder of the caches, and whether to time nothing.
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only-first", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if unknown := set(parsed.names) - set(WORKLOADS):
        parser.error(f"no workload {', '.join(sorted(unknown))}: there are {', '.join(WORKLOADS)}")
    sets = kernel_sets()
    parsed.kernels = parsed.kernels or list(sets)[-1]
    if parsed.kernels not in sets:
        parser.error("the kernels of liger need a GPU and the package liger-kernel")
    return parsed


def main() -> None:
    """Run the benchmark."""
    parsed = arguments()
    on = machine()
    if parsed.child:
        print(json.dumps(measure(parsed)))
        return
    started = time.perf_counter()
    print(f"{on}; kernels: {parsed.kernels}; policy: {parsed.policy or 'default'}", flush=True)
    rows = {}
    with tempfile.TemporaryDirectory() as root:
        for name in parsed.names or WORKLOADS:
            # Where no first calls are compared, shared caches save time.
            caches = Path(root) if parsed.no_first else Path(root, name)
            rows[name] = run(parsed, name, caches)
    table(rows, parsed.columns)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
