"""The ways to run a program: with plain torch, and with kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

import kernelgraph as kg
from kernelgraph import Mode
from tests.equivalence.outcomes import Prepare
from tests.equivalence.programs import Program


@dataclass(frozen=True)
class Path:
    """A way to run programs."""

    name: str
    ours: Callable[[Program], Prepare]
    """Runs them with kernels."""
    plain: Callable[[Program], Prepare]
    """Does the same without kernelgraph."""
    one_size: bool = False
    """Whether all calls have the sizes of the first."""


def eager(program: Program) -> Prepare:
    """Run a model as it is."""
    return lambda model, arguments: (model, model, True)


def _compiled(backend: str, **options: Any) -> Callable[[Program], Prepare]:
    def path(program: Program) -> Prepare:
        def prepare(model: nn.Module, arguments: list[Any]) -> Any:
            given = {"options": options} if options else {}
            run = torch.compile(model, backend=backend, dynamic=program.dynamic, **given)
            return run, model, True

        return prepare

    return path


def _mode(program: Program) -> Mode:
    return Mode.TRAINING if program.trains else Mode.INFERENCE


def _kernelized(program: Program) -> Prepare:
    def prepare(model: nn.Module, arguments: list[Any]) -> Any:
        kg.kernelize(model, mode=_mode(program), device="cpu")
        return model, model, True

    return prepare


def _kernelized_compiled(program: Program) -> Prepare:
    def prepare(model: nn.Module, arguments: list[Any]) -> Any:
        kg.kernelize(model, mode=_mode(program) | Mode.TORCH_COMPILE, device="cpu")
        return _compiled("aot_eager")(program)(model, arguments)

    return prepare


def _exported(strict: bool, with_kernels: bool) -> Callable[[Program], Prepare]:
    def path(program: Program) -> Prepare:
        def prepare(model: nn.Module, arguments: list[Any]) -> Any:
            given = tuple(arguments)
            if with_kernels:
                made = kg.export(model, given, mode=_mode(program), strict=strict)
            else:
                made = torch.export.export(model, given, strict=strict)
            run = made.module()
            return run, run, False

        return prepare

    return path


def _traced(program: Program) -> Prepare:
    """Trace a model with its layers as leaves, as `rewrite` wants it."""

    def prepare(model: nn.Module, arguments: list[Any]) -> Any:
        program.tag(model)
        graph = fx.GraphModule(model, kg.Tracer().trace(model))
        return graph, graph, False

    return prepare


def _rewritten(program: Program) -> Prepare:
    def prepare(model: nn.Module, arguments: list[Any]) -> Any:
        graph, _, _ = _traced(program)(model, arguments)
        assert isinstance(graph, fx.GraphModule)
        kg.rewrite(graph, mode=_mode(program), example_inputs=tuple(arguments))
        return graph, graph, False

    return prepare


def _direct(program: Program) -> Prepare:
    """Put the kernels' forwards in the place of the layers' own: are the kernels right?"""

    def prepare(model: nn.Module, arguments: list[Any]) -> Any:
        if not program.alone:
            raise RuntimeError("the kernels need help")
        names = vars(sys.modules[type(model).__module__])
        for name in program.names:
            names[name].forward = names[f"Kernel{name}"].forward
        return model, model, True

    return prepare


PATHS = {
    path.name: path
    for path in (
        Path("eager", _compiled("hubkernels", inner="eager", policy="always"), _compiled("eager")),
        Path(
            "aot_eager",
            _compiled("hubkernels", inner="aot_eager", policy="always"),
            _compiled("aot_eager"),
        ),
        Path("inductor", _compiled("hubkernels", policy="always"), _compiled("inductor")),
        Path("fastest", _compiled("hubkernels", policy="fastest"), _compiled("inductor")),
        Path("direct", _direct, eager),
        Path("kernelize", _kernelized, eager),
        Path("kernelize_compile", _kernelized_compiled, _compiled("aot_eager")),
        Path("export", _exported(False, True), _exported(False, False), one_size=True),
        Path("export_strict", _exported(True, True), _exported(True, False), one_size=True),
        Path("rewrite", _rewritten, _traced, one_size=True),
    )
}
