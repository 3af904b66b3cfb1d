"""The verdict on one program on one path."""

from __future__ import annotations

import dataclasses
import gc
import re
import sys

import torch

import kernelgraph as kg
from tests.equivalence.outcomes import Outcome, Prepare, difference, run_program
from tests.equivalence.paths import Path, eager
from tests.equivalence.programs import Program


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


def general(reason: str) -> str:
    """Return a reason without the numbers and names of one program."""
    reason = re.sub(r"@[0-9a-f]+", "@…", reason)
    reason = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", reason)
    return re.sub(r"'[^']*'", "'…'", reason)[:110]


def judge(program: Program, path: Path) -> Verdict:
    """Run a program in eager use, on a path with kernels and, where these differ, without."""
    verdict = judge_kernels(program, path)
    return judge_plain(program, path, verdict) if verdict.failure else verdict


def judge_kernels(program: Program, path: Path) -> Verdict:
    """Run a program in eager use, and on a path with kernels."""
    program, verdict = _sized(program, path), Verdict(program.seed)
    try:
        expected = _plain(program, eager(program))
        if expected.error:
            verdict.skipped = f"eager: {expected.error}"
        else:
            verdict.failure = _found(program, _with_kernels(program, path, verdict), expected)
        return verdict
    finally:
        _forget(program.seed)


def judge_plain(program: Program, path: Path, verdict: Verdict) -> Verdict:
    """Skip a program that came out wrong with kernels, if it does so on the path without them."""
    program = _sized(program, path)
    try:
        expected = _plain(program, eager(program))
        plain = _plain(program, path.plain(program))
        if why := _found(program, plain, expected):
            verdict.failure = ""
            verdict.skipped = f"plain torch: {why if plain.error else 'wrong'}"
        return verdict
    finally:
        _forget(program.seed)


def _sized(program: Program, path: Path) -> Program:
    if not path.one_size:
        return program
    return dataclasses.replace(program, sizes=program.sizes[:1] * len(program.sizes))


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
    """Return how a run differs from the oracle; empty where it does not."""
    loose = program.dtype == "bfloat16" or "autocast" in program.model
    try:
        return difference(made, expected, loose) or made.error
    except Exception as error:  # such as fake tensors that were left behind
        return f"cannot be compared: {type(error).__name__}: {error}"


def _forget(seed: int) -> None:
    """Drop the modules of a program."""
    torch.compiler.reset()
    prefix = f"tests.equivalence.program_{seed}_"
    for name in [name for name in sys.modules if name.startswith(prefix)]:
        del sys.modules[name]
    if seed % 20 == 0:
        gc.collect()


def shrink(program: Program, path: Path) -> Program:
    """Return a program with fewer lines in its model that comes out wrong in the same way."""
    if not (failure := judge(program, path).failure):
        return program
    wanted = general(failure)[:24]

    def fails(made: Program) -> bool:
        try:
            return general(judge(made, path).failure)[:24] == wanted
        except (SyntaxError, AttributeError, NameError, RuntimeError):
            return False

    for sizes in (program.sizes[:1], program.sizes[:2]):
        if fails(made := dataclasses.replace(program, sizes=sizes)):
            program = made
            break
    layers, _, model = program.model.rpartition("class Model")
    lines = model.splitlines()
    at = len(lines) - 1
    while at > 0:
        rest = lines[:at] + lines[at + 1 :]
        if fails(made := dataclasses.replace(program, model=_joined(layers, rest))):
            program, lines = made, rest
        at -= 1
    return program


def _joined(layers: str, model: list[str]) -> str:
    return layers + "class Model" + "\n".join(model)
