"""What ``import kernelgraph`` adds to ``import torch``. Target: at most 3 %.

Each is timed in processes of its own, in turns.

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
print(torch_s, time.perf_counter() - started)
"""


def main() -> None:
    """Time both imports and print the ratio."""
    runs = []
    for _ in range(RUNS):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
        )
        runs.append(tuple(map(float, done.stdout.split())))
    torch_s = statistics.median(run[0] for run in runs)
    ours_s = statistics.median(run[1] for run in runs)
    ratio = statistics.median(ours / torch for torch, ours in runs)
    print(f"import torch {1e3 * torch_s:.0f} ms; import kernelgraph {1e3 * ours_s:.2f} ms more")
    print(f"ratio {1 + ratio:.4f}")


if __name__ == "__main__":
    main()
