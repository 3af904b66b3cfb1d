"""Inductor and AOTInductor: settings, generated code, decompositions, packages."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._inductor.codegen.custom_extern_kernel_codegen import (
    CUSTOM_EXTERN_KERNEL_CODEGEN,
    CustomCodegen,
)
from torch._library.utils import get_layout_constraint_tag
from torch._subclasses.fake_tensor import is_fake as is_fake
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols as free_unbacked_symbols


def inductor_backend(
    mode: str | None, options: Mapping[str, Any]
) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """What ``torch.compile(backend="inductor", ...)`` makes of these arguments."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    return wrapper(mode, dict(options) or None, None)  # type: ignore[no-any-return]


def inductor_options() -> frozenset[str]:
    """The names of Inductor's options."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def inductor_settings() -> str:
    """A hash of what is set in ``torch._inductor.config``. Tried on 2.11, 2.13, 2.14."""
    from torch._inductor import config

    return config.get_hash().hex()


def reset_inductor() -> None:
    """What ``torch.compiler.reset()`` asks of a compile by Inductor."""
    inductor_backend(None, {}).reset()  # type: ignore[attr-defined]


def call_without_dispatch(op: Any, body: Callable[..., Any]) -> None:
    """Have the code that Inductor writes call ``body`` where it would call ``op``.

    It calls ops with autograd and every dispatch mode out of the way, so that all which the
    dispatcher does is cost time: 3 us and more, as much as a small kernel. Where there is a
    profiler it goes through the dispatcher, to be seen. Code for AOTInductor stays as it is.
    Tried on 2.11, 2.13, 2.14.
    """

    profiling = "torch._C._autograd._profiler_enabled()"

    def write(node: Any, writeline: Callable[[str], None]) -> None:
        arguments = ", ".join([*node.codegen_args(), *node.codegen_kwargs()])
        name = node.python_kernel_name
        writeline(f"{node.get_name()} = ({name} if {profiling} else {name}.run)({arguments})")

    op.run = body
    CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{op}"] = CustomCodegen(python=write)


def register_decomposition(op: Any, fake: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Have ``torch.onnx.export`` replace ``op`` by what ``function`` computes.

    It goes by a table of all decompositions that there are. So do fake tensors, for ops that have
    no fake of Python's, and those are told from another table: an op's is to be in both. Nothing
    else of torch's goes by them for an op that is not its own, but that Inductor, where the
    environment has ``CI``, takes such an op for a mistake of its own and stops. So there it is
    told what it else finds out: that the op stays as it is. Tried on 2.11, 2.13, 2.14.
    """
    torch._decomp.meta_table[op] = fake
    torch._decomp.decomposition_table[op] = function
    if os.environ.get("CI"):
        lowering: Any = importlib.import_module("torch._inductor.lowering")
        if op not in lowering.lowerings:
            layout = lowering.tag_to_layout_constraint(get_layout_constraint_tag(op))
            lowering.make_fallback(op, layout, warn=False)


def aot_compile(program: Any, path: os.PathLike[str], configs: dict[str, Any]) -> None:
    """Compile an exported program to a package of AOTInductor's. Tried on 2.13, 2.14."""
    torch._inductor.aoti_compile_and_package(
        program, package_path=os.fspath(path), inductor_configs=configs
    )


def aot_load(path: os.PathLike[str]) -> Callable[..., Any]:
    """Load such a package. Tried on 2.13, 2.14, and on 2.11 for the CPU."""
    model: Callable[..., Any] = torch._inductor.aoti_load_package(os.fspath(path))
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from saying, at length, that something cannot be exported.

    Most of it is logged; 2.11 prints the graph that it had so far.
    """
    names = ("export", "fx.experimental.symbolic_shapes", "_export.non_strict_utils")
    loggers = [logging.getLogger(f"torch.{name}") for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
