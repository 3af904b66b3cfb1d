"""Compares loading a kernel from the cache with Python's own ``import`` of the same module.

The kernel is served by a Hub on this machine, in a repository of the size of the Hub's larger ones
(40 variants of 10 files), and is in the cache. Each round imports it again. Its binary is small;
the digests of large ones are measured separately. Targets: at most 2 ms more than ``import``;
no request where the commit is pinned, one otherwise; digests at hashlib's speed.

    python examples/benchmarks/load.py
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.loopback import LoopbackHub
from tests.support.toy_repository import variant_files

ROUNDS = 60
VARIANTS = 40
LAYER = """
from torch import nn

class Add(nn.Module):
    def forward(self, x):
        return x + 1
"""
FILES: dict[str, str | bytes] = {
    "__init__.py": "from . import layers\n",
    "layers.py": LAYER,
    **{f"part_{i}.py": LAYER * 4 for i in range(6)},
    "_ops.so": b"\x7fELF" * 10_000,
}
DIGESTED = 200 * 1024 * 1024


def main() -> None:
    """Print each time, and its ratio to the time that it is compared with."""
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as scratch:
        os.environ |= {
            "HF_ENDPOINT": hub.endpoint,
            "KERNELS_CACHE": scratch,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        measure_loading(hub)
    with tempfile.TemporaryDirectory() as scratch:
        measure_digests(Path(scratch))


def measure_loading(hub: LoopbackHub) -> None:
    from kernelgraph import LayerRepository
    from kernelgraph.hub.client import Hub, Resolved
    from kernelgraph.selection.devices import Target

    hub.organisation("org", trusted=True)
    repository = hub.repository("org/toy")
    files = variant_files(FILES)
    for i in range(1, VARIANTS):
        files |= variant_files(FILES, variant=f"torch2{i}-cxx11-cu130-aarch64-darwin")
    commit = repository.commit(files, branch="v1", tag="v0.1.0")
    target = Target("cpu")
    pinned = LayerRepository("org/toy", layer_name="Add", revision=commit)
    pinned.load(target)

    directory = Hub().snapshot(Resolved("org/toy", "kernel", commit)) / "build"
    sys.path.insert(0, str(directory))
    name = "torch-universal"
    plain = median(lambda: importlib.import_module(name), forget=name)
    print(f"import of the module, from bytecode: {plain:.2f} ms")
    hub.asked()
    ways: dict[str, dict[str, Any]] = {
        "a pinned commit": {"revision": commit},
        "a branch": {"version": 1},
        "a bound": {"version": ">=0.1"},
    }
    for title, asked in ways.items():
        wanted = LayerRepository("org/toy", layer_name="Add", **asked)
        took = median(functools.partial(wanted.load, target), forget="kernelgraph_toy")
        requests = len(hub.asked()) / (ROUNDS + 1)
        print(
            f"load() by {title}: {took:.2f} ms, {took - plain:+.2f} ms, ratio {took / plain:.2f}, "
            f"{requests:.0f} requests"
        )
    again = median(lambda: pinned.load(target), forget=None)
    print(f"load() of what is imported already: {again:.2f} ms")


def median(call: Callable[[], object], forget: str | None) -> float:
    """Return the time of ``call`` in ms; the modules of a prefix are dropped before each call."""
    times = []
    for _ in range(ROUNDS + 1):
        for module in [m for m in sys.modules if forget and m.startswith(forget)]:
            del sys.modules[module]
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def measure_digests(directory: Path) -> None:
    from kernelgraph.builds import digest_files

    content = os.urandom(1 << 20) * (DIGESTED >> 22)
    for i in range(4):
        (directory / f"{i}.so").write_bytes(content)

    def plain() -> None:
        for _ in range(4):
            hashlib.sha256(content).digest()

    ratios = []
    for _ in range(5):
        times = []
        for call in (plain, lambda: digest_files(directory)):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
    speed = DIGESTED / times[1] / 1e9
    print(
        f"digests of 200 MiB in files: {speed:.2f} GB/s, ratio to hashlib on the same bytes "
        f"{statistics.median(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
