"""Inductor and AOTInductor: the backend, its settings, generated code, decompositions, packages."""

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


def inductor_backend(
    mode: str | None, options: Mapping[str, object]
) -> Callable[[fx.GraphModule, list[object]], object]:
    """Return the backend that ``torch.compile(backend="inductor", ...)`` uses."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    return wrapper(mode, dict(options) or None, None)  # type: ignore[no-any-return]


def inductor_options() -> frozenset[str]:
    """Return the names of Inductor's options."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def inductor_settings() -> str:
    """Return a hash of the settings in ``torch._inductor.config``. Tried on 2.11, 2.13, 2.14."""
    from torch._inductor import config

    return config.get_hash().hex()


def reset_inductor() -> None:
    """Reset Inductor, as ``torch.compiler.reset()`` does."""
    inductor_backend(None, {}).reset()  # type: ignore[attr-defined]


def call_without_dispatch(op: Any, body: Callable[..., Any]) -> None:
    """Make the code that Inductor generates call ``body`` instead of ``op``.

    Inductor calls ops below autograd and outside of every dispatch mode. There the dispatcher only
    costs time: 3 us and more, as much as a small kernel
    (https://github.com/pytorch/pytorch/issues/177109). While a profiler runs, the call goes through
    the dispatcher, so that the profiler sees it. Code for AOTInductor does not change. Tried on
    2.11, 2.13, 2.14.
    """

    profiling = "torch._C._autograd._profiler_enabled()"

    def write(node: Any, writeline: Callable[[str], None]) -> None:
        arguments = ", ".join([*node.codegen_args(), *node.codegen_kwargs()])
        name = node.python_kernel_name
        writeline(f"{node.get_name()} = ({name} if {profiling} else {name}.run)({arguments})")

    op.run = body
    CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{op}"] = CustomCodegen(python=write)


def register_decomposition(op: Any, fake: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Make ``torch.onnx.export`` replace ``op`` by the ops that ``function`` calls.

    It uses the table of all decompositions. Fake tensors use that table too, for ops that have no
    fake in the table of fakes; so the op needs an entry in both. With ``CI`` set in the
    environment, Inductor stops at an op that has a decomposition and no lowering; so it gets the
    fallback that Inductor would give it otherwise. Tried on 2.11, 2.13, 2.14.
    """
    torch._decomp.meta_table[op] = fake
    torch._decomp.decomposition_table[op] = function
    if os.environ.get("CI"):
        lowering: Any = importlib.import_module("torch._inductor.lowering")
        if op not in lowering.lowerings:
            layout = lowering.tag_to_layout_constraint(get_layout_constraint_tag(op))
            lowering.make_fallback(op, layout, warn=False)


def aot_compile(program: Any, path: os.PathLike[str], configs: dict[str, Any]) -> None:
    """Compile an exported program to an AOTInductor package. Tried on 2.13, 2.14."""
    torch._inductor.aoti_compile_and_package(
        program, package_path=os.fspath(path), inductor_configs=configs
    )


def aot_load(path: os.PathLike[str]) -> Callable[..., object]:
    """Load an AOTInductor package. Tried on 2.13, 2.14, and on 2.11 for the CPU: on CUDA 2.11 ends
    in a segmentation fault for any package with Python ops."""
    model: Callable[..., object] = torch._inductor.aoti_load_package(os.fspath(path))
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress torch's long messages about something that cannot be exported.

    Most are logged; 2.11 also prints the graph that it had so far. Tried on 2.11, 2.13, 2.14.
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
