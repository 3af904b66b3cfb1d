"""Measures what ``import kernelgraph`` adds to ``import torch``. Target: at most 3 %.

Each run is a new process.

    python examples/benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

RUNS = 15
PROGRAM = """
import time
started = time.perf_counter()
import torch
torch_s = time.perf_counter() - started
started = time.perf_counter()
import kernelgraph
alone_s = time.perf_counter() - started
for name in kernelgraph.__all__:  # each is loaded at its first use
    if name != "rewrite":  # rewrite needs torch's compiler, which takes as long to load as torch
        getattr(kernelgraph, name)
print(torch_s, alone_s, time.perf_counter() - started)
"""


def main() -> None:
    """Time both imports and print the ratio."""
    runs = []
    for _ in range(RUNS):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
        )
        runs.append(tuple(map(float, done.stdout.split())))
    print(f"import torch {1e3 * statistics.median(run[0] for run in runs):.0f} ms")
    for i, what in ((1, "import kernelgraph"), (2, "and load all its public names but rewrite")):
        seconds = statistics.median(run[i] for run in runs)
        ratio = statistics.median((run[0] + run[i]) / run[0] for run in runs)
        print(f"{what}: {1e3 * seconds:.1f} ms more, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
