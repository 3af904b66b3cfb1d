"""Compares a program with kernels baked in with the compiled model that it comes from.

The example decoder runs with its kernels in four ways that take turns: compiled by torch.compile;
as a program that was saved and loaded; that program compiled; and as an AOTInductor package. All
run the same kernels. The ratios are those of medians. Target: the package at most 1.02 of the
compiled model. It also prints the times of export, save and load, and the sizes of the files.

    python examples/benchmarks/export.py [--device cuda] [--experts 8] [--no-aot]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]
from build import build
from decoder import Decoder, DecoderConfig

import kernelgraph
from kernelgraph import LocalLayerRepository, Mode

LAYERS = ("RMSNorm", "SiluAndMul", "MoEExperts")
ROUNDS = 200


def main() -> None:
    """Print the times, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--no-aot", action="store_true", help="leave AOTInductor out")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    repository = build(backends=(parsed.device,))
    kernels = {name: LocalLayerRepository(repository, layer_name=name) for name in LAYERS}
    kernelgraph.register_kernel_mapping({n: {parsed.device: k} for n, k in kernels.items()})
    config = DecoderConfig(hidden=parsed.hidden, layers=parsed.layers, experts=parsed.experts)
    dtype = torch.float32 if parsed.device == "cpu" else torch.bfloat16
    model = Decoder(config).eval().to(parsed.device, dtype)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        measure(model, Path(scratch), parsed.device, aot=not parsed.no_aot)


def measure(model: Decoder, scratch: Path, device: str, aot: bool) -> None:
    """Export, save, load, compile and time a model."""
    ids = torch.randint(model.config.vocab, (2, 64), device=device)
    dynamic = ({0: Dim("batch", max=64), 1: Dim("length", max=2048)},)
    program = timed(
        "export",
        lambda: kernelgraph.export(model, (ids,), mode=Mode.INFERENCE, dynamic_shapes=dynamic),
    )
    beside, bundled = scratch / "beside.pt2", scratch / "bundled.pt2"
    timed("save, kernels beside", lambda: kernelgraph.save(program, beside))
    timed("save, kernels bundled", lambda: kernelgraph.save(program, bundled, bundle=True))
    torch.export.save(
        torch.export.export(model_without_kernels(model), (ids,)), scratch / "plain.pt2"
    )
    if aot:
        package = scratch / "aot.pt2"
        timed("aot_compile", lambda: kernelgraph.aot_compile(program, package, bundle=True))
    for file in sorted(scratch.glob("*.pt2")):
        print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")
    timed(
        "torch.export.load of the plain program", lambda: torch.export.load(scratch / "plain.pt2")
    )
    loaded = timed(
        "load", lambda: kernelgraph.load(scratch / "bundled.pt2", trust_remote_code=True)
    )
    module = loaded.module()
    ways: dict[str, Callable[..., Any]] = {
        "torch.compile(model)": torch.compile(
            model, backend="hubkernels", dynamic=True, options={"policy": "always"}
        ),
        "program": module,
        "torch.compile(program)": torch.compile(loaded.module(), dynamic=True),
    }
    if aot:
        ways["AOTInductor"] = timed(
            "aot_load", lambda: kernelgraph.aot_load(package, trust_remote_code=True)
        )
    for shape in ((2, 2), (2, 64), (4, 256)):
        compare(torch.randint(model.config.vocab, shape, device=device), ways)


def model_without_kernels(model: Decoder) -> Any:
    """Return the model without kernels if it can be exported so, else the part that can."""
    return model if not model.config.experts else model.embed


def timed(what: str, call: Callable[[], Any]) -> Any:
    """Run a step and print how long it took."""
    started = time.perf_counter()
    made = call()
    print(f"{what}: {time.perf_counter() - started:.2f} s")
    return made


def compare(tokens: torch.Tensor, ways: dict[str, Callable[..., Any]]) -> None:
    """Print the median of each way, and its ratio to that of the first."""
    for call in ways.values():
        for _ in range(5):
            call(tokens)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, call in ways.items():
            synchronize(tokens)
            started = time.perf_counter()
            call(tokens)
            synchronize(tokens)
            times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: statistics.median(found) for name, found in times.items()}
    first = next(iter(medians.values()))
    shown = ", ".join(f"{n} {m:.3f} ms ({m / first:.3f})" for n, m in medians.items())
    print(f"{'x'.join(map(str, tokens.shape))} tokens: {shown}")


def synchronize(tokens: torch.Tensor) -> None:
    """Wait for the device."""
    if tokens.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
