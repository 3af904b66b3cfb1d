"""The commands about this machine: what they print for people and for programs, and exit with."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from kernelgraph import cache


class TestExplain:
    @pytest.fixture(autouse=True)
    def directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("KERNELGRAPH_CACHE_DIR", str(tmp_path))
        return tmp_path

    def test_an_empty_cache_explains_nothing(self, run, directory):
        assert run("explain") == (0, f"0 kinds of call in {directory}\n", "")

    def test_choices_are_shown_with_their_times(self, run, directory):
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

    def test_an_empty_cache_shows_its_directory(self, run, directory):
        assert run("cache") == (0, f"{directory}\n", "")

    def test_entries_are_a_table_for_people(self, run, directory):
        for kind, key in (("b", "1"), ("b", "2"), ("a", "1")):
            cache.write(kind, key, 0)
        status, out, _ = run("cache")
        assert status == 0
        first, *rows = out.splitlines()
        assert first == str(directory)
        assert [row.split() for row in rows] == [["kind", "entries"], ["a", "1"], ["b", "2"]]

    def test_entries_are_json_for_programs(self, run):
        cache.write("a", "1", 0)
        assert json.loads(run("cache", "--json")[1]) == [{"kind": "a", "entries": 1}]

    def test_clear_removes_the_entries(self, run, directory):
        cache.write("a", "1", 0)
        status, out, _ = run("cache", "clear")
        assert (status, out.splitlines()[0]) == (0, f"cleared: {directory}")
        assert cache.read("a", "1") is None
        assert run("cache", "clear") == (0, f"cleared: {directory}\n", "")

    def test_no_home_directory_is_an_error(self, run, monkeypatch):
        monkeypatch.delenv("KERNELGRAPH_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
        status, _, error = run("cache")
        assert status == 1
        assert error.endswith("no home directory to keep a cache in: set KERNELGRAPH_CACHE_DIR\n")


def no_home():
    raise RuntimeError("Could not determine home directory.")


class TestInspect:
    @pytest.fixture
    def program(self, tmp_path, monkeypatch):
        """A directory with two programs, whose kernel is not where it was loaded from any more."""
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

    def test_a_program_is_shown_in_tables_for_people(self, run, program):
        status, out, error = run("inspect", program / "bundled.pt2")
        assert (status, error) == (0, "")
        assert "kind: exported program" in out
        assert "toy_Scale_" in out
        assert "layers.2" in out
        assert "float32[3, 4], float32[4], float32[4], 0.25" in out
        assert out.endswith("it would load here\n")

    def test_a_program_is_json_for_programs(self, run, program):
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

    def test_problems_say_why_a_program_would_not_load(self, run, program):
        status, out, _ = run("inspect", program / "beside.pt2")
        assert status == 1
        assert "it would not load here:" in out
        assert "has no build that fits, in the file or on this machine's disk" in out
        assert 'load it with fallback="reference"' in out

    def test_no_kernel_is_imported_or_unpacked(self, program):
        code = (
            "import sys; from kernelgraph.cli.entry import main; main(sys.argv[1:]);"
            "print([m for m in sys.modules if m.startswith('kernelgraph_')])"
        )
        command = [sys.executable, "-c", code, "inspect", str(program / "bundled.pt2")]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.stdout.splitlines()[-1] == "[]"
        assert not (program / "cache" / "kernelgraph" / "unpacked").exists()

    def test_another_file_is_refused(self, run, tmp_path):
        (tmp_path / "text.pt2").write_text("text")
        status, _, error = run("inspect", tmp_path / "text.pt2")
        assert status == 1
        assert "it is no archive of torch's" in error
        assert run("inspect", tmp_path / "none.pt2")[0] == 1


class TestDemo:
    def test_the_demo_is_the_example_of_the_checkout(self, run, monkeypatch):
        programs = []
        monkeypatch.setattr(runpy, "run_path", lambda path, run_name: programs.append(Path(path)))
        assert run("demo") == (0, "", "")
        (program,) = programs
        assert program == Path(__file__).parents[2] / "examples" / "demo.py"
        assert program.is_file()

    def test_an_installation_without_examples_says_where_they_are(self, run, monkeypatch):
        monkeypatch.setattr(Path, "is_file", lambda path: False)
        status, out, error = run("demo")
        assert (status, out) == (1, "")
        assert "clone the repository and install it from there" in error
