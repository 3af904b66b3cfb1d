"""Programs with kernels as files: loaded in a fresh process, and refused where they should be."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

import kernelgraph
from kernelgraph import (
    LocalLayerRepository,
    Mode,
    export,
    kernelize,
    last_report,
    load,
    save,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from kernelgraph.archive.container import Archive
from kernelgraph.selection.devices import Target
from tests.support.exporting import METADATA, in_fresh_process, scale_files, scales, write_scale
from tests.support.other_package import write_kernel
from tests.support.toy_models import Chain, OpaqueScale
from tests.support.toy_repository import write_repository
from tests.support.toys import ToyRepository

TRUSTED = {"trust_remote_code": True}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "cache"))


def exported(repository: Any, strict: bool = False) -> Any:
    torch.manual_seed(0)
    model = Chain(4).eval()
    with scales(repository):
        dynamic = ({0: Dim.AUTO},)
        x = torch.randn(3, 4)
        return export(model, (x,), mode=Mode.INFERENCE, dynamic_shapes=dynamic, strict=strict)


def expected(repository: Any, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    with scales(repository), torch.no_grad():
        result: torch.Tensor = kernelize(Chain(4).eval(), mode=Mode.INFERENCE)(x)
        return result


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4)


def test_a_program_runs_where_nothing_else_of_it_is(tmp_path, x):
    """Both ways of tracing, with and without the kernels in the file; two commits of one kernel."""
    one, two = (write_scale(tmp_path / f"repo{n}", n) for n in (10, 20))
    files = [tmp_path / f"{name}.pt2" for name in ("bundled", "strict", "beside", "other", "moved")]
    save(exported(one), files[0], bundle=True)
    save(exported(one, strict=True), files[1], bundle=True)
    save(exported(one), files[2])
    save(exported(two), files[3], bundle=True)
    save(exported(write_scale(tmp_path / "gone", 30)), files[4])
    os.rename(tmp_path / "gone", tmp_path / "elsewhere")
    answers = in_fresh_process(x, [(file, "load", TRUSTED) for file in files], tmp_path)
    for answer, repository in zip(answers, [one, one, one, two], strict=False):
        assert "error" not in answer, answer["error"]
        torch.testing.assert_close(torch.tensor(answer["result"]), expected(repository, x))
        assert len(answer["kernels"]) == 2
        assert not answer["tests"]
    assert "is not in the file, nor is there such a directory here: save" in answers[4]["error"]


def test_a_program_for_training_has_its_gradient_elsewhere(tmp_path):
    repository = write_scale(tmp_path / "repo", 15)
    torch.manual_seed(0)
    model, x = Chain(4), torch.randn(3, 4, requires_grad=True)
    with scales(repository):
        program = export(model, (torch.randn(3, 4),), mode=Mode.TRAINING)
    save(program, tmp_path / "a.pt2", bundle=True)
    program.module()(x).square().sum().backward()
    (answer,) = in_fresh_process(x, [(tmp_path / "a.pt2", "load", TRUSTED)], tmp_path)
    torch.testing.assert_close(torch.tensor(answer["gradient"]), x.grad)
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_what_was_unpacked_once_need_not_be_in_the_file(tmp_path, x):
    repository = write_scale(tmp_path / "repo")
    program, want = exported(repository), expected(repository, x)
    save(program, tmp_path / "with.pt2", bundle=True)
    save(program, tmp_path / "without.pt2")
    load(tmp_path / "with.pt2", **TRUSTED)
    os.rename(tmp_path / "repo", tmp_path / "moved")
    torch.testing.assert_close(load(tmp_path / "without.pt2", **TRUSTED).module()(x), want)


def test_a_loaded_program_can_be_saved_again(tmp_path, x):
    repository = write_scale(tmp_path / "repo")
    want = expected(repository, x)
    save(exported(repository), tmp_path / "first.pt2", bundle=True)
    save(load(tmp_path / "first.pt2", **TRUSTED), tmp_path / "second.pt2", bundle=True)
    (answer,) = in_fresh_process(x, [(tmp_path / "second.pt2", "load", TRUSTED)], tmp_path)
    torch.testing.assert_close(torch.tensor(answer["result"]), want)


def test_the_report_says_which_kernel_runs_where(tmp_path):
    save(exported(write_scale(tmp_path / "repo")), tmp_path / "a.pt2", bundle=True)
    load(tmp_path / "a.pt2", **TRUSTED)
    report = last_report()
    assert report is not None
    assert [d.path for d in report.kernels] == ["layers.0", "layers.2"]
    assert str(report).startswith("load for cpu, INFERENCE: 2 of 2 extensible layers use a kernel")


COUNTED = """
import torch
from torch import nn

class Counted(nn.Module):
    def forward(self, x):
        self.calls += 1
        return {"half": torch.from_numpy(x.numpy() / 2), "rest": [x + self.calls]}

class Positive(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy()[x.numpy() > 0]) + 10
"""


def positive_sizes(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(torch.library.get_ctx().new_dynamic_size())


@use_kernel_forward_from_hub("Counted")
class Counted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        self.calls += 1
        return {"half": x / 2, "rest": [x + self.calls]}


@use_kernel_forward_from_hub("Positive", fake=positive_sizes)
class Positive(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counted, self.positive = Counted(), Positive()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.counted(x)
        return self.positive(made["half"] + self.counted(x)["rest"][0])


def test_several_results_what_a_layer_writes_and_sizes_of_values(tmp_path):
    files = {"__init__.py": "from . import layers\n", "layers.py": COUNTED}
    write_repository(tmp_path / "repo", files)
    names = ("Counted", "Positive")
    kernels = {n: {"cpu": LocalLayerRepository(tmp_path / "repo", layer_name=n)} for n in names}
    x = torch.tensor([1.0, -9, 2, -9, 4])
    with use_kernel_mapping(kernels, inherit_mapping=False), torch.no_grad():
        program = export(Counting(), (torch.randn(5),), mode=Mode.INFERENCE)
    save(program, tmp_path / "a.pt2", bundle=True)
    loads = [(tmp_path / "a.pt2", "load", TRUSTED)] * 2
    for answer in in_fresh_process(x, loads, tmp_path):
        assert "error" not in answer, answer["error"]
        kept = x[x > 0]
        torch.testing.assert_close(torch.tensor(answer["result"]), kept * 1.5 + 2 + 10)


def test_a_kernel_that_another_package_loads_is_ours_elsewhere(tmp_path, theirs, x):
    """Where the program is loaded, that package need not be."""
    layers = str(scale_files(16)["layers.py"])
    path = write_kernel(tmp_path / "repo", layers=layers)
    repository = theirs.LocalLayerRepository(path, layer_name="Scale")
    want = expected(repository, x)
    save(exported(repository), tmp_path / "a.pt2", bundle=True)
    (answer,) = in_fresh_process(x, [(tmp_path / "a.pt2", "load", TRUSTED)], tmp_path)
    assert "error" not in answer, answer["error"]
    torch.testing.assert_close(torch.tensor(answer["result"]), want)


# --- whose code may be run ----------------------------------------------------------------------


def test_a_kernel_from_a_disk_is_the_users_to_trust(tmp_path, x):
    save(exported(write_scale(tmp_path / "repo")), tmp_path / "a.pt2", bundle=True)
    save(exported(write_scale(tmp_path / "repo")), tmp_path / "b.pt2")
    for answer in in_fresh_process(
        x, [(tmp_path / "a.pt2", "load", {}), (tmp_path / "b.pt2", "load", {})], tmp_path
    ):
        assert answer["error"].startswith("ValueError: ")
        assert "pass trust_remote_code=True" in answer["error"]
        assert answer["imported"] == []


# --- what was tampered with ---------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of an archive with its parts changed; a None leaves one out."""
    made = path.with_name(f"changed-{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return made


def with_manifest(path: Path, change: Callable[[Any], object]) -> Path:
    """A copy with a changed manifest, whose digest fits."""
    manifest: dict[str, bytes] = {}

    def changed(name: str, content: bytes) -> bytes:
        if name.endswith("kernelgraph/manifest.json"):
            data = json.loads(content)
            change(data)
            content = manifest["now"] = json.dumps(data).encode()
        if name.endswith("kernelgraph/manifest.sha256"):
            content = hashlib.sha256(manifest["now"]).hexdigest().encode()
        return content

    return rewritten(path, changed)


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
def test_a_file_that_was_changed_is_refused(tmp_path, change, message):
    save(exported(write_scale(tmp_path / "repo", 40)), tmp_path / "a.pt2", bundle=True)
    with pytest.raises(ValueError, match=message):
        load(rewritten(tmp_path / "a.pt2", change), **TRUSTED)


def test_a_byte_on_the_disk(tmp_path):
    program = exported(write_scale(tmp_path / "repo", 45))
    save(program, tmp_path / "a.pt2")
    content = bytearray((tmp_path / "a.pt2").read_bytes())
    weight = program.state_dict["layers.1.weight"].detach().numpy().tobytes()
    content[bytes(content).index(weight)] ^= 1
    (tmp_path / "a.pt2").write_bytes(content)
    with pytest.raises(ValueError, match=r"data/weights/weight_\d is damaged: Bad CRC-32"):
        load(tmp_path / "a.pt2", **TRUSTED)


def evil(name: str) -> Callable[[Any], None]:
    """Changes of the manifest by somebody who can make digests."""

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
def test_a_manifest_that_was_changed_is_refused(tmp_path, x, name, message):
    repository = write_scale(tmp_path / "repo", 41)
    save(exported(repository), tmp_path / "a.pt2", bundle=True)
    os.rename(tmp_path / "repo", tmp_path / "moved")
    with pytest.raises((ValueError, OSError), match=message):
        load(with_manifest(tmp_path / "a.pt2", evil(name)), **TRUSTED)


def test_a_kernel_that_was_exchanged_with_its_digests_is_refused(tmp_path, x):
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


def test_a_damaged_copy_in_the_cache_is_replaced(tmp_path, x):
    repository = write_scale(tmp_path / "repo", 44)
    want = expected(repository, x)
    save(exported(repository), tmp_path / "a.pt2", bundle=True)
    load(tmp_path / "a.pt2", **TRUSTED)
    (copy_,) = (tmp_path / "cache").rglob("layers.py")
    copy_.write_text("raise SystemExit")
    torch.testing.assert_close(load(tmp_path / "a.pt2", **TRUSTED).module()(x), want)
    assert copy_.read_text() == scale_files(44)["layers.py"]


# --- other systems ------------------------------------------------------------------------------


def for_another_system(path: Path) -> Path:
    """A copy of a program whose kernel is built for another system."""

    def change(data: Any) -> None:
        for kernel in data["kernels"].values():
            (build,) = kernel["builds"].values()
            kernel["builds"] = {"torch213-cxx11-cpu-riscv64-linux": build}

    return with_manifest(path, change)


def test_on_another_system_it_is_an_error_or_the_reference(tmp_path, x):
    repository = write_scale(tmp_path / "repo", 50)
    save(exported(repository), tmp_path / "a.pt2", bundle=True)
    os.rename(tmp_path / "repo", tmp_path / "moved")
    foreign = for_another_system(tmp_path / "a.pt2")
    torch.manual_seed(0)
    reference = Chain(4).eval()(x)
    loads = [
        (foreign, "load", TRUSTED),
        (foreign, "load", {"fallback": "reference"}),
        (tmp_path / "a.pt2", "load", {"fallback": "reference"}),
    ]
    error, fallen_back, refused = in_fresh_process(x, loads, tmp_path)
    assert error["error"].startswith("FileNotFoundError: no build variant of ")
    assert "built for riscv64, this is" in error["error"]
    assert "error" not in fallen_back
    torch.testing.assert_close(torch.tensor(fallen_back["result"]), reference.detach())
    assert fallen_back["kernels"] == []
    # A kernel that is there and not trusted is no reason to run another program than was asked for.
    assert refused["error"].startswith("ValueError: ")


def test_a_build_for_other_devices_is_none_that_fits(tmp_path, x, monkeypatch):
    backend = {**METADATA, "backend": {"type": "cuda", "archs": ["9.0"]}}
    save(exported(write_scale(tmp_path / "repo", 53, metadata=backend)), tmp_path / "a.pt2")
    monkeypatch.setattr("kernelgraph.archive.loader.target_of", lambda device: Target("cuda", 80))
    message = r"built for 9\.0, and this device is cuda 8\.0"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.pt2", **TRUSTED)
    torch.manual_seed(0)
    fallen_back = load(tmp_path / "a.pt2", fallback="reference", **TRUSTED)
    torch.testing.assert_close(fallen_back.module()(x), Chain(4).eval()(x))
    report = last_report()
    assert report is not None
    assert not report.kernels
    assert "the kernel could not be loaded" in str(report)


def test_the_reference_of_what_cannot_be_traced_is_no_way_out(tmp_path):
    from tests.support.toy_models import Scale

    class Busy(Scale):
        kernel_layer_name = "Scale"

        def forward(self, x):
            if x.sum().item() > 0:
                x = x + 1
            return x

    with scales(write_scale(tmp_path / "repo", 51)):
        program = export(torch.nn.Sequential(Busy()), (torch.randn(3, 4),), mode=Mode.INFERENCE)
    save(program, tmp_path / "a.pt2", bundle=True)
    os.rename(tmp_path / "repo", tmp_path / "moved")
    with pytest.raises(ValueError, match="layer Scale could not be traced to take its place"):
        load(for_another_system(tmp_path / "a.pt2"), fallback="reference")


def test_torch_that_is_older_than_the_program(tmp_path):
    save(exported(write_scale(tmp_path / "repo", 52)), tmp_path / "a.pt2", bundle=True)
    newer = with_manifest(tmp_path / "a.pt2", lambda data: data.update(torch="9.1.0"))
    message = (
        r"it was made with torch 9\.1\.0, and this is torch .*: load it with torch 9\.1 or newer, "
        "or export the model with this one"
    )
    with pytest.raises(RuntimeError, match=message):
        load(newer, **TRUSTED)


# --- torch alone --------------------------------------------------------------------------------


def test_torch_alone_says_what_to_use(tmp_path):
    program = exported(write_scale(tmp_path / "repo", 60))
    again = torch.export.export(program.module(), (torch.randn(3, 4),))
    save(again, tmp_path / "a.pt2", bundle=True)
    for more in ("", "import kernelgraph.graph.ops.registry\n"):
        code = f"import torch\n{more}torch.export.load({str(tmp_path / 'a.pt2')!r})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 1
        assert "load the file with kernelgraph.load" in run.stderr


def test_torch_alone_loads_it_once_it_was_loaded(tmp_path, x):
    repository = write_scale(tmp_path / "repo", 61)
    want = expected(repository, x)
    save(exported(repository), tmp_path / "a.pt2", bundle=True)
    load(tmp_path / "a.pt2", **TRUSTED)
    torch.testing.assert_close(torch.export.load(tmp_path / "a.pt2").module()(x), want)


# --- bad input ----------------------------------------------------------------------------------


def test_what_save_refuses(tmp_path):
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


def test_a_kernel_that_has_changed_since_is_not_saved(tmp_path):
    program = exported(write_scale(tmp_path / "repo", 71))
    file = tmp_path / "repo" / "build" / "torch-universal" / "layers.py"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match="has changed since the kernel was loaded"):
        save(program, tmp_path / "a.pt2", bundle=True)


def test_what_load_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pt2"):
        load(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("text")
    with pytest.raises(ValueError, match=r"text\.pt2: it is no archive of torch's"):
        load(tmp_path / "text.pt2")
    plain = torch.export.export(torch.nn.Linear(1, 1), (torch.ones(1, 1),))
    torch.export.save(plain, tmp_path / "plain.pt2")
    with pytest.raises(ValueError, match=r"was not written by kernelgraph\.save; torch"):
        load(tmp_path / "plain.pt2")
    save(plain, tmp_path / "plain.pt2")
    assert load(tmp_path / "plain.pt2").module()(torch.ones(1, 1)).shape == (1, 1)
    with pytest.raises(ValueError, match="fallback is one of error, reference, not 'none'"):
        load(tmp_path / "plain.pt2", fallback="none")
    with pytest.raises(ValueError, match=r"it is a file for kernelgraph\.load"):
        kernelgraph.aot_load(tmp_path / "plain.pt2")


def test_an_archive_with_two_parts_of_one_name(tmp_path):
    save(exported(write_scale(tmp_path / "repo", 72)), tmp_path / "a.pt2")
    with zipfile.ZipFile(tmp_path / "a.pt2", "a") as archive:
        name = next(n for n in archive.namelist() if n.endswith("manifest.json"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, "{}")
    with pytest.raises(ValueError, match="two parts of one name"):
        Archive(tmp_path / "a.pt2")


def test_all_variants_can_be_bundled(tmp_path):
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


def test_the_manifest_says_what_is_baked_in(tmp_path):
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
