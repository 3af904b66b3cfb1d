"""Ways to run the example decoder, and their timing, for training.py and workloads.py.

On a GPU the models are large and in bfloat16, elsewhere tiny and in float32.
"""

from __future__ import annotations

import importlib.util
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "kernels")]
from build import build
from decoder import Decoder, DecoderConfig

from kernelgraph import LocalLayerRepository, use_kernel_mapping

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
MODELS = {
    "cuda": {
        "dense": DecoderConfig(hidden=2048, heads=16, kv_heads=8, intermediate=5632, layers=8),
        "experts": DecoderConfig(
            hidden=2048, heads=16, kv_heads=8, intermediate=768, layers=4, experts=64, top_k=8
        ),
    },
    "cpu": {
        "dense": DecoderConfig(layers=1),
        "experts": DecoderConfig(layers=1, experts=8),
    },
}[DEVICE]
FUNCTIONS = {"RMSNorm": "rms_norm", "SiluAndMul": "silu_and_mul", "MoEExperts": "moe_experts"}
"""The functions that the hub layers call."""


def decoder(config: DecoderConfig) -> Decoder:
    """Return the model, with random weights drawn on the device: a CPU would take seconds."""
    with torch.device(DEVICE):
        return Decoder(config).to(DTYPE)


class Loaded:
    """A repository whose hub layer is already loaded."""

    def __init__(self, layer: type[nn.Module]) -> None:
        self.layer = layer

    def load(self) -> type[nn.Module]:
        return self.layer


Kernels = dict[str, Any]
"""Repositories by layer name."""


def kernel_sets() -> dict[str, Kernels]:
    """Return the sets of kernels that run on this machine, by name."""
    root = build(backends=(DEVICE,))
    sets: dict[str, Kernels] = {
        "examples": {name: LocalLayerRepository(root, layer_name=name) for name in FUNCTIONS}
    }
    if DEVICE == "cuda" and importlib.util.find_spec("liger_kernel"):
        import liger_layers

        sets["liger"] = {name: Loaded(getattr(liger_layers, name)) for name in FUNCTIONS}
    return sets


def mapped(kernels: Kernels) -> Any:
    """Return a mapping scope with ``kernels`` and no others."""
    return use_kernel_mapping({n: {DEVICE: k} for n, k in kernels.items()}, inherit_mapping=False)


class Program:
    """A way to train a model.

    Args:
        model: Whose parameters get the gradients.
        call: Maps tokens to logits.
        kernels: What is chosen from at the first call.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any], kernels: Kernels) -> None:
        self.model = model
        self.call = call
        self.kernels = kernels

    def begin(self) -> None:
        """Free the gradients of the last step, and the results that CUDA graphs hold."""
        self.model.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def step(self, input_ids: Tensor) -> Tensor:
        """Run forward, loss and backward; return the loss."""
        logits = self.call(input_ids)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def gradient_norm(self) -> float:
        gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
        return math.hypot(*(g.float().norm().item() for g in gradients))

    def told(self, result: Tensor) -> str:
        """Describe the result of a step in words."""
        return f"loss {result.item():.4f}, gradient {self.gradient_norm():.4f}"


class Inference(Program):
    """A way to run a model for its logits."""

    def step(self, input_ids: Tensor) -> Tensor:
        """Run the forward; return the logits."""
        with torch.no_grad():
            logits: Tensor = self.call(input_ids)
        return logits

    def told(self, result: Tensor) -> str:
        return f"norm of the logits {result.float().norm().item():.4f}"


def calling(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a new function, with its own code object, that calls ``model``."""

    def run(input_ids: Tensor) -> Tensor:
        out: Tensor = model(input_ids)
        return out

    # Dynamo keeps compiled code by code object and backend. With one code object, a second set of
    # kernels would get the graph of the first.
    run.__code__ = run.__code__.replace(co_name="run")
    return run


def median_ms(
    programs: dict[str, Program], input_ids: Tensor, rounds: int, limit_s: float
) -> dict[str, float]:
    """Return the median time of each program's step in milliseconds. They take turns, the slow ones
    fewer, so that a machine which is slower for a while is slower for all; in another order each
    time, since a device runs slower after what made it hot.

    Args:
        programs: By name.
        input_ids: What they are run on.
        rounds: How many turns a program gets,
        limit_s: of which no more than fit in here, though at least three.
    """
    times = {name: [seconds(program, input_ids)] for name, program in programs.items()}
    turns = {name: max(3, min(rounds, int(limit_s / first))) for name, (first,) in times.items()}
    chance = random.Random(0)
    for turn in range(rounds):
        due = [name for name in programs if turn % (rounds // turns[name]) == 0]
        chance.shuffle(due)
        for name in due:
            times[name].append(seconds(programs[name], input_ids))
    return {name: 1e3 * statistics.median(measured[1:]) for name, measured in times.items()}


def seconds(program: Program, input_ids: Tensor) -> float:
    """Return the time of a step."""
    program.begin()
    synchronize()
    started = time.perf_counter()
    program.step(input_ids)
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def machine() -> str:
    """Describe the device. A CPU gets one thread, since others may be busy."""
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "one thread"
    return f"torch {torch.__version__} on {DEVICE} ({name}), {str(DTYPE).removeprefix('torch.')}"
