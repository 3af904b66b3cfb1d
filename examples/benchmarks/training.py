"""Times a training step of a decoder, dense and with experts, with kernels and without.

    python examples/benchmarks/training.py [dense] [experts]

It compares the model run eagerly, eagerly with kernels (``kernelize``), compiled by Inductor, and
compiled by Inductor with every kernel (hubkernels). The kernels are those of the
example repository and, on a machine with a GPU where the package is installed, liger-kernel's. A
step is the forward, the loss and the backward; the optimizer, which would do the same for all, is
left out, and the vocabulary is small. The loss is computed eagerly.

On a GPU the models are large and in bfloat16, elsewhere tiny and in float32. All times are medians
of one run in which the programs take turns. The memory is the peak of a step over the memory
before it. At the end the program counts how often the forward of each kernel ran in a step. That
must be once for each layer: a backward that runs it again costs it twice.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from programs import (
    DEVICE,
    FUNCTIONS,
    MODELS,
    Kernels,
    Program,
    calling,
    decoder,
    kernel_sets,
    machine,
    mapped,
    median_ms,
    synchronize,
)
from torch import Tensor, nn

from kernelgraph import Mode, kernelize

TOKENS = {
    "cuda": {"dense": (4, 1024), "experts": (2, 1024)},
    "cpu": {"dense": (2, 64), "experts": (2, 64)},
}[DEVICE]
WARM_UP = 3
ROUNDS = 20
SECONDS = 3.0 if DEVICE == "cuda" else 1.0
"""The seconds for the turns of a program; it gets at least three."""


def programs(model: nn.Module, sets: dict[str, Kernels]) -> dict[str, Program]:
    """Return the programs to compare, by name. Nothing is compiled yet."""
    made = {
        "eager": Program(model, model, {}),
        "Inductor": Program(model, torch.compile(calling(model)), {}),
    }
    for name, kernels in sets.items():
        with mapped(kernels):
            kernelized = kernelize(copy.deepcopy(model), mode=Mode.TRAINING)
        made[f"eager, {name}"] = Program(kernelized, kernelized, kernels)
        compiled = torch.compile(
            calling(model), backend="hubkernels", fullgraph=True, options={"policy": "always"}
        )
        made[f"hubkernels, {name}"] = Program(model, compiled, kernels)
    return made


def warm_up(programs: dict[str, Program], input_ids: Tensor) -> None:
    """Compile and tune; print the time and the result of each program."""
    for name, program in programs.items():
        started = time.perf_counter()
        with mapped(program.kernels):
            for _ in range(WARM_UP):
                program.begin()
                loss = program.step(input_ids)
        told = program.told(loss)
        program.begin()
        took = time.perf_counter() - started
        print(f"  {name:<22} {told} ({took:.1f} s)", flush=True)


def peak_mb(run: Callable[[], object]) -> float:
    """Return the peak GPU memory during ``run``, over the memory before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@contextlib.contextmanager
def counting(kernels: Kernels) -> Iterator[Counter[str]]:
    """Counts how often the forward of each hub layer runs."""
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for name, repository in kernels.items():
            module = sys.modules[repository.load().__module__]
            function = getattr(module, FUNCTIONS[name])
            setattr(module, FUNCTIONS[name], counted(function, counts, name))
            stack.callback(setattr, module, FUNCTIONS[name], function)
        yield counts


def counted(
    function: Callable[..., Tensor], counts: Counter[str], name: str
) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        counts[name] += 1
        return function(*args)

    return run


def forwards(program: Program, input_ids: Tensor) -> Counter[str]:
    """Return how often the forward of each kernel runs in a step."""
    program.model.zero_grad()
    with counting(program.kernels) as counts:
        program.step(input_ids)
        synchronize()
    return counts


def show(model: nn.Module, sets: dict[str, Kernels], input_ids: Tensor) -> bool:
    """Measure a model; return whether each kernel's forward ran once for each layer."""
    compared = programs(model, sets)
    warm_up(compared, input_ids)
    ms = median_ms(compared, input_ids, ROUNDS, SECONDS)
    for name in compared:
        print(f"  {name:<22}{ms[name]:9.2f} ms a step {ms['eager'] / ms[name]:6.2f} x eager")
    for name in sets:
        ours, theirs = ms[f"hubkernels, {name}"], ms[f"eager, {name}"]
        print(
            f"  kernels of {name}: hubkernels / Inductor {ours / ms['Inductor']:.3f}, "
            f"hubkernels / eager kernelized {ours / theirs:.3f}"
        )
    if DEVICE == "cuda":
        for name, program in compared.items():
            program.model.zero_grad()
            peak = peak_mb(functools.partial(program.step, input_ids))
            print(f"  {name:<22}{peak:9.0f} MB in a step")
            program.model.zero_grad()
    layers = Counter(getattr(module, "kernel_layer_name", None) for module in model.modules())
    once = Counter({name: layers[name] for name in FUNCTIONS if layers[name]})
    alright = True
    for name, program in compared.items():
        if program.kernels:
            ran = forwards(program, input_ids)
            alright &= ran == once
            of = ", ".join(f"{n} {ran[n]} for {once[n]} layers" for n in once)
            print(f"  forwards in a step, {name}: {of}")
    return alright


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="A training step with kernels and without.")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; else all")
    titles = parser.parse_args().models or list(MODELS)
    if unknown := set(titles) - set(MODELS):
        parser.error(f"there is no model {', '.join(sorted(unknown))}; there are {list(MODELS)}")
    started = time.perf_counter()
    print(machine())
    sets = kernel_sets()
    alright = True
    for title in titles:
        config = MODELS[title]
        torch.compiler.reset()
        model = decoder(config)
        input_ids = torch.randint(config.vocab, TOKENS[title], device=DEVICE)
        print(f"\n{title}, tokens {list(input_ids.shape)}: {config}")
        alright &= show(model, sets, input_ids)
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    if not alright:
        sys.exit("a forward did not run exactly once")


if __name__ == "__main__":
    main()
