"""The manifest of a saved program, as it is written, and changed with a digest that fits."""

from __future__ import annotations

import base64
import copy
import hashlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernelgraph import load, save
from kernelgraph.archive.container import Archive
from tests.support.archives import TRUSTED, exported, with_manifest
from tests.support.exporting import write_scale


def test_manifest_describes_ops_calls_and_kernels(tmp_path):
    program = exported(write_scale(tmp_path / "repo", 75))
    save(program, tmp_path / "a.pt2")
    with Archive(tmp_path / "a.pt2") as archive:
        manifest = copy.deepcopy(archive.manifest)
    (op,) = manifest.ops.values()
    assert manifest.torch == torch.__version__
    assert (op.form["layer"], op.device) == ("Scale", "cpu")
    assert op.schema.endswith("(Tensor x, Tensor shift, Tensor weight, float eps) -> Tensor")
    assert [path for path, _ in op.calls] == ["layers.0", "layers.2"]
    assert op.calls[0][1][1:] == ("float32[4]", "float32[4]", "0.25")
    assert manifest.kernels[op.kernel].repository == str(tmp_path / "repo")


def change_manifest(name: str) -> Callable[[Any], None]:
    """Return a change that an attacker who can make digests could make."""

    def change(data: Any) -> None:
        (op,) = data["ops"].values()
        (kernel,) = data["kernels"].values()
        (build,) = kernel["builds"].values()
        files = build["files"]
        if name == "form":
            op["form"]["call"]["constants"][0][1] = True
        elif name == "name":
            data["ops"] = {"other": op}
        elif name == "kernel":
            files["layers.py"] = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
        elif name == "outside":
            files["../../layers.py"] = files["layers.py"]
        elif name == "variant":
            kernel["builds"] = {"../../elsewhere": build}
        elif name == "code":
            op["form"]["take"] = ["layer_name", "__import__"]
        elif name == "version":
            data["version"] = 99
        elif name == "nonsense":
            data["ops"] = {"x": {"kernel": 3}}

    return change


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("form", "its form is not the one that its name was made from"),
        ("name", "its form is not the one that its name was made from"),
        ("kernel", "is not what the program was exported with"),
        ("outside", r"'\.\./\.\./layers.py' is no path inside a kernel"),
        ("variant", r"is no path inside a kernel"),
        ("code", "its form is not the one that its name was made from"),
        ("version", "of version 99, and this kernelgraph reads version 1"),
        ("nonsense", "its manifest cannot be understood"),
    ],
)
def test_changed_manifest_whose_digest_fits_is_refused(tmp_path, x, name, message):
    repository = write_scale(tmp_path / "repo", 41)
    save(exported(repository), tmp_path / "a.pt2", bundle=True)
    os.rename(tmp_path / "repo", tmp_path / "moved")
    with pytest.raises((ValueError, OSError), match=message):
        load(with_manifest(tmp_path / "a.pt2", change_manifest(name)), **TRUSTED)
