"""The command: what it prints for people and for programs, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from kernelgraph import cache
from kernelgraph.cli.commands import main
from tests.support.toy_repository import METADATA, layer_files, variant_files, write_repository


@pytest.fixture
def toy(hub):
    hub.organisation("org", trusted=True)
    repository = hub.repository("org/toy")
    repository.commit(variant_files(variant="torch-rocm"), branch="v1", tag="v0.1.0")
    repository.commit(
        variant_files(metadata={**METADATA, "python-depends": ["einops"]})
        | variant_files(variant="torch-cuda"),
        branch="v2",
    )
    return repository


@pytest.fixture
def project(tmp_path):
    path = tmp_path / "project"
    path.mkdir()
    (path / "pyproject.toml").write_text('[tool.kernels.dependencies]\n"org/toy" = 2\n')
    return path


@pytest.fixture
def run(capsys):
    """Runs the command; returns its status and what it printed."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as leave:
            status = leave.code
        out, error = capsys.readouterr()
        assert "Traceback" not in error
        return status, out, error

    return run


class TestVersions:
    def test_for_people(self, run, toy):
        status, out, _ = run("versions", "org/toy", "--backend", "cpu")
        assert status == 0
        assert out.startswith("org/toy for torch ")
        assert [line.split() for line in out.splitlines()[1:]] == [
            ["version", "commit", "fits"],
            ["v1", toy.branches["v1"]],
            ["v2", toy.branches["v2"], "torch-universal"],
            ["v0.1.0", toy.branches["v1"]],
        ]

    def test_for_programs(self, run, toy):
        status, out, _ = run("versions", "org/toy", "--backend", "rocm", "--json")
        assert status == 0
        fits = {row["version"]: row["fits"] for row in json.loads(out)}
        assert fits == {"v1": "torch-rocm", "v2": "torch-universal", "v0.1.0": "torch-rocm"}

    def test_nothing_fits(self, run, toy):
        del toy.branches["v2"]
        assert run("versions", "org/toy", "--backend", "cpu")[0] == 1

    def test_no_versions(self, run, hub):
        hub.repository("org/toy").commit(variant_files())
        assert run("versions", "org/toy") == (1, "", "kernelgraph: org/toy has no versions\n")


class TestInfo:
    def test_for_people(self, run, toy):
        status, out, _ = run("info", "org/toy", "--version", "2", "--backend", "cpu")
        assert status == 0
        lines = out.splitlines()
        assert lines[:2] == ["repository: org/toy", f"commit: {toy.branches['v2']}"]
        assert "python-depends: einops" in lines
        assert [line.split(maxsplit=2) for line in lines[-3:]] == [
            ["variant", "fits", "why"],
            ["torch-universal", "yes", "best"],
            ["torch-cuda", "no", "built for cuda, wanted for cpu"],
        ]

    def test_for_programs(self, run, toy):
        status, out, _ = run("info", "org/toy", "--revision", "v1", "--backend", "cpu", "--json")
        content = json.loads(out)
        assert status == 1
        assert content["commit"] == toy.branches["v1"]
        assert content["variants"] == [
            {"variant": "torch-rocm", "fits": False, "why": "built for rocm, wanted for cpu"}
        ]

    def test_a_path(self, run, tmp_path):
        write_repository(tmp_path)
        status, out, _ = run("info", tmp_path, "--backend", "cpu")
        assert status == 0
        assert "name: toy" in out.splitlines()
        assert "commit" not in out

    def test_no_code_is_downloaded_and_nobody_asked_for_trust(self, run, hub, toy):
        hub.organisation("org", trusted=False)
        assert run("info", "org/toy", "--version", ">=0.1")[0] in (0, 1)
        downloaded = {r.rpartition("/")[2] for r in hub.asked() if r.startswith("GET /kernels")}
        assert downloaded == {"metadata.json"}


class TestDownload:
    def test_what_fits(self, run, toy, offline):
        status, out, _ = run("download", "org/toy", "--version", "2", "--backend", "cpu", "--json")
        assert status == 0
        (row,) = json.loads(out)
        assert row["repository"] == "org/toy version 2"
        assert sorted(os.listdir(row["directory"])) == ["__init__.py", "layers.py", "metadata.json"]
        offline()
        assert run("download", "org/toy", "--version", "2", "--backend", "cpu")[0] == 0

    def test_all(self, run, toy):
        status, out, _ = run("download", "org/toy", "--version", "2", "--all-variants", "--json")
        assert status == 0
        assert [row["variant"] for row in json.loads(out)] == ["torch-cuda", "torch-universal"]

    def test_nothing_fits(self, run, toy):
        status, _, error = run("download", "org/toy", "--version", "1", "--backend", "cpu")
        assert status == 1
        assert "torch-rocm: built for rocm, wanted for cpu" in error
        assert "its later version v2 has one that fits" in error

    def test_trust(self, run, hub, toy):
        hub.organisation("org", trusted=False)
        status, _, error = run("download", "org/toy", "--version", "2")
        assert status == 1
        assert "trusted publisher" in error
        assert run("download", "org/toy", "--version", "2", "--trust-remote-code")[0] == 0

    def test_what_it_uses(self, run, hub, toy):
        depends = {**METADATA, "kernel-depends": [{"repo-id": "org/toy", "version": 2}]}
        hub.repository("org/user").commit(variant_files(metadata=depends), branch="v1")
        status, out, _ = run("download", "org/user", "--version", "1", "--json")
        assert status == 0
        rows = [row["repository"] for row in json.loads(out)]
        assert rows == ["org/user version 1", "org/toy version 2"]

    def test_what_a_project_has_locked(self, run, toy, project):
        status, _, error = run("download", project)
        assert status == 1
        assert error.startswith(f"kernelgraph: there is no kernels.lock in {project}: run `ker")
        assert run("lock", project)[0] == 0
        toy.commit(variant_files(layer_files(result=2)), branch="v2")
        status, out, _ = run("download", project, "--json")
        assert status == 0
        (row,) = json.loads(out)
        assert "RESULT = 1" in Path(row["directory"], "__init__.py").read_text()


class TestLock:
    def test_lock(self, run, toy, project, monkeypatch):
        monkeypatch.chdir(project)
        status, out, _ = run("lock")
        assert status == 0
        assert [line.split() for line in out.splitlines()] == [
            ["written", "to", "kernels.lock:"],
            ["repository", "commit", "variants"],
            ["org/toy", "version", "2", toy.branches["v2"], "2"],
        ]
        (entry,) = json.loads((project / "kernels.lock").read_text())
        assert entry["dependency"] == {"repo-id": "org/toy", "version": 2}
        assert entry["lock"]["commit"] == toy.branches["v2"]
        assert set(entry["lock"]["digests"]) == {"torch-cuda", "torch-universal"}

    def test_a_failure_leaves_the_old_file(self, run, hub, toy, project):
        run("lock", project)
        before = (project / "kernels.lock").read_text()
        hub.fault("drop")
        status, _, error = run("lock", project)
        assert (status, (project / "kernels.lock").read_text()) == (3, before)
        assert error.startswith("kernelgraph: org/toy: could not be fetched from the Hub")

    def test_no_project(self, run, tmp_path):
        status, _, error = run("lock", tmp_path)
        assert status == 1
        assert "pyproject.toml" in error


class TestVerify:
    def test_a_path(self, run, tmp_path):
        variant = write_repository(tmp_path)
        status, out, _ = run("verify", tmp_path)
        assert status == 0
        assert out.splitlines()[1].split() == [
            str(tmp_path),
            "torch-universal",
            "good",
            "by",
            "digest",
        ]
        (variant / "layers.py").write_text("")
        status, out, _ = run("verify", tmp_path)
        assert status == 1
        assert "changed: layers.py" in out

    def test_nothing_to_hold_it_against(self, run, tmp_path):
        write_repository(tmp_path, digest=False)
        status, out, _ = run("verify", tmp_path)
        assert status == 1
        assert "nothing to hold its files against" in out

    def test_the_cache(self, run, hub, toy):
        assert run("verify", "org/toy", "--version", "2")[0] == 1
        run("download", "org/toy", "--version", "2", "--backend", "cpu")
        hub.asked()
        status, out, _ = run("verify", "org/toy", "--version", "2", "--json")
        assert status == 0
        (row,) = json.loads(out)
        assert row == {
            "repository": "org/toy",
            "revision": toy.branches["v2"],
            "variant": "torch-universal",
            "problem": "",
            "by": "listing, digest",
        }

    def test_it_mends_nothing(self, run, toy):
        _, out, _ = run("download", "org/toy", "--version", "2", "--backend", "cpu", "--json")
        path = os.path.join(json.loads(out)[0]["directory"], "layers.py")
        with open(os.path.realpath(path), "w") as stream:
            stream.write("poison")
        for _ in range(2):
            status, out, _ = run("verify", "org/toy", "--version", "2")
            assert status == 1
            assert "not as the Hub lists it: changed: layers.py" in out

    def test_a_project(self, run, toy, project):
        run("lock", project)
        run("download", project)
        status, out, _ = run("verify", project)
        assert status == 0
        assert "good by listing, lock, digest" in out
        content = json.loads((project / "kernels.lock").read_text())
        content[0]["lock"]["digests"]["torch-universal"] = "sha256-" + "0" * 64
        (project / "kernels.lock").write_text(json.dumps(content))
        status, out, _ = run("verify", project)
        assert status == 1
        assert "not the content that is locked" in out


class TestExplain:
    @pytest.fixture(autouse=True)
    def directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("KERNELGRAPH_CACHE_DIR", str(tmp_path))
        return tmp_path

    def test_nothing(self, run, directory):
        assert run("explain") == (0, f"0 kinds of call in {directory}\n", "")

    def test_what_was_chosen(self, run, directory):
        about = {"layer": "Norm", "device": "cpu", "takes": "float32[2x4]"}
        choice = {"how": "op", "kernel": 0, "why": "kernel 1 ms, reference 2 ms"}
        cache.write("choices", "1", {**choice, "measured": True, "about": about})
        cache.write("choices", "2", "of another version")
        cache.write("verdicts", "1", {"about": about})
        (directory / "choices" / f"{'0' * 32}.json").write_text("{")
        status, out, _ = run("explain", "--json")
        assert status == 0
        times = "kernel 1 ms, reference 2 ms"
        assert json.loads(out) == [{**about, "chosen": "op", "times": times}]
        assert "Norm" in run("explain")[1]
        run("cache", "clear")
        assert run("explain", "--json")[1] == "[]\n"


class TestCache:
    @pytest.fixture(autouse=True)
    def directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("KERNELGRAPH_CACHE_DIR", str(tmp_path))
        return tmp_path

    def test_nothing(self, run, directory):
        assert run("cache") == (0, f"{directory}\n", "")

    def test_for_people(self, run, directory):
        for kind, key in (("b", "1"), ("b", "2"), ("a", "1")):
            cache.write(kind, key, 0)
        status, out, _ = run("cache")
        assert status == 0
        first, *rows = out.splitlines()
        assert first == str(directory)
        assert [row.split() for row in rows] == [["kind", "entries"], ["a", "1"], ["b", "2"]]

    def test_for_programs(self, run):
        cache.write("a", "1", 0)
        assert json.loads(run("cache", "--json")[1]) == [{"kind": "a", "entries": 1}]

    def test_clear(self, run, directory):
        cache.write("a", "1", 0)
        status, out, _ = run("cache", "clear")
        assert (status, out.splitlines()[0]) == (0, f"cleared: {directory}")
        assert cache.read("a", "1") is None
        assert run("cache", "clear") == (0, f"cleared: {directory}\n", "")

    def test_no_home(self, run, monkeypatch):
        monkeypatch.delenv("KERNELGRAPH_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
        status, _, error = run("cache")
        assert status == 1
        assert error.endswith("no home directory to keep a cache in: set KERNELGRAPH_CACHE_DIR\n")


def no_home():
    raise RuntimeError("Could not determine home directory.")


class TestStatus:
    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["nothing"],
            ["versions"],
            ["versions", "toy"],
            ["info", "toy"],
            ["info", "org/toy", "--version", "latest"],
            ["info", "org/toy", "--version", "1", "--revision", "main"],
            ["info", "org/toy", "--backend", "quantum"],
        ],
        ids=str,
    )
    def test_wrong_usage(self, run, arguments):
        status, out, error = run(*arguments)
        assert (status, out) == (2, "")
        assert error.startswith("usage: kernelgraph")

    @pytest.mark.parametrize("command", ["versions", "info", "download", "verify"])
    def test_no_such_repository(self, run, hub, command):
        status, out, error = run(command, "org/nothing")
        assert (status, out) == (1, "")
        assert error.startswith("kernelgraph: org/nothing: the Hub has no such repository")

    @pytest.mark.parametrize("command", ["versions", "info", "download", "verify"])
    def test_the_hub_cannot_be_reached(self, run, hub, toy, command):
        hub.fault("drop")
        status, out, error = run(command, "org/toy")
        assert (status, out) == (3, "")
        assert error.startswith("kernelgraph: org/toy: could not be fetched from the Hub")

    def test_help_says_them(self, run):
        status, out, _ = run("verify", "--help")
        assert status == 0
        assert "exit status: 0 done; 1 no" in out


class TestInspect:
    @pytest.fixture
    def program(self, tmp_path, monkeypatch):
        """A program with a kernel in it, which no longer lies where it was loaded from."""
        import torch

        from kernelgraph import Mode, export, save
        from tests.support.exporting import scales, write_scale
        from tests.support.toy_models import Chain

        monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "cache"))
        with scales(write_scale(tmp_path / "repo", 90)):
            made = export(Chain().eval(), (torch.randn(3, 4),), mode=Mode.INFERENCE)
        save(made, tmp_path / "bundled.pt2", bundle=True)
        save(made, tmp_path / "beside.pt2")
        os.rename(tmp_path / "repo", tmp_path / "moved")
        return tmp_path

    def test_for_people(self, run, program):
        status, out, error = run("inspect", program / "bundled.pt2")
        assert (status, error) == (0, "")
        assert "kind: exported program" in out
        assert "toy_Scale_" in out
        assert "layers.2" in out
        assert "float32[3, 4], float32[4], float32[4], 0.25" in out
        assert out.endswith("it would load here\n")

    def test_for_programs(self, run, program):
        status, out, _ = run("inspect", program / "bundled.pt2", "--json")
        found = json.loads(out)
        assert status == 0
        assert found["loads"]
        assert found["kernels"][0]["in the file"] == ["torch-universal"]
        (op,) = found["ops"]
        assert op["reference"]
        assert op["schema"].endswith("(Tensor x, Tensor shift, Tensor weight, float eps) -> Tensor")
        assert [call["path"] for call in op["calls"]] == ["layers.0", "layers.2"]
        assert found["about"]["bytes of kernels"] > 0

    def test_why_it_would_not_load(self, run, program):
        status, out, _ = run("inspect", program / "beside.pt2")
        assert status == 1
        assert "it would not load here:" in out
        assert "has no build that fits, in the file or on this machine's disk" in out
        assert 'load it with fallback="reference"' in out

    def test_nothing_of_it_is_run(self, program):
        code = (
            "import sys; from kernelgraph.cli.commands import main; main(sys.argv[1:]);"
            "print([m for m in sys.modules if m.startswith('kernelgraph_')])"
        )
        command = [sys.executable, "-c", code, "inspect", str(program / "bundled.pt2")]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.stdout.splitlines()[-1] == "[]"
        assert not (program / "cache" / "kernelgraph" / "unpacked").exists()

    def test_what_is_no_program(self, run, tmp_path):
        (tmp_path / "text.pt2").write_text("text")
        status, _, error = run("inspect", tmp_path / "text.pt2")
        assert status == 1
        assert "it is no archive of torch's" in error
        assert run("inspect", tmp_path / "none.pt2")[0] == 1


def test_as_a_process(hub, toy):
    done = subprocess.run(
        [sys.executable, "-m", "kernelgraph", "versions", "org/nothing"],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kernelgraph: org/nothing: the Hub has no such repository")
    assert hub.endpoint == constants.ENDPOINT
