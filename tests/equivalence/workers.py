"""Processes that judge programs: one that dies, hangs or breaks torch harms one program."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

import kernelgraph as kg
from tests.equivalence.paths import PATHS
from tests.equivalence.programs import draw_program
from tests.equivalence.verdicts import Verdict, judge_kernels, judge_plain


def prepare() -> None:
    """Set torch up: one thread, the random numbers of eager use, and no noise."""
    torch.set_num_threads(1)
    torch._inductor.config.fallback_random = True
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def _warm() -> None:
    """Import what programs need, once for all child processes."""
    kg.kernelize(nn.Linear(1, 1), mode=kg.Mode.INFERENCE, device="cpu")
    compiled = torch.compile(nn.Linear(1, 1), backend="hubkernels", options={"inner": "aot_eager"})
    with torch.no_grad():
        compiled(torch.ones(1, 1))
    torch.compiler.reset()


@dataclass
class _Job:
    """Programs for one process."""

    seeds: deque[int]
    suspect: Verdict | None = None
    """The verdict to confirm: the process runs plain torch, on this program alone."""


@dataclass
class _Worker:
    process: BaseProcess
    reads: Connection
    job: _Job
    since: float


def _serve(job: _Job, path: str, writes: Connection) -> None:
    """Judge programs up to the first that comes out wrong: its errors may have broken torch."""
    prepare()
    if job.suspect is not None:
        writes.send(judge_plain(draw_program(job.suspect.seed), PATHS[path], job.suspect))
        return
    for seed in job.seeds:
        verdict = judge_kernels(draw_program(seed), PATHS[path])
        writes.send(verdict)
        if verdict.failure:
            return


def run_all(
    seeds: Sequence[int], path: str, jobs: int, chunk: int, timeout: float
) -> Iterator[Verdict]:
    """Judge programs in child processes and yield the verdict on each.

    Args:
        seeds: The seeds of the programs.
        path: The name of the path.
        jobs: The number of processes at a time.
        chunk: The number of programs for one process.
        timeout: The seconds that a process may take for one program.
    """
    prepare()
    _warm()
    context = multiprocessing.get_context("fork")
    waiting = deque(_Job(deque(seeds[i : i + chunk])) for i in range(0, len(seeds), chunk))
    workers: list[_Worker] = []
    while waiting or workers:
        while waiting and len(workers) < jobs:
            job = waiting.popleft()
            reads, writes = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(job, path, writes), daemon=True)
            process.start()
            writes.close()
            workers.append(_Worker(process, reads, job, time.monotonic()))
        multiprocessing.connection.wait([worker.reads for worker in workers], timeout=1)
        for worker in list(workers):
            for verdict in _read(worker):
                if verdict.failure and worker.job.suspect is None:
                    waiting.appendleft(_Job(deque([verdict.seed]), verdict))
                else:
                    yield verdict
            late = time.monotonic() - worker.since > timeout
            if late:
                worker.process.kill()
            if late or worker.reads.closed:
                worker.process.join()
                workers.remove(worker)
                yield from _end(worker, late, waiting)


def _read(worker: _Worker) -> Iterator[Verdict]:
    """Yield the verdicts that a process has sent; close the pipe where it has ended."""
    try:
        while worker.reads.poll():
            verdict: Verdict = worker.reads.recv()
            worker.job.seeds.popleft()
            worker.since = time.monotonic()
            yield verdict
    except EOFError:
        worker.reads.close()


def _end(worker: _Worker, late: bool, waiting: deque[_Job]) -> Iterator[Verdict]:
    """Yield the verdict on a program that ended its process; put the others back."""
    seeds = worker.job.seeds
    if seeds and (worker.process.exitcode or late):
        how = "no end in time" if late else f"the process died, exit code {worker.process.exitcode}"
        seed = seeds.popleft()
        verdict = Verdict(seed, failure=how)
        if worker.job.suspect is not None:
            yield Verdict(seed, skipped=f"plain torch: {how}")
        else:
            waiting.appendleft(_Job(deque([seed]), verdict))
    if seeds:
        waiting.append(_Job(seeds))
