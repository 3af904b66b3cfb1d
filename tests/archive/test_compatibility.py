"""Programs of other versions of torch."""

from __future__ import annotations

import pytest

from kernelgraph import load, save
from tests.support.archives import TRUSTED, exported, with_manifest
from tests.support.exporting import write_scale


def test_program_of_a_newer_torch_is_refused(tmp_path):
    save(exported(write_scale(tmp_path / "repo", 52)), tmp_path / "a.pt2", bundle=True)
    newer = with_manifest(tmp_path / "a.pt2", lambda data: data.update(torch="9.1.0"))
    message = (
        r"it was made with torch 9\.1\.0, and this is torch .*: load it with torch 9\.1 or newer, "
        "or export the model with this one"
    )
    with pytest.raises(RuntimeError, match=message):
        load(newer, **TRUSTED)
