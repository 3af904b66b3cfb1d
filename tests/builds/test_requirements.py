"""The requirements of a build: the devices that it was compiled for, and Python packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelgraph.builds.metadata import Metadata
from kernelgraph.builds.requirements import check_archs, check_python_depends
from kernelgraph.selection.devices import Target


def runs_on(archs: list[str], capability: int | None, backend: str = "cuda") -> bool:
    try:
        check_archs(Metadata(backend="cuda", archs=tuple(archs)), Target(backend, capability))
    except ValueError:
        return False
    return True


class TestArchs:
    @pytest.mark.parametrize(
        ("arch", "fits"),
        [
            ("8.0", [80, 86, 89]),
            ("8.6", [86, 89]),
            ("9.0", [90]),
            ("9.0a", [90]),
            ("10.0f", [100, 103]),
            ("8.0+PTX", [80, 86, 89, 90, 100, 103, 120]),
            ("9.0+PTX", [90, 100, 103, 120]),
            ("9.0a+PTX", [90]),
            ("10.0", [100, 103]),
            ("12.0", [120]),
            ("some future notation", [75, 80, 86, 89, 90, 100, 103, 120]),
        ],
    )
    def test_cuda_arch_runs_on_its_capabilities(self, arch, fits):
        assert [c for c in (75, 80, 86, 89, 90, 100, 103, 120) if runs_on([arch], c)] == fits

    def test_one_arch_of_several_has_to_fit(self):
        assert runs_on(["7.5", "9.0"], 90)
        assert not runs_on(["7.5", "9.0"], 80)

    def test_unknown_archs_or_device_refuse_nothing(self):
        assert runs_on([], 90)
        assert runs_on(["8.0"], None)
        assert runs_on(["8.0"], None, backend="cpu")
        assert runs_on(["8.0"], 90, backend="rocm")

    def test_message_names_archs_and_device(self):
        metadata = Metadata(backend="cuda", archs=("8.0", "9.0a"))
        with pytest.raises(ValueError, match=r"^built for 8\.0, 9\.0a, and this device is cuda 10"):
            check_archs(metadata, Target("cuda", 100))

    def test_rocm_arch_is_compared_by_name(self):
        metadata = Metadata(backend="rocm", archs=("gfx90a", "gfx942"))
        target = Target("rocm", 94)
        check_archs(metadata, target, "gfx942")
        check_archs(metadata, target, "gfx90a:sramecc+:xnack-")
        check_archs(metadata, target)
        with pytest.raises(
            ValueError, match=r"^built for gfx90a, gfx942, and this device is gfx110"
        ):
            check_archs(metadata, target, "gfx1100")


@given(st.text(), st.integers(0, 200))
def test_arch_of_any_text_is_read_without_an_error(arch, capability):
    runs_on([arch, f"9.0{arch}"], capability)


@pytest.fixture
def installed(monkeypatch):
    """Let only einops 0.7 and cutlass, without a version, be installed."""
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
def test_installed_packages_pass(installed, requirements, backend):
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
def test_missing_package_is_an_import_error(installed, requirement, message):
    with pytest.raises(ImportError, match=message):
        check_python_depends([requirement], "cuda")


@pytest.mark.parametrize("requirement", ["requests", "torch", "nki", "a b", "", "einops;;", "../x"])
def test_package_that_no_kernel_may_need_is_refused(installed, requirement):
    with pytest.raises(ValueError, match=r"^python-depends: '.*' is no (package that|requirement)"):
        check_python_depends([requirement], "cuda")
