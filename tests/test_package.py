from __future__ import annotations

import subprocess
import sys

import pytest

import kernelgraph


def modules_after(program: str) -> set[str]:
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
def test_what_needs_no_torch_imports_none(program: str) -> None:
    loaded = modules_after(program)
    assert "kernelgraph" in loaded
    assert not loaded & {"torch", "huggingface_hub", "numpy"}


def test_every_name_resolves() -> None:
    assert kernelgraph.__all__ == sorted(kernelgraph.__all__)
    for name in kernelgraph.__all__:
        assert getattr(kernelgraph, name).__name__ == name
    assert set(kernelgraph.__all__) <= set(dir(kernelgraph))


def test_dir_knows_what_was_not_used_yet() -> None:
    program = "import kernelgraph; print(*dir(kernelgraph))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert set(kernelgraph.__all__) <= set(run.stdout.split())


def test_star_import() -> None:
    namespace: dict[str, object] = {}
    exec("from kernelgraph import *", namespace)
    assert set(kernelgraph.__all__) <= set(namespace)


def test_the_lazy_names_are_the_public_ones() -> None:
    assert sorted(kernelgraph._HOMES) == kernelgraph.__all__


def test_an_unknown_name() -> None:
    with pytest.raises(
        AttributeError, match=r"^module 'kernelgraph' has no attribute 'kernalize'$"
    ):
        kernelgraph.kernalize  # noqa: B018
    with pytest.raises(ImportError, match=r"cannot import name 'kernalize' from 'kernelgraph'"):
        from kernelgraph import kernalize  # noqa: F401
