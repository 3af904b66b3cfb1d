"""examples/kernels/build.py: the variants that it builds, and when it builds them again."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from kernelgraph.builds import digest_files, parse_variant, read_metadata
from tests.support.sources import EXAMPLES, import_file


@pytest.fixture
def copy(tmp_path: Path, repository: Path) -> ModuleType:
    """A built copy of the repository, with a build.py that a test may change."""
    shutil.copytree(repository, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return import_file(tmp_path / "kernels/build.py", f"build_{tmp_path.name}")


def stamps(root: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in root.glob("build/*/metadata.json")}


def test_variants_are_well_formed(repository: Path) -> None:
    variants = sorted((repository / "build").glob("torch*"))
    cpu, cuda = (next(v for v in variants if backend in v.name) for backend in ("-cpu", "-cuda"))
    ids = set()
    for directory, backend in ((cpu, "cpu"), (cuda, "cuda")):
        variant = parse_variant(directory.name)
        assert variant is not None
        assert variant.backend == backend
        metadata = read_metadata(directory)
        assert metadata.name == "decoder-layers"
        assert metadata.license == "Apache-2.0"
        assert metadata.backend == backend
        assert metadata.digest is not None
        assert dict(metadata.digest.files) == digest_files(directory)
        ids.add(metadata.id)
    assert len(ids) == 2
    assert any(path.suffix == ".so" for path in cpu.iterdir())


def test_build_that_is_up_to_date_is_left_alone(copy: ModuleType) -> None:
    before = stamps(copy.HERE)
    said: list[str] = []
    assert copy.build(progress=said.append) == copy.HERE
    assert stamps(copy.HERE) == before
    assert said == []


def test_changed_source_is_built_again(copy: ModuleType) -> None:
    before = stamps(copy.HERE)
    with (copy.HERE / "decoder_cuda/norm.py").open("a") as source:
        source.write("# changed\n")
    old = json.loads((copy.HERE / "build/torch-cuda/metadata.json").read_text())
    copy.build()
    new = json.loads((copy.HERE / "build/torch-cuda/metadata.json").read_text())
    assert old["id"] != new["id"]
    assert old["digest"]["files"].keys() == new["digest"]["files"].keys()
    changed = [name for name, stamp in stamps(copy.HERE).items() if stamp != before[name]]
    assert changed == ["torch-cuda"]


def test_damaged_build_is_made_again(copy: ModuleType) -> None:
    layers = copy.HERE / "build/torch-cuda/layers.py"
    original = layers.read_bytes()
    layers.write_bytes(b"broken")
    copy.build()
    assert layers.read_bytes() == original


def test_builds_at_the_same_time_do_no_harm(copy: ModuleType, tmp_path: Path) -> None:
    variant = copy.cuda_variant()
    for directory in (tmp_path / "new/torch-cuda", copy.HERE / "build/torch-cuda"):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: copy.make(variant, directory), range(32)))  # noqa: B023
        assert copy.is_up_to_date(directory, variant.id)
        assert not list(directory.parent.glob(".tmp-*"))


def test_one_backend_is_built_under_another_root(copy: ModuleType, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    assert copy.build(elsewhere, backends=["cuda"]) == elsewhere
    assert [path.name for path in (elsewhere / "build").iterdir()] == ["torch-cuda"]
    assert (elsewhere / "build/torch-cuda/layers.py").is_file()


def test_long_build_announces_itself(copy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from time import sleep

    monkeypatch.setattr(copy, "PATIENCE_S", 0.01)
    monkeypatch.setattr(copy, "make", lambda variant, directory: sleep(0.1))
    said: list[str] = []
    copy.build(force=True, progress=said.append)
    assert len(said) == 2
    assert "torch-cuda (once; about 20 seconds on two cores)" in said[1]


def test_missing_compiler_is_an_error_that_says_what_to_install(
    copy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    copy.build(force=True, backends=["cuda"])
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler.*apt install g\+\+"):
        copy.build()


def test_error_of_the_compiler_is_shown(copy: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "bad.cpp"
    source.write_text("int broken = ;\n")
    variant = copy.Variant("v", "cpu", EXAMPLES, (source,), *copy.find_compiler())
    with pytest.raises(RuntimeError, match=r"(?s)the compiler failed: .*bad\.cpp.*error: expected"):
        copy._run([variant.compiler, *variant.flags, "-c", str(source)])
