"""``python -m tests.equivalence``: run many random programs with kernels and without."""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

_findings = tempfile.TemporaryDirectory(prefix="kernelgraph-equivalence-")
os.environ["KERNELGRAPH_CACHE_DIR"] = _findings.name
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(_findings.name, "inductor"))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
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
    from tests.equivalence.paths import PATHS
    from tests.equivalence.programs import draw_program
    from tests.equivalence.verdicts import judge, shrink
    from tests.equivalence.workers import prepare, run_all

    seeds = options.seeds or range(options.seed, options.seed + options.count)
    path = PATHS[options.path]
    if options.list:
        for seed in seeds:
            print(draw_program(seed).listing, end="\n\n\n")
        return 0
    if options.shrink:
        prepare()
        for seed in seeds:
            smaller = shrink(draw_program(seed), path)
            print(judge(smaller, path).failure, smaller.listing, sep="\n", end="\n\n")
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
