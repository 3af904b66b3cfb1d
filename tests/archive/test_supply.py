"""Where the kernels of a saved program come from, and when they are refused."""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
import zlib
from typing import Any

import torch

from kernelgraph import load, save
from tests.support.archives import TRUSTED, expected, exported, with_manifest
from tests.support.exporting import in_fresh_process, scale_files, write_scale


def test_kernel_that_was_unpacked_before_need_not_be_in_the_file(tmp_path, x):
    repository = write_scale(tmp_path / "repo")
    program, want = exported(repository), expected(repository, x)
    save(program, tmp_path / "with.pt2", bundle=True)
    save(program, tmp_path / "without.pt2")
    load(tmp_path / "with.pt2", **TRUSTED)
    os.rename(tmp_path / "repo", tmp_path / "moved")
    torch.testing.assert_close(load(tmp_path / "without.pt2", **TRUSTED).module()(x), want)


def test_damaged_copy_in_the_cache_is_replaced(tmp_path, x):
    repository = write_scale(tmp_path / "repo", 44)
    want = expected(repository, x)
    save(exported(repository), tmp_path / "a.pt2", bundle=True)
    load(tmp_path / "a.pt2", **TRUSTED)
    (copy_,) = (tmp_path / "cache").rglob("layers.py")
    copy_.write_text("raise SystemExit")
    torch.testing.assert_close(load(tmp_path / "a.pt2", **TRUSTED).module()(x), want)
    assert copy_.read_text() == scale_files(44)["layers.py"]


def test_kernel_from_a_disk_needs_the_user_s_trust(tmp_path, x):
    save(exported(write_scale(tmp_path / "repo")), tmp_path / "a.pt2", bundle=True)
    save(exported(write_scale(tmp_path / "repo")), tmp_path / "b.pt2")
    for answer in in_fresh_process(
        x, [(tmp_path / "a.pt2", "load", {}), (tmp_path / "b.pt2", "load", {})], tmp_path
    ):
        assert answer["error"].startswith("ValueError: ")
        assert "pass trust_remote_code=True" in answer["error"]
        assert answer["imported"] == []


def test_kernel_that_was_exchanged_with_its_digests_is_refused(tmp_path, x):
    """All digests fit but the one in the op's name, which is of the kernel as it was exported."""
    save(exported(write_scale(tmp_path / "repo", 42)), tmp_path / "a.pt2", bundle=True)
    content = str(scale_files(43)["layers.py"]).encode()
    sha256 = hashlib.sha256(content).digest()
    old = ""

    def exchange(data: Any) -> None:
        nonlocal old
        (kernel,) = data["kernels"].values()
        (build,) = kernel["builds"].values()
        old = base64.b64decode(build["files"]["layers.py"]).hex()
        build["files"]["layers.py"] = base64.b64encode(sha256).decode()
        del build["files"]["metadata.json"]
        name = f"extra/kernelgraph/files/{sha256.hex()}"
        data["members"][name] = hashlib.sha256(_packed(content)).hexdigest()
        del data["members"][f"extra/kernelgraph/files/{old}"]

    made = with_manifest(tmp_path / "a.pt2", exchange)
    final = tmp_path / "final.pt2"
    with zipfile.ZipFile(made) as archive, zipfile.ZipFile(final, "w") as new:
        root = archive.namelist()[0].partition("/")[0]
        for name in archive.namelist():
            if not name.endswith(old):
                new.writestr(name, archive.read(name))
        new.writestr(f"{root}/extra/kernelgraph/files/{sha256.hex()}", _packed(content))
    (answer,) = in_fresh_process(x, [(final, "load", TRUSTED)], tmp_path)
    assert "is not what the program was exported with" in answer["error"]
    assert answer["imported"] == []


def _packed(content: bytes) -> bytes:
    return base64.b64encode(zlib.compress(content, 6))
