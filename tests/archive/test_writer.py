"""Programs that are saved, with one or all builds of their kernels."""

from __future__ import annotations

import pytest
import torch

from kernelgraph import load, save
from kernelgraph.archive.container import Archive
from tests.support.archives import TRUSTED, expected, exported
from tests.support.exporting import in_fresh_process, write_scale
from tests.support.toy_models import OpaqueScale
from tests.support.toys import ToyRepository


def test_loaded_program_can_be_saved_again(tmp_path, x):
    repository = write_scale(tmp_path / "repo")
    want = expected(repository, x)
    save(exported(repository), tmp_path / "first.pt2", bundle=True)
    save(load(tmp_path / "first.pt2", **TRUSTED), tmp_path / "second.pt2", bundle=True)
    (answer,) = in_fresh_process(x, [(tmp_path / "second.pt2", "load", TRUSTED)], tmp_path)
    torch.testing.assert_close(torch.tensor(answer["result"]), want)


def test_bundle_has_the_build_in_use_or_all_builds(tmp_path):
    repository = write_scale(tmp_path / "repo", 73)
    write_scale(tmp_path / "repo", 74, variant="torch-cuda")
    save(exported(repository), tmp_path / "one.pt2", bundle=True)
    save(exported(repository), tmp_path / "all.pt2", bundle="all")
    for name, builds in (("one", ["torch-universal"]), ("all", ["torch-cuda", "torch-universal"])):
        with Archive(tmp_path / f"{name}.pt2") as archive:
            (kernel,) = archive.manifest.kernels.values()
            assert sorted(kernel.builds) == builds
            files = {d for b in kernel.builds.values() for d in b.sha256.values()}
            assert len(archive.blobs) == len(files)


def test_kernel_that_has_changed_since_it_was_loaded_is_not_saved(tmp_path):
    program = exported(write_scale(tmp_path / "repo", 71))
    file = tmp_path / "repo" / "build" / "torch-universal" / "layers.py"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match="has changed since the kernel was loaded"):
        save(program, tmp_path / "a.pt2", bundle=True)


def test_save_refuses_other_programs_paths_and_bundles(tmp_path):
    program = exported(write_scale(tmp_path / "repo", 70))
    with pytest.raises(TypeError, match="save takes an ExportedProgram, not Linear"):
        save(torch.nn.Linear(1, 1), tmp_path / "a.pt2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a program is written to a file \*\.pt2, not .*a\.pt$"):
        save(program, tmp_path / "a.pt")
    with pytest.raises(ValueError, match='bundle is False, True or "all", not 3'):
        save(program, tmp_path / "a.pt2", bundle=3)  # type: ignore[arg-type]
    toy = exported(ToyRepository(OpaqueScale))
    with pytest.raises(ValueError, match="tests is no kernel repository, from which another"):
        save(toy, tmp_path / "a.pt2")
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".pt2"] == []
