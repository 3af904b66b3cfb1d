"""Checking a variant: which directory a path means, its package, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from kernelgraph.builds.hub_layers import origin_of
from kernelgraph.hub.kernels import get_local_kernel
from kernelgraph.selection.devices import Target
from tests.support.load_variant import load_variant
from tests.support.toy_repository import layer_files, write_repository


class TestPath:
    @pytest.mark.parametrize("part", ["", "build", "build/torch-universal"])
    def test_path_may_be_a_repository_its_build_or_one_variant(self, repo, part):
        assert get_local_kernel(repo / part).RESULT == 1

    @pytest.mark.parametrize("part", [".", "build", "build/torch-universal"])
    def test_path_may_be_relative_to_the_working_directory(self, repo, monkeypatch, part):
        monkeypatch.chdir(repo)
        kernel = get_local_kernel(part)
        assert origin_of(kernel.layers.Add).repository == part

    def test_variant_is_found_under_any_name(self, repo, tmp_path):
        shutil.copytree(repo / "build/torch-universal", tmp_path / "result")
        assert get_local_kernel(tmp_path / "result").RESULT == 1

    def test_repository_may_itself_be_a_package(self, repo):
        (repo / "__init__.py").write_text("RESULT = 5")
        assert get_local_kernel(repo).RESULT == 1

    def test_variant_may_have_a_package_called_build(self, tmp_path):
        files = {"__init__.py": "from .build import RESULT", "build/__init__.py": "RESULT = 3"}
        variant = write_repository(tmp_path, files)
        assert get_local_kernel(variant).RESULT == 3

    def test_best_variant_for_the_backend_is_loaded(self, repo):
        write_repository(repo, layer_files(result=2), variant="torch-cpu")
        write_repository(repo, layer_files(result=3), variant="torch-cuda")
        assert get_local_kernel(repo, backend="cpu").RESULT == 2
        assert get_local_kernel(repo, backend="cuda").RESULT == 3
        assert get_local_kernel(repo, backend="xpu").RESULT == 1

    def test_default_backend_is_the_accelerator_or_the_cpu(self, repo):
        write_repository(repo, layer_files(result=2), variant="torch-cpu")
        if torch.accelerator.current_accelerator(check_available=True) is None:
            assert get_local_kernel(repo).RESULT == 2

    def test_backend_metal_means_mps(self, repo):
        write_repository(repo, layer_files(result=2), variant="torch-metal")
        assert get_local_kernel(repo, backend="metal").RESULT == 2

    def test_unknown_backend_is_refused(self, repo):
        with pytest.raises(
            ValueError, match=r'^unknown device type "quantum": there are cpu, cuda'
        ):
            get_local_kernel(repo, backend="quantum")

    @pytest.mark.parametrize("path", ["nowhere", "empty", "file"])
    def test_path_that_is_no_repository_is_refused(self, tmp_path, path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").touch()
        with pytest.raises(
            FileNotFoundError,
            match=r"is not a kernel repository: expected a directory with build/<variant>/ in it",
        ) as caught:
            get_local_kernel(tmp_path / path)
        assert str(tmp_path / path) in str(caught.value)

    def test_error_where_no_variant_fits_says_why(self, tmp_path):
        write_repository(tmp_path, variant="torch-rocm")
        write_repository(tmp_path, variant="torch11-cpu-x86_64-linux")
        write_repository(tmp_path, variant="notes")
        with pytest.raises(FileNotFoundError) as caught:
            get_local_kernel(tmp_path, backend="cpu")
        message = str(caught.value)
        assert message.startswith(f"no build variant of {tmp_path} fits this system (torch ")
        assert "torch-rocm: built for rocm, wanted for cpu" in message
        assert "torch11-cpu-x86_64-linux: built for torch 1.1, this is 2." in message
        assert "notes: not the name of a build variant" in message

    def test_empty_build_is_refused(self, tmp_path):
        (tmp_path / "build").mkdir()
        with pytest.raises(FileNotFoundError, match="its build/ has no variants"):
            get_local_kernel(tmp_path)

    def test_single_variant_has_to_fit_too(self, tmp_path):
        variant = write_repository(tmp_path, variant="torch-rocm")
        with pytest.raises(FileNotFoundError, match="built for rocm, wanted for cpu"):
            get_local_kernel(variant, backend="cpu")


class TestPackage:
    def nested(self, *packages: str) -> dict[str, str | bytes]:
        return {f"{p}/{name}": text for p in packages for name, text in layer_files().items()}

    def test_package_in_the_older_layout_is_found(self, tmp_path):
        write_repository(tmp_path, self.nested("toy"))
        kernel = get_local_kernel(tmp_path)
        assert kernel.layers.Add().forward(torch.ones(1)) == 2
        assert kernel.layers.__name__ == f"{kernel.__name__}.layers"

    def test_name_in_the_metadata_decides(self, tmp_path):
        files = {**self.nested("other"), "my_toy/__init__.py": "RESULT = 5"}
        write_repository(tmp_path, files, metadata={"name": "my-toy"})
        assert get_local_kernel(tmp_path).RESULT == 5

    def test_argument_decides(self, tmp_path):
        files = {"one/__init__.py": "RESULT = 1", "two/__init__.py": "RESULT = 2"}
        write_repository(tmp_path, files)
        assert get_local_kernel(tmp_path, package_name="one").RESULT == 1
        assert get_local_kernel(tmp_path, package_name="two").RESULT == 2

    def test_newer_layout_comes_first(self, tmp_path):
        files = {**layer_files(), "toy/__init__.py": "raise Exception('for old clients')"}
        write_repository(tmp_path, files)
        assert get_local_kernel(tmp_path).RESULT == 1
        assert get_local_kernel(tmp_path, package_name="toy").RESULT == 1

    @pytest.mark.parametrize(
        ("files", "package_name", "message"),
        [
            ({"x.py": ""}, None, "in a directory toy/ of it; no package there"),
            (
                {"a/__init__.py": "", "b/__init__.py": ""},
                None,
                "in a directory toy/ of it; the packages there: a, b",
            ),
            (
                {"a/__init__.py": ""},
                "b",
                "in a directory b/ of it; the packages there: a",
            ),
        ],
    )
    def test_variant_without_the_package_is_refused(self, tmp_path, files, package_name, message):
        write_repository(tmp_path, files)
        with pytest.raises(
            FileNotFoundError, match=r"expected an __init__.py in it, or "
        ) as caught:
            get_local_kernel(tmp_path, package_name=package_name)
        assert message in str(caught.value)
        assert "variant torch-universal" in str(caught.value)


# Importing this kernel sets an attribute of the module json.
RUNS = {"__init__.py": "import sys\nsys.modules['json'].toy_ran = True\n", "sub.py": ""}


class TestChecks:
    """Each check fails before any code of the kernel runs."""

    @pytest.fixture
    def variant(self, tmp_path):
        yield write_repository(tmp_path / "repo", RUNS)
        assert not hasattr(json, "toy_ran")

    def test_changed_file_is_refused(self, variant):
        (variant / "sub.py").write_text("#")
        with pytest.raises(ValueError, match=r"variant torch-universal: .* changed: sub\.py$"):
            get_local_kernel(variant)

    def test_added_file_is_refused(self, variant):
        (variant / "more.py").touch()
        with pytest.raises(ValueError, match=r"not listed: more\.py$"):
            get_local_kernel(variant)

    def test_missing_file_is_refused(self, variant):
        (variant / "sub.py").unlink()
        with pytest.raises(ValueError, match=r"missing: sub\.py$"):
            get_local_kernel(variant)

    def test_malformed_metadata_is_refused(self, variant):
        (variant / "metadata.json").write_text("{")
        with pytest.raises(ValueError, match=r"metadata\.json: expected a JSON object"):
            get_local_kernel(variant)

    def test_link_that_leads_out_is_refused(self, variant, tmp_path):
        (tmp_path / "x.py").touch()
        (variant / "x.py").symlink_to(tmp_path / "x.py")
        with pytest.raises(ValueError, match=r"x\.py is a link that leads out of it$"):
            get_local_kernel(variant)

    def test_build_for_other_devices_is_refused(self, tmp_path):
        metadata = {"backend": {"type": "cuda", "archs": ["8.0", "9.0a"]}}
        variant = write_repository(tmp_path, RUNS, variant="torch-cuda", metadata=metadata)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
            load_variant(variant, Target("cuda", 100), repository="o/n", name="n")
        assert str(caught.value) == (
            "kernel o/n, variant torch-cuda: built for 8.0, 9.0a, and this device is cuda 10.0"
        )
