"""The file of a saved program: parts that were changed, damaged, removed or added."""

from __future__ import annotations

import zipfile
from collections.abc import Callable

import pytest

from kernelgraph import load, save
from kernelgraph.archive.container import Archive
from tests.support.archives import TRUSTED, exported, with_parts
from tests.support.exporting import write_scale


def flip(part: str) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:] if part in name else content

    return change


def drop(part: str) -> Callable[[str, bytes], bytes | None]:
    return lambda name, content: None if part in name else content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip("manifest.json"), "its manifest was changed"),
        (flip("manifest.sha256"), "its manifest was changed"),
        (flip("models/model.json"), "models/model.json was changed"),
        (flip("data/weights/weight_0"), "data/weights/weight_0 was changed"),
        (flip("kernelgraph/files/"), "kernelgraph/files/.* was changed"),
        (flip("kernelgraph/references/"), "kernelgraph/references/.* was changed"),
        (drop("kernelgraph/files/"), "parts of it were added or taken away: extra/kernelgraph"),
        (drop("manifest.json"), "it was not written by kernelgraph.save; torch.export.load"),
    ],
    ids=["manifest", "digest", "graph", "weight", "kernel", "reference", "missing", "no manifest"],
)
def test_file_with_a_changed_part_is_refused(tmp_path, change, message):
    save(exported(write_scale(tmp_path / "repo", 40)), tmp_path / "a.pt2", bundle=True)
    with pytest.raises(ValueError, match=message):
        load(with_parts(tmp_path / "a.pt2", change), **TRUSTED)


def test_file_with_a_flipped_bit_in_a_weight_is_refused(tmp_path):
    program = exported(write_scale(tmp_path / "repo", 45))
    save(program, tmp_path / "a.pt2")
    content = bytearray((tmp_path / "a.pt2").read_bytes())
    weight = program.state_dict["layers.1.weight"].detach().numpy().tobytes()
    content[bytes(content).index(weight)] ^= 1
    (tmp_path / "a.pt2").write_bytes(content)
    with pytest.raises(ValueError, match=r"data/weights/weight_\d is damaged: Bad CRC-32"):
        load(tmp_path / "a.pt2", **TRUSTED)


def test_archive_with_two_parts_of_one_name_is_refused(tmp_path):
    save(exported(write_scale(tmp_path / "repo", 72)), tmp_path / "a.pt2")
    with zipfile.ZipFile(tmp_path / "a.pt2", "a") as archive:
        name = next(n for n in archive.namelist() if n.endswith("manifest.json"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, "{}")
    with pytest.raises(ValueError, match="two parts of one name"):
        Archive(tmp_path / "a.pt2")
