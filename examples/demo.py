"""A decoder, dense and with a mixture of experts, on the kernels of ``examples/kernels``.

For each it shows which layer runs on which kernel and how far that is from the layer's reference,
and times the model: eager, eager with kernels, Inductor, and Inductor with kernels (hubkernels).

    python -m kernelgraph demo
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "kernels")]
from build import build
from decoder import Decoder, DecoderConfig

from kernelgraph import LocalLayerRepository, Mode, kernelize, last_report, use_kernel_mapping

LAYERS = ("RMSNorm", "SiluAndMul", "MoEExperts")
MODELS = {
    "dense decoder": DecoderConfig(hidden=512, intermediate=1408, layers=2),
    "mixture of experts": DecoderConfig(hidden=512, intermediate=512, layers=2, experts=8, top_k=2),
}
TOKENS = {"cpu": (2, 128), "cuda": (8, 1024)}
RUNS = 10


@torch.inference_mode()
def main() -> None:
    """Run the demo."""
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    repository = os.path.relpath(build(progress=lambda line: print(line, flush=True)))
    mapping = {name: {device: LocalLayerRepository(repository, layer_name=name)} for name in LAYERS}
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__} on {device} ({name}), {str(dtype).removeprefix('torch.')}")
    with use_kernel_mapping(mapping):
        for title, config in MODELS.items():
            model = Decoder(config).to(device, dtype).eval()
            input_ids = torch.randint(config.vocab, TOKENS[device], device=device)
            show(title, model, input_ids)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


def show(title: str, model: Decoder, input_ids: Tensor) -> None:
    """Compile ``model`` with kernels; print which they are, their errors and their times."""
    print(f"\n{title}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    compiled = with_progress(
        "compiling with hubkernels",
        torch.compile(model, backend="hubkernels", fullgraph=True),
        input_ids,
    )
    report = last_report()
    assert report is not None
    kernelized = kernelize(copy.deepcopy(model), mode=Mode.INFERENCE)
    errors = layer_errors(model, kernelized, input_ids)
    for decision in report.decisions:
        error = f"error {errors[decision.path]:.1e}" if decision.kernel else ""
        print(f"  {decision.path:<24}{decision.layer:<12}{decision.outcome}  {error}")
    expected = model(input_ids)
    difference = (compiled(input_ids) - expected).norm() / expected.norm()
    print(f"  difference of the logits, by norm: {difference.item():.1e}")
    if model.config.experts and expected.dtype != torch.float32:
        print("  (rounding sends a token to another expert here and there)")

    # Without the kernel, the loop over experts breaks the graph.
    inductor = with_progress("compiling with Inductor", torch.compile(model), input_ids)
    calls = {
        "eager": model,
        "eager, kernelized": kernelized,
        "Inductor": inductor,
        "hubkernels": compiled,
    }
    times = median_ms(calls, input_ids)
    for name, ms in times.items():
        print(f"  {name:<20}{ms:8.2f} ms   {times['eager'] / ms:5.2f} x eager")


def with_progress(what: str, compiled: Any, input_ids: Tensor) -> Any:
    """Call ``compiled`` for the first time, and print the time."""
    print(f"  {what} ...", end="", flush=True)
    started = time.perf_counter()
    compiled(input_ids)
    print(f" {time.perf_counter() - started:.1f} s")
    return compiled


def layer_errors(model: nn.Module, kernelized: nn.Module, input_ids: Tensor) -> dict[str, float]:
    """Return the largest error of each kernel against its reference, on the model's own values."""
    errors: dict[str, float] = {}

    def compare(path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            made = kernelized.get_submodule(path)(*args)
            errors[path] = (made - output).abs().max().item()

        return hook

    handles = [
        module.register_forward_hook(compare(path))
        for path, module in model.named_modules()
        if "forward" in vars(kernelized.get_submodule(path))
    ]
    model(input_ids)
    for handle in handles:
        handle.remove()
    return errors


def median_ms(calls: dict[str, Callable[[Tensor], Any]], input_ids: Tensor) -> dict[str, float]:
    """Return the median time of each call in milliseconds. The calls take turns, so that a machine
    that is slower for a while slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(RUNS + 2):
        for name, call in calls.items():
            _synchronize()
            started = time.perf_counter()
            call(input_ids)
            _synchronize()
            if run >= 2:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(ms) for name, ms in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
