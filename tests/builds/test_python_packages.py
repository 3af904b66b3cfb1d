"""What ``python-depends`` may name, and that it is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest

from kernelgraph.builds.requirements import check_python_depends


@pytest.fixture
def installed(monkeypatch):
    """Only einops 0.7 and cutlass are."""
    there = {"einops": "0.7.0", "cutlass": None}

    def version(distribution):
        if there.get(distribution) is None:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return there[distribution]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("requirements", "backend"),
    [
        ([], "cpu"),
        (["einops"], "cpu"),
        (["EinOps>=0.6,<1"], "cuda"),
        (["nvidia-cutlass-dsl"], "cuda"),
        (["nvidia_cutlass_dsl>=4"], "cuda"),
        (["onednn"], "xpu"),
    ],
    ids=str,
)
def test_good(installed, requirements, backend):
    check_python_depends(requirements, backend)


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("helion", r'^the kernel needs helion, and it is not installed: pip install "helion"$'),
        (
            "tvm-ffi>=0.1",
            r'^the kernel needs tvm-ffi>=0\.1, and .*: pip install "apache-tvm-ffi>=0\.1"$',
        ),
        ("einops>=0.8", r"^the kernel needs einops>=0\.8, and 0\.7\.0 is installed: pip install"),
    ],
)
def test_missing(installed, requirement, message):
    with pytest.raises(ImportError, match=message):
        check_python_depends([requirement], "cuda")


@pytest.mark.parametrize("requirement", ["requests", "torch", "nki", "a b", "", "einops;;", "../x"])
def test_not_allowed(installed, requirement):
    with pytest.raises(ValueError, match=r"^python-depends: '.*' is no (package that|requirement)"):
        check_python_depends([requirement], "cuda")
