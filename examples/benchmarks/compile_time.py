"""Compares compile times of a 16-layer decoder: hubkernels against Inductor alone.

Each compiles cold, in a new process with an empty cache, and then warm, in a second process with
that cache. The two take turns. Targets: at most 1.05 of Inductor, cold and warm.

    python examples/benchmarks/compile_time.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
BACKENDS = ("inductor", "hubkernels")
STARTS = ("cold", "warm")
RUNS = 3
LAYERS = 16


def compile_once(backend: str) -> None:
    """Compile the decoder and print the seconds that it takes."""
    import torch

    sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "kernels")]
    from build import build
    from decoder import Decoder, DecoderConfig

    import kernelgraph

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("RMSNorm", "SiluAndMul")
    repository = build()
    kernelgraph.register_kernel_mapping(
        {n: {device: kernelgraph.LocalLayerRepository(repository, layer_name=n)} for n in names}
    )
    model = Decoder(DecoderConfig(hidden=64, intermediate=128, layers=LAYERS)).to(device)
    input_ids = torch.randint(1024, (2, 32), device=device)
    # A process pays once for imports, the toolchain and loading the kernel.
    torch.compile(Decoder(DecoderConfig(layers=1)).to(device), backend=backend)(input_ids)
    torch.compiler.reset()
    with torch.no_grad():
        started = time.perf_counter()
        torch.compile(model, backend=backend, fullgraph=True)(input_ids)
        print(time.perf_counter() - started)


def seconds(backend: str, cache: str) -> float:
    """Return the seconds that the compile takes in a new process with ``cache``."""
    done = subprocess.run(
        [sys.executable, __file__, backend],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "KERNELGRAPH_CACHE_DIR": cache,
            "KERNELGRAPH_POLICY": "always",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Compile with the backends in turns and print the ratios."""
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(RUNS):
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as cache:
                for start in STARTS:
                    times.setdefault((start, backend), []).append(seconds(backend, cache))
            took = ", ".join(f"{start} {times[start, backend][-1]:.2f} s" for start in STARTS)
            print(f"{backend:<12}{took}", flush=True)
    for start in STARTS:
        inductor, ours = (statistics.median(times[start, backend]) for backend in BACKENDS)
        print(
            f"{start}, median: Inductor {inductor:.2f} s, hubkernels {ours:.2f} s, "
            f"ratio {ours / inductor:.2f}"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compile_once(sys.argv[1])
    else:
        main()
