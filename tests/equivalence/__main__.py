"""``python -m tests.equivalence``: run many random programs with kernels and without."""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import resource
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

_findings = tempfile.TemporaryDirectory(prefix="kernelgraph-equivalence-")
os.environ["KERNELGRAPH_CACHE_DIR"] = _findings.name
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(_findings.name, "inductor"))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from tests.equivalence.verdicts import Verdict

CHUNK = 100
"""The number of programs that one process runs: memory stays bounded."""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.equivalence", description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, nargs="*", help="these seeds alone")
    parser.add_argument("--path", default="aot_eager", help="one of the paths in paths.py")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--child", action="store_true", help="a process for each program")
    parser.add_argument("--list", action="store_true", help="print the programs, run nothing")
    parser.add_argument("--shrink", action="store_true", help="print smaller programs that fail")
    parser.add_argument("--quiet", action="store_true", help="print no listings")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one program")
    return parser.parse_args()


@dataclass
class _Worker:
    """A process that runs some programs, and those that it has not finished."""

    process: Any
    reads: Connection
    left: deque[int]
    since: float


def _serve(seeds: Sequence[int], path: str, writes: Connection) -> None:
    """Run programs, in a process of their own."""
    from tests.equivalence.verdicts import judge_seed

    _prepare()
    for seed in seeds:
        writes.send(judge_seed(seed, path))
    writes.close()


def _prepare() -> None:
    """Set torch up: one thread, the random numbers of eager use, and no noise."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    torch._inductor.config.fallback_random = True
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def run_all(
    seeds: Sequence[int], path: str, jobs: int, chunk: int, timeout: float
) -> Iterator[Verdict]:
    """Run programs in child processes and yield the verdict on each.

    A process that dies is a failure of the program that it was running.
    """
    from tests.equivalence.verdicts import Verdict

    context = multiprocessing.get_context("fork")
    waiting = deque(tuple(seeds[i : i + chunk]) for i in range(0, len(seeds), chunk))
    workers: list[_Worker] = []
    while waiting or workers:
        while waiting and len(workers) < jobs:
            part = waiting.popleft()
            reads, writes = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(part, path, writes), daemon=True)
            process.start()
            writes.close()
            workers.append(_Worker(process, reads, deque(part), time.monotonic()))
        multiprocessing.connection.wait([w.reads for w in workers], timeout=1)
        for worker in list(workers):
            late = time.monotonic() - worker.since > timeout
            try:
                while worker.reads.poll():
                    verdict: Verdict = worker.reads.recv()
                    worker.left.popleft()
                    worker.since = time.monotonic()
                    yield verdict
            except EOFError:
                worker.process.join()
            if not worker.process.is_alive() or late:
                if worker.process.is_alive():
                    worker.process.kill()
                worker.process.join()
                if worker.reads in multiprocessing.connection.wait([worker.reads], 0):
                    try:
                        yield worker.reads.recv()
                        worker.left.popleft()
                        continue
                    except EOFError:
                        pass
                workers.remove(worker)
                if worker.left:
                    code = worker.process.exitcode
                    how = "no end in time" if late else f"the process died, exit code {code}"
                    yield Verdict(worker.left.popleft(), failure=how)
                    if worker.left:
                        waiting.appendleft(tuple(worker.left))


def _print_table(verdicts: Sequence[Verdict], seconds: float) -> None:
    from tests.equivalence.verdicts import general

    run = [v for v in verdicts if not v.skipped]
    failed = [v for v in run if v.failure]
    with_kernel = [v for v in run if v.kernels]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    each = (used.ru_utime + used.ru_stime) / max(len(verdicts), 1)
    print(f"\n{len(verdicts)} programs in {seconds:.0f} s ({each:.2f} s of one core each)")
    print(f"{len(run):6} ran, {len(with_kernel)} of them with a kernel in at least one call")
    print(f"{sum(v.kernels for v in run):6} calls used a kernel")
    kept = Counter(general(reason) for v in run for reason in v.kept)
    print(f"{sum(kept.values()):6} calls kept the reference:")
    for reason, count in kept.most_common():
        print(f"{count:10}  {reason}")
    skipped = Counter(general(v.skipped) for v in verdicts if v.skipped)
    print(f"{sum(skipped.values()):6} skipped:")
    for reason, count in skipped.most_common():
        print(f"{count:10}  {reason}")
    print(f"{len(failed):6} failures:")
    for reason, count in Counter(general(v.failure) for v in failed).most_common():
        seeds = [v.seed for v in failed if general(v.failure) == reason]
        print(f"{count:10}  {reason}  seeds {' '.join(map(str, seeds[:8]))}")


def main() -> int:
    """Run the programs that the command line names; 1 where one came out wrong."""
    options = _options()
    import torch._dynamo
    import torch._inductor.config  # noqa: F401

    from tests.equivalence.programs import draw_program

    seeds = options.seeds or range(options.seed, options.seed + options.count)
    if options.list:
        for seed in seeds:
            print(draw_program(seed).listing, end="\n\n\n")
        return 0
    if options.shrink:
        from tests.equivalence.paths import PATHS
        from tests.equivalence.verdicts import judge, shrink

        _prepare()
        for seed in seeds:
            smaller = shrink(draw_program(seed), PATHS[options.path])
            print(
                judge(smaller, PATHS[options.path]).failure, smaller.listing, sep="\n", end="\n\n"
            )
        return 0
    started = time.monotonic()
    verdicts = []
    chunk = 1 if options.child else CHUNK
    for verdict in run_all(seeds, options.path, options.jobs, chunk, options.timeout):
        verdicts.append(verdict)
        if verdict.failure:
            print(f"seed {verdict.seed}: {verdict.failure}", flush=True)
            if not options.quiet:
                print(draw_program(verdict.seed).listing, end="\n\n", flush=True)
    _print_table(verdicts, time.monotonic() - started)
    return int(any(v.failure for v in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
