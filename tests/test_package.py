"""The package itself: its public names, and what importing it imports."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import pytest

import kernelgraph


def modules_after(program: str) -> set[str]:
    """The modules that a new process has imported after ``program``."""
    code = f"{program}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "program",
    [
        "import kernelgraph; dir(kernelgraph)",
        "from kernelgraph import Mode, Device, CUDAProperties, ROCMProperties, KernelizeFallback",
        "from kernelgraph import register_kernel_mapping, use_kernel_mapping, last_report\n"
        "register_kernel_mapping({})",
        "from kernelgraph import use_kernel_forward_from_hub, use_kernelized_func\n"
        "use_kernel_forward_from_hub('Name')",
    ],
)
def test_registering_and_tagging_import_no_torch(program: str) -> None:
    loaded = modules_after(program)
    assert "kernelgraph" in loaded
    assert not loaded & {"torch", "huggingface_hub", "numpy"}


def test_every_public_name_can_be_loaded() -> None:
    assert kernelgraph.__all__ == sorted(kernelgraph.__all__)
    for name in kernelgraph.__all__:
        assert getattr(kernelgraph, name).__name__ == name
    assert set(kernelgraph.__all__) <= set(dir(kernelgraph))


def test_dir_lists_names_that_are_not_loaded_yet() -> None:
    program = "import kernelgraph; print(*dir(kernelgraph))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert set(kernelgraph.__all__) <= set(run.stdout.split())


def test_a_star_import_brings_every_public_name() -> None:
    namespace: dict[str, object] = {}
    exec("from kernelgraph import *", namespace)
    assert set(kernelgraph.__all__) <= set(namespace)


def imports_for_type_checkers() -> dict[str, str]:
    """The names that ``kernelgraph/__init__.py`` imports where TYPE_CHECKING, with their homes."""
    tree = ast.parse(inspect.getsource(kernelgraph))
    (block,) = (
        statement
        for statement in tree.body
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
    )
    found: dict[str, str] = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            assert alias.asname == alias.name, "only `X as X` makes X public to a type checker"
            found[alias.name] = str(statement.module).removeprefix("kernelgraph.")
    return found


def test_type_checkers_see_the_names_that_are_loaded_lazily() -> None:
    assert imports_for_type_checkers() == kernelgraph._HOMES
    assert sorted(kernelgraph._HOMES) == kernelgraph.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(
        AttributeError, match=r"^module 'kernelgraph' has no attribute 'kernalize'$"
    ):
        kernelgraph.kernalize  # noqa: B018
    with pytest.raises(ImportError, match=r"cannot import name 'kernalize' from 'kernelgraph'"):
        from kernelgraph import kernalize  # noqa: F401
