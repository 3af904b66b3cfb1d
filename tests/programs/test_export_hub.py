"""Programs whose kernels come from the Hub: at the commit of the export."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from kernelgraph import LayerRepository, load, save
from kernelgraph.archive.container import Archive
from kernelgraph.programs.program_ops import ProgramOp, installed_ops
from tests.support.archives import TRUSTED, expected, exported, with_manifest
from tests.support.exporting import in_fresh_process, scale_files
from tests.support.toy_repository import METADATA, variant_files


@pytest.fixture
def wanted(hub: Any) -> Any:
    """A kernel of a trusted publisher; later versions of it compute something else."""
    hub.organisation("org", trusted=True)
    hub.repository("org/toy").commit(variant_files(scale_files(10)), branch="v1")
    return LayerRepository("org/toy", layer_name="Scale", version=1)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4)


def elsewhere(hub: Any) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def test_commit_of_the_export_is_fetched(hub, wanted, tmp_path, x):
    program, want = exported(wanted), expected(wanted, x)
    save(program, tmp_path / "beside.pt2")
    save(program, tmp_path / "bundled.pt2", bundle=True)
    hub.repository("org/toy").commit(variant_files(scale_files(20)), branch="v1")
    alone = {"local_files_only": True}
    loads = [
        (tmp_path / "beside.pt2", "load", alone),
        (tmp_path / "bundled.pt2", "load", alone),
        (tmp_path / "bundled.pt2", "load", {**alone, **TRUSTED}),
        (tmp_path / "bundled.pt2", "load", {}),
        (tmp_path / "beside.pt2", "load", {}),
        (tmp_path / "beside.pt2", "load", alone),
    ]
    hub.asked()
    answers = in_fresh_process(x, loads, tmp_path, **elsewhere(hub))
    # The cache of that process is empty, and it may not ask the Hub.
    assert answers[0]["error"].startswith("OSError: org/toy")
    assert "whether to trust its owner could not be asked" in answers[1]["error"]
    assert answers[0]["imported"] == answers[1]["imported"] == []
    for answer in answers[2:]:
        assert "error" not in answer, answer
        torch.testing.assert_close(torch.tensor(answer["result"]), want)


def test_bundled_kernel_needs_no_request(hub, wanted, tmp_path):
    save(exported(wanted), tmp_path / "a.pt2", bundle=True)
    hub.asked()
    load(tmp_path / "a.pt2", **TRUSTED)
    load(tmp_path / "a.pt2", trust_remote_code=["org/toy"])
    assert hub.asked() == []


def test_kernel_of_an_untrusted_owner_is_refused(hub, tmp_path, x):
    hub.organisation("org", trusted=False)
    hub.repository("org/toy").commit(variant_files(scale_files(11)), branch="v1")
    trusting = LayerRepository("org/toy", layer_name="Scale", version=1, trust_remote_code=True)
    program = exported(trusting)
    save(program, tmp_path / "beside.pt2")
    save(program, tmp_path / "bundled.pt2", bundle=True)
    loads = [(tmp_path / f"{name}.pt2", "load", {}) for name in ("beside", "bundled")]
    for answer in in_fresh_process(x, loads, tmp_path, **elsewhere(hub)):
        assert "the Hub does not call its owner org a trusted publisher" in answer["error"]
        assert answer["imported"] == []


def test_bundled_copy_that_the_hub_does_not_list_is_refused(hub, wanted, tmp_path, x):
    """A file can say that its kernels are a trusted publisher's."""
    program = exported(wanted)
    own = tmp_path / "cache"
    (layers,) = own.rglob("layers.py")
    save(program, tmp_path / "a.pt2", bundle=True)
    commit = hub.repository("org/toy").commit(variant_files(scale_files(12)), branch="v1")

    # The content of this commit under the name of the other, as another tool could write it.
    def renamed(data: Any) -> None:
        (kernel,) = data["kernels"].values()
        kernel["revision"] = commit
        data["kernels"] = {f"org/toy@{commit}": kernel}
        from kernelgraph.builds.check import Origin

        (op,) = data["ops"].values()
        entry = ProgramOp.of(op["form"], Origin("org/toy", kernel["name"], commit, ""))
        op["kernel"], op["stem"], op["references"] = f"org/toy@{commit}", entry.stem, []
        data["ops"] = {entry.name: op}

    made = with_manifest(tmp_path / "a.pt2", renamed)
    loads = [(made, "load", {"fallback": "reference"})]
    (answer,) = in_fresh_process(x, loads, tmp_path, **elsewhere(hub))
    assert "is not what the Hub vouches for (changed: layers.py" in answer["error"]
    assert answer["imported"] == []
    assert layers.exists()


def test_listing_that_differs_from_the_manifest_is_refused(hub, wanted, tmp_path, monkeypatch):
    """The manifest has a digest of the listing of each variant, also of those not used here."""
    repository = hub.repository("org/toy")
    both = {
        **variant_files(scale_files(13), variant="torch-cuda"),
        **variant_files(scale_files(13)),
    }
    repository.commit(both, branch="v1")
    save(exported(wanted), tmp_path / "a.pt2")
    with Archive(tmp_path / "a.pt2") as archive:
        (kernel,) = archive.manifest.kernels.values()
    assert sorted(kernel.digests) == ["torch-cuda", "torch-universal"]
    assert list(kernel.builds) == ["torch-universal"]

    def forget(data: Any) -> None:
        (kernel,) = data["kernels"].values()
        kernel["builds"] = {}
        if changed:
            kernel["digests"]["torch-universal"] = "sha256-" + 64 * "0"

    changed = False
    load(with_manifest(tmp_path / "a.pt2", forget))
    changed = True
    with pytest.raises(ValueError, match="is not what the program was saved with"):
        load(with_manifest(tmp_path / "a.pt2", forget))


def test_kernel_that_uses_another_gets_the_one_of_the_export(hub, tmp_path, x):
    hub.organisation("org", trusted=True)
    helper = {"__init__.py": "def more(x):\n    return x + 14\n"}
    hub.repository("org/helper").commit(variant_files(helper), branch="v1")
    layers = """
import torch
from torch import nn
from kernelgraph import get_kernel_dep

class Scale(nn.Module):
    def forward(self, x):
        y = x.detach().numpy() * self.weight.detach().numpy() + self.shift.numpy() + self.eps
        return get_kernel_dep("org/helper").more(torch.from_numpy(y))
"""
    said = {**METADATA, "kernel-depends": [{"repo-id": "org/helper", "version": 1}]}
    files = {"__init__.py": "from . import layers\n", "layers.py": layers}
    hub.repository("org/toy").commit(variant_files(files, metadata=said), branch="v1")
    repository = LayerRepository("org/toy", layer_name="Scale", version=1)
    program, want = exported(repository), expected(repository, x)
    save(program, tmp_path / "bundled.pt2", bundle=True)
    save(program, tmp_path / "beside.pt2")
    # The helper of the export is loaded, not the newest of its branch.
    other = {"__init__.py": "def more(x):\n    return x + 99\n"}
    hub.repository("org/helper").commit(variant_files(other), branch="v1")
    loads = [
        (tmp_path / "bundled.pt2", "load", {**TRUSTED, "local_files_only": True}),
        (tmp_path / "beside.pt2", "load", {}),
    ]
    for answer in in_fresh_process(x, loads, tmp_path, **elsewhere(hub)):
        torch.testing.assert_close(torch.tensor(answer["result"]), want)


def test_references_replace_kernels_that_cannot_be_fetched(hub, wanted, tmp_path, monkeypatch):
    program = exported(wanted)
    save(program, tmp_path / "a.pt2")
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "empty"))
    before = dict(installed_ops())
    with pytest.raises(OSError, match="org/toy"):
        load(tmp_path / "a.pt2", local_files_only=True)
    assert installed_ops() == before
    made = load(tmp_path / "a.pt2", local_files_only=True, fallback="reference")
    assert not [n for n in made.graph.nodes if "hubkernels" in str(n.target)]
    assert not os.path.exists(tmp_path / "empty")
