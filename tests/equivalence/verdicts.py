"""The verdict on one program on one path."""

from __future__ import annotations

import dataclasses
import gc
import sys
from typing import Any

import torch

import kernelgraph as kg
from tests.equivalence.outcomes import Outcome, Prepare, difference, run_program
from tests.equivalence.paths import PATHS, Path, eager
from tests.equivalence.programs import Program, draw_program


@dataclasses.dataclass
class Verdict:
    """What was found about one program."""

    seed: int
    failure: str = ""
    """How the program came out wrong with kernels; empty where it did not."""
    skipped: str = ""
    """Why the program says nothing; empty where it does."""
    kernels: int = 0
    """The number of calls that used a kernel."""
    kept: list[str] = dataclasses.field(default_factory=list)
    """The reason of each call that kept its reference."""


def judge(seed: int, path: Path) -> Verdict:
    """Run the program of a seed in eager use, and on a path with kernels."""
    torch.compiler.reset()
    program = draw_program(seed)
    if path.one_size:
        sizes = program.sizes[:1] * len(program.sizes)
        program = dataclasses.replace(program, sizes=sizes)
    try:
        expected = _plain(program, eager(program))
        if expected.error:
            return Verdict(seed, skipped=f"eager: {expected.error}")
        verdict = Verdict(seed)
        made = _with_kernels(program, path, verdict)
        if not (found := _found(program, made, expected)):
            return verdict
        torch.compiler.reset()
        plain = _plain(program, path.plain(program))
        if why := _found(program, plain, expected):
            return Verdict(
                seed, skipped=f"plain torch: {why}" if plain.error else "plain torch: wrong"
            )
        verdict.failure = found
        return verdict
    finally:
        _forget(seed)


def _plain(program: Program, prepare: Prepare) -> Outcome:
    model, _ = program.build()
    return run_program(program, prepare, model)


def _with_kernels(program: Program, path: Path, verdict: Verdict) -> Outcome:
    model, mapping = program.build()
    program.tag(model)
    before = kg.last_report()
    with kg.use_kernel_mapping(mapping, inherit_mapping=False):
        made = run_program(program, path.ours(program), model)
    report = kg.last_report()
    if report is not None and report is not before:
        verdict.kernels = len(report.kernels)
        verdict.kept = [d.outcome for d in report.decisions if not d.uses_kernel]
    return made


def _found(program: Program, made: Outcome, expected: Outcome) -> str:
    loose = program.dtype == "bfloat16" or "autocast" in program.model
    found = difference(made, expected, loose)
    return found or made.error


def _forget(seed: int) -> None:
    """Drop the modules of a program."""
    torch.compiler.reset()
    prefix = f"tests.equivalence.program_{seed}_"
    for name in [name for name in sys.modules if name.startswith(prefix)]:
        del sys.modules[name]
    if seed % 20 == 0:
        gc.collect()


def judge_by_name(seed: int, path: str) -> Verdict:
    """Judge the program of a seed on the path of a name."""
    return judge(seed, PATHS[path])


def as_data(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain data."""
    return dataclasses.asdict(verdict)
