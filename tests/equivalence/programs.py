"""Random programs: a model of extensible layers with plain code around them, as plain data."""

from __future__ import annotations

import linecache
import sys
import types
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraph import replace_kernel_forward_from_hub
from tests.equivalence.calls import draw_call
from tests.equivalence.cores import AFFINE, NESTED
from tests.equivalence.layers import Layer, draw_layer
from tests.equivalence.parts import Pair
from tests.support.toy_models import on_cpu

_IMPORTS = """\
import functools
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from tests.equivalence.parts import Both, Pair, Twice, to_array, to_tensor
"""
_DTYPES = ("float32",) * 6 + ("float64", "bfloat16", "int64", "complex64")


@dataclass(frozen=True)
class Program:
    """One random program, as data."""

    seed: int
    model: str
    """The source text of the layers and of the model."""
    kernels: str
    """The source text of the kernels."""
    names: tuple[str, ...]
    """The layers."""
    dtype: str
    trains: bool
    mode: str
    """How gradients are turned off, where the program does not train."""
    wants: bool
    """Whether the input wants a gradient, where the program trains."""
    sizes: tuple[tuple[int, int], ...]
    """The sizes of the input, for each call of the model."""
    layout: str
    """How the input lies in memory."""
    container: str
    """The container that the model takes; empty where it takes none."""
    dynamic: bool | None
    differentiable: bool
    """Whether all kernels have a gradient."""
    scratch: bool
    """Whether a kernel writes into an argument that its reference spares."""

    @property
    def alone(self) -> bool:
        """Whether the kernels are right without help: in the place of the references."""
        transforms = "torch.func." in self.model or "torch.vmap" in self.model
        return self.differentiable or not (self.trains or transforms or self.scratch)

    @property
    def listing(self) -> str:
        """The program as text."""
        how = "training" if self.trains else self.mode
        head = f"# seed {self.seed}: {how}, {self.dtype}, sizes {self.sizes}, input {self.layout}"
        head += f", wants gradient {self.wants}, dynamic {self.dynamic}"
        return f"{head}\n{self.model}\n\n{self.kernels}"

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """Return a new model, and a mapping with the kernels of its layers."""
        name = f"tests.equivalence.program_{self.seed}_{_Builds.next()}"
        module = types.ModuleType(name)
        text = f"{_IMPORTS}\n\n{self.model}\n\n\n{self.kernels}\n"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        sys.modules[name] = module
        exec(compile(text, name, "exec"), vars(module))
        torch.manual_seed(0)
        model: nn.Module = module.Model()
        model.to(getattr(torch, self.dtype) if self.dtype in ("float64", "bfloat16") else None)
        kernels = {f"{name}{self.seed}": vars(module)[f"Kernel{name}"] for name in self.names}
        return model, on_cpu(**kernels)

    def tag(self, model: nn.Module) -> None:
        """Make the layers of a model extensible."""
        module = sys.modules[type(model).__module__]
        for name in self.names:
            replace_kernel_forward_from_hub(vars(module)[name], f"{name}{self.seed}")

    def inputs(self, call: int) -> tuple[Tensor, list[Any]]:
        """Return the leaf that the input is a view of, and the arguments of one call."""
        batch, rows = self.sizes[call]
        shapes = {
            "plain": (batch, rows, 4),
            "sliced": (batch, rows + 2, 4),
            "transposed": (rows, batch, 4),
            "expanded": (1, rows, 4),
        }
        shape = shapes[self.layout]
        values = torch.Generator().manual_seed(call + 100)
        if self.dtype == "int64":
            leaf = torch.randint(-5, 6, shape, generator=values)
        else:
            leaf = torch.randn(shape, generator=values).to(getattr(torch, self.dtype))
        if self.dtype == "complex64":
            leaf = leaf + 1j * torch.randn(shape, generator=values)
        if self.trains and self.wants and self.dtype != "int64":
            leaf.requires_grad_()
        views = {
            "plain": lambda: leaf,
            "sliced": lambda: leaf[:, 1:-1],
            "transposed": lambda: leaf.transpose(0, 1),
            "expanded": lambda: leaf.expand(batch, rows, 4),
        }
        containers: dict[str, list[Any]] = {"": [], "cache": [{}], "outs": [[]], "box": [Pair()]}
        return leaf, [views[self.layout](), *containers[self.container]]


class _Builds:
    """The number of builds in this process: each gets a module of its own."""

    count = 0

    @classmethod
    def next(cls) -> int:
        cls.count += 1
        return cls.count


def draw_program(seed: int) -> Program:
    """Draw the program of a seed."""
    rng = Random(seed)
    dtype = rng.choice(_DTYPES)
    layers = [draw_layer(rng, f"L{i}", dtype) for i in range(rng.choice((1, 1, 1, 2, 2, 3)))]
    trains = dtype != "int64" and rng.random() < 0.5
    written = [layer.write for layer in layers if layer.write in ("cache", "outs", "box")]
    container = written[0] if written and rng.random() < 0.5 else ""
    model = _model(rng, layers, dtype, container)
    texts = [layer.reference() for layer in layers]
    kernels = [layer.kernel() for layer in layers]
    names = [layer.name for layer in layers]
    drawn = list(layers)
    if any(layer.core is NESTED for layer in layers):
        style = rng.choice(("numpy", "torch", "function"))
        inner = Layer("Inner", AFFINE, style, "tensor", "", frozenset(), frozenset())
        drawn.append(inner)
        texts, kernels = [inner.reference(), *texts], [inner.kernel(), *kernels]
        names.append("Inner")
    sizes = [_size(rng), _size(rng)] if rng.random() < 0.4 else [_size(rng)] * 2
    sizes += [_size(rng) if rng.random() < 0.2 else sizes[0]] if rng.random() < 0.3 else []
    return Program(
        seed,
        "\n\n\n".join([*texts, model]),
        "\n\n\n".join(kernels),
        tuple(names),
        dtype,
        trains,
        rng.choice(("no_grad", "no_grad", "inference_mode")),
        rng.random() < 0.8,
        tuple(sizes),
        rng.choice(("plain", "plain", "plain", "sliced", "transposed", "expanded")),
        container,
        rng.choice((None, None, None, True)),
        all(layer.style not in ("numpy", "no_grad") for layer in drawn),
        any(layer.write == "scratch" for layer in layers),
    )


def _size(rng: Random) -> tuple[int, int]:
    batch = 0 if rng.random() < 0.04 else rng.choice((1, 2, 3, 5))
    return batch, rng.choice((2, 3, 4))


def _model(rng: Random, layers: list[Layer], dtype: str, container: str) -> str:
    """Return the source text of the model."""
    floats = dtype in ("float32", "float64", "bfloat16")
    init = ["super().__init__()", *(f"self.{v.name.lower()} = {v.name}()" for v in layers)]
    init += ["self.plain = nn.Linear(4, 4)"] if floats else []
    weighted = [layer for layer in layers if "weight" in layer.core.weights]
    alike = [
        v for v in weighted[1:] if v.core.weights["weight"] == weighted[0].core.weights["weight"]
    ]
    if alike and rng.random() < 0.5:
        init.append(f"self.{alike[0].name.lower()}.weight = self.{weighted[0].name.lower()}.weight")
    for layer in layers:
        init += _arrangements(rng, layer)
    body = [rng.choice(("h = x", "h = x * 1", "h = x + 0"))]
    kept: list[str] = []
    calls = [*layers, *(v for v in layers if rng.random() < 0.2)]
    for number, layer in enumerate(calls):
        lines, results = draw_call(rng, layer, number, dtype, container)
        body += lines
        kept += results
        body += _between(rng, floats, dtype) if rng.random() < 0.4 else []
    results = ", ".join(["h", *kept])
    body.append(f"return {results}")
    parameters = ", ".join(["self", "x", *([container] if container else [])])
    hook = "def set_scale(module, args):\n    module.scale = 3.0\n\n\n"
    hook += "def doubled(module, args, result):\n    return result * 2\n\n\n"
    text = "\n".join(f"        {line}" for part in init for line in part.splitlines())
    code = "\n".join(f"        {line}" for part in body for line in part.splitlines())
    hooks = hook if "set_scale" in text or "doubled" in text else ""
    return (
        f"{hooks}class Model(nn.Module):\n    def __init__(self):\n{text}\n\n"
        f"    def forward({parameters}):\n{code}"
    )


def _arrangements(rng: Random, layer: Layer) -> list[str]:
    """Return lines that arrange a layer: hooks, parametrizations and parameters that are fixed."""
    me, lines = f"self.{layer.name.lower()}", []
    if "scale" in layer.features and rng.random() < 0.2:
        lines.append(f"{me}.register_forward_pre_hook(set_scale)")
    if layer.form == "tensor" and rng.random() < 0.06:
        lines.append(f"{me}.register_forward_hook(doubled)")
    if layer.core.weights and rng.random() < 0.2:
        lines.append(f"{me}.weight.requires_grad_(False)")
    elif layer.core.weights and layer.style != "rerun" and rng.random() < 0.08:
        lines.append(f'parametrize.register_parametrization({me}, "weight", Twice())')
    return lines


def _between(rng: Random, floats: bool, dtype: str) -> list[str]:
    """Return a line of plain code."""
    if floats:
        return [
            rng.choice(
                (
                    "h = torch.relu(h)",
                    "h = torch.tanh(h)",
                    "h = self.plain(h)",
                    "h = h + torch.rand(h.shape, dtype=h.dtype)",
                    "h = h * 0.5",
                )
            )
        ]
    return ["h = h % 7"] if dtype == "int64" else ["h = h * 0.5"]
