"""Finding a build: errors if none fits, and the setting ``LOCAL_KERNELS``."""

from __future__ import annotations

import pytest

from kernelgraph import get_kernel
from kernelgraph.hub.finder import local_kernels
from tests.support.toy_repository import layer_files, variant_files


class TestNoBuildFits:
    @pytest.fixture(autouse=True)
    def trusted_owner(self, hub):
        hub.organisation("org", trusted=True)

    def test_error_says_why_each_variant_does_not_fit(self, hub):
        files = variant_files(variant="torch-rocm") | variant_files(
            variant="torch11-cpu-x86_64-linux"
        )
        hub.repository("org/toy").commit(files, branch="v1")
        with pytest.raises(FileNotFoundError) as caught:
            get_kernel("org/toy", version=1, backend="cpu")
        message = str(caught.value)
        assert "no build variant of org/toy at " in message
        assert "torch-rocm: built for rocm, wanted for cpu" in message
        assert "torch11-cpu-x86_64-linux: built for torch 1.1" in message
        assert "later version" not in message

    @pytest.mark.parametrize(
        ("asked", "later"), [({"version": 1}, "v2"), ({"version": "<0.2"}, "v0.2.0")], ids=str
    )
    def test_error_names_a_later_version_that_fits(self, hub, asked, later):
        repository = hub.repository("org/toy")
        repository.commit(variant_files(), tag="v0.0.1")
        repository.commit(variant_files(variant="torch-rocm"), branch="v1", tag="v0.1.0")
        repository.tags["v0.1.5"] = repository.branches["v1"]
        newer = repository.commit(variant_files(layer_files(result=2)), branch="main")
        repository.branches["v2"] = repository.tags["v0.2.0"] = newer
        if isinstance(asked["version"], int):
            repository.tags.clear()
        with pytest.raises(
            FileNotFoundError,
            match=f"its later version {later} has one that fits: torch-universal$",
        ):
            get_kernel("org/toy", backend="cpu", **asked)

    def test_error_names_no_earlier_version(self, hub):
        repository = hub.repository("org/toy")
        repository.commit(variant_files(), branch="v1")
        repository.commit(variant_files(variant="torch-rocm"), branch="v2")
        with pytest.raises(FileNotFoundError, match=r"no build variant") as caught:
            get_kernel("org/toy", version=2, backend="cpu")
        assert "later" not in str(caught.value)

    def test_error_is_raised_though_the_search_for_versions_fails(self, hub):
        hub.repository("org/toy").commit(variant_files(variant="torch-rocm"), branch="v1")
        hub.fault("status", "/refs", status=500)
        with pytest.raises(FileNotFoundError, match=r"built for rocm, wanted for cpu$"):
            get_kernel("org/toy", version=1, backend="cpu")


def test_local_kernels_setting_is_parsed(monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", "a/b=/x:y/z:c/d=C:/w=1:e/f=~/g")
    monkeypatch.setenv("HOME", "/home/me")
    found = {repo_id: str(path) for repo_id, path in local_kernels().items()}
    assert found["a/b"] == "/x:y/z"
    assert found["c/d"].endswith("C:/w=1")
    assert found["e/f"] == "/home/me/g"


def test_local_path_may_end_with_a_colon(monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", "a/b=/x:")
    assert set(local_kernels()) == {"a/b"}


@pytest.mark.parametrize("setting", ["x", "org/toy", "org/toy=", "=/x", "toy=/x"])
def test_malformed_local_kernels_setting_is_refused(setting, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", setting)
    with pytest.raises(ValueError, match=r"^LOCAL_KERNELS: expected owner/name=path, got"):
        local_kernels()
