"""Compile time of a 16-layer decoder: hubkernels against Inductor alone.

Each is compiled cold, in a process and a cache of its own, in turns. Target: at most 1.05.

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
    # What a process pays once whatever it compiles: imports, the toolchain, the kernel's load.
    torch.compile(Decoder(DecoderConfig(layers=1)).to(device), backend=backend)(input_ids)
    torch.compiler.reset()
    with torch.no_grad():
        started = time.perf_counter()
        torch.compile(model, backend=backend, fullgraph=True)(input_ids)
        print(time.perf_counter() - started)


def main() -> None:
    """Compile with each backend in turns and print the ratio."""
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(RUNS):
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as cache:
                done = subprocess.run(
                    [sys.executable, __file__, backend],
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                    capture_output=True,
                    text=True,
                    check=True,
                )
            times[backend].append(float(done.stdout.split()[-1]))
            print(f"{backend:<12}{times[backend][-1]:7.1f} s", flush=True)
    inductor, ours = (statistics.median(times[backend]) for backend in BACKENDS)
    print(
        f"median: Inductor {inductor:.1f} s, hubkernels {ours:.1f} s, ratio {ours / inductor:.2f}"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compile_once(sys.argv[1])
    else:
        main()
