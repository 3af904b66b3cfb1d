"""Measures the forward and backward of a layer in a compiled graph, over its kernel alone.

    python examples/benchmarks/op_training.py

It compares a function that calls layers, compiled with hubkernels, with eager calls of the forwards
of the same hub layers, each with all gradients. The calls are independent: each has its own weights
and inputs, and the graph has nothing else. The cost of a call is the difference between many calls
and few, divided by their number, which leaves out the graph and its guards. Two times are printed:
the whole, and the time until the GPU has all its work, which is the cost on the host.

Targets: at most 1.03 of the kernel's time, and no more memory. The shapes are those of the models
in ``training.py``.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from decoder import MoEExperts, RMSNorm, SiluAndMul
from programs import DEVICE, DTYPE, MODELS, Kernels, kernel_sets, machine, mapped, synchronize
from training import TOKENS, peak_mb

COUNTS = {"RMSNorm": (8, 32), "SiluAndMul": (8, 32), "MoEExperts": (2, 8)}
"""The numbers of calls in the two graphs of a layer; few for the experts, which are large."""
WARM_UP = 3
ROUNDS = 40 if DEVICE == "cuda" else 15

Layers = list[nn.Module]
Inputs = list[tuple[Tensor, ...]]
Forward = Callable[[Inputs], list[Tensor]]


def layers_and_inputs(name: str, count: int) -> tuple[Layers, Inputs]:
    """Return layers called ``name`` and arguments for a call of each, with the model's shapes."""
    title = "experts" if name == "MoEExperts" else "dense"
    config, (batch, length) = MODELS[title], TOKENS[title]
    make: dict[str, Callable[[], nn.Module]] = {
        "RMSNorm": lambda: RMSNorm(config.hidden, config.eps),
        "SiluAndMul": SiluAndMul,
        "MoEExperts": lambda: MoEExperts(config.experts, config.hidden, config.intermediate),
    }
    with torch.device(DEVICE):
        layers = [make[name]().to(DTYPE) for _ in range(count)]
        for parameter in (p for layer in layers for p in layer.parameters() if p.dim() > 1):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        inputs: Inputs = []
        for _ in layers:
            if name == "MoEExperts":
                x = torch.randn(batch * length, config.hidden, dtype=DTYPE)
                chances = torch.randn(batch * length, config.experts).softmax(-1)
                weights, index = chances.topk(config.top_k)
                inputs.append((x, index, weights.to(DTYPE)))
            else:
                width = config.hidden if name == "RMSNorm" else 2 * config.intermediate
                inputs.append((torch.randn(batch, length, width, dtype=DTYPE),))
    for t in (t for given in inputs for t in given if t.is_floating_point()):
        t.requires_grad_()
    return layers, inputs


def eager(layers: Layers, hub_layer: type[nn.Module]) -> Forward:
    """Return calls of the kernel itself."""
    calls = [functools.partial(hub_layer.forward, layer) for layer in layers]
    return lambda inputs: [call(*given) for call, given in zip(calls, inputs, strict=True)]


def compiled(layers: Layers) -> Forward:
    """Return calls of the layers, in one graph."""

    def run(inputs: Inputs) -> list[Tensor]:
        return [layer(*given) for layer, given in zip(layers, inputs, strict=True)]

    # Each has its own code object, by which Dynamo keeps compiled code.
    run.__code__ = run.__code__.replace(co_name=f"run_{len(layers)}")
    forward: Forward = torch.compile(
        run, backend="hubkernels", fullgraph=True, options={"policy": "always"}
    )
    return forward


def step_of(forward: Forward, layers: Layers, inputs: Inputs) -> Callable[[], None]:
    """Run the forward, and compute the gradients of all inputs and weights."""
    wanted = [t for given in inputs for t in given if t.requires_grad]
    wanted += [parameter for layer in layers for parameter in layer.parameters()]
    gradients = [torch.randn_like(out) for out in forward(inputs)]

    def step() -> None:
        torch.autograd.grad(forward(inputs), wanted, gradients)

    return step


def seconds(step: Callable[[], None]) -> tuple[float, float]:
    """Return the time until the step is done, and until the host is done with it."""
    synchronize()
    started = time.perf_counter()
    step()
    host = time.perf_counter()
    synchronize()
    return time.perf_counter() - started, host - started


def show(name: str, kernels: Kernels) -> None:
    """Measure the layers called ``name`` with their kernel and with its op."""
    hub_layer = kernels[name].load()
    steps: dict[tuple[str, int], Callable[[], None]] = {}
    for count in COUNTS[name]:
        layers, inputs = layers_and_inputs(name, count)
        for way, forward in (("eager", eager(layers, hub_layer)), ("op", compiled(layers))):
            steps[way, count] = step_of(forward, layers, inputs)
    times: dict[Any, list[tuple[float, float]]] = {key: [] for key in steps}
    for turn in range(ROUNDS + WARM_UP):
        for key, step in steps.items():
            measured = seconds(step)
            if turn >= WARM_UP:
                times[key].append(measured)
    few, many = COUNTS[name]

    def a_call(of: Callable[[str, int], float], way: str) -> float:
        return (of(way, many) - of(way, few)) / (many - few)

    # Without a GPU the host does all the work.
    parts = ("as a whole", "on the host") if DEVICE == "cuda" else ("as a whole",)
    for part, what in enumerate(parts):

        def us(way: str, count: int, part: int = part) -> float:
            return 1e6 * statistics.median(measured[part] for measured in times[way, count])

        kernel, op = a_call(us, "eager"), a_call(us, "op")
        print(f"  {what}: kernel {kernel:9.2f} us, op {op:9.2f} us: {op / kernel:.3f} (aim: 1.03)")
    if DEVICE == "cuda":
        kernel, op = (a_call(lambda *key: peak_mb(steps[key]), way) for way in ("eager", "op"))
        print(f"  memory: kernel {kernel:9.2f} MB, op {op:9.2f} MB: {op / kernel:.3f} (aim: 1)")


def main() -> None:
    """Run the benchmark."""
    started = time.perf_counter()
    print(machine())
    for title, kernels in kernel_sets().items():
        for name in COUNTS:
            print(f"{name} of {title}, forward and backward, a call", flush=True)
            torch.compiler.reset()
            with mapped(kernels):
                show(name, kernels)
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
