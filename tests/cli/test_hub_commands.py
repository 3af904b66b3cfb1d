"""The commands about kernels: what they print for people and for programs, and exit with."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.support.toy_repository import METADATA, layer_files, variant_files, write_repository


class TestVersions:
    def test_versions_are_a_table_for_people(self, run, toy):
        status, out, _ = run("versions", "org/toy", "--backend", "cpu")
        assert status == 0
        assert out.startswith("org/toy for torch ")
        assert [line.split() for line in out.splitlines()[1:]] == [
            ["version", "commit", "fits"],
            ["v1", toy.branches["v1"]],
            ["v2", toy.branches["v2"], "torch-universal"],
            ["v0.1.0", toy.branches["v1"]],
        ]

    def test_versions_are_json_for_programs(self, run, toy):
        status, out, _ = run("versions", "org/toy", "--backend", "rocm", "--json")
        assert status == 0
        fits = {row["version"]: row["fits"] for row in json.loads(out)}
        assert fits == {"v1": "torch-rocm", "v2": "torch-universal", "v0.1.0": "torch-rocm"}

    def test_status_is_1_if_no_version_fits(self, run, toy):
        del toy.branches["v2"]
        assert run("versions", "org/toy", "--backend", "cpu")[0] == 1

    def test_a_repository_without_versions_is_an_error(self, run, hub):
        hub.repository("org/toy").commit(variant_files())
        assert run("versions", "org/toy") == (1, "", "kernelgraph: org/toy has no versions\n")


class TestInfo:
    def test_builds_are_a_table_for_people(self, run, toy):
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

    def test_builds_are_json_for_programs(self, run, toy):
        status, out, _ = run("info", "org/toy", "--revision", "v1", "--backend", "cpu", "--json")
        content = json.loads(out)
        assert status == 1
        assert content["commit"] == toy.branches["v1"]
        assert content["variants"] == [
            {"variant": "torch-rocm", "fits": False, "why": "built for rocm, wanted for cpu"}
        ]

    def test_a_path_is_shown_without_a_commit(self, run, tmp_path):
        write_repository(tmp_path)
        status, out, _ = run("info", tmp_path, "--backend", "cpu")
        assert status == 0
        assert "name: toy" in out.splitlines()
        assert "commit" not in out

    def test_only_metadata_is_downloaded_from_whomever(self, run, hub, toy):
        hub.organisation("org", trusted=False)
        assert run("info", "org/toy", "--version", ">=0.1")[0] in (0, 1)
        downloaded = {r.rpartition("/")[2] for r in hub.asked() if r.startswith("GET /kernels")}
        assert downloaded == {"metadata.json"}


class TestDownload:
    def test_the_variant_that_fits_is_downloaded(self, run, toy, offline):
        status, out, _ = run("download", "org/toy", "--version", "2", "--backend", "cpu", "--json")
        assert status == 0
        (row,) = json.loads(out)
        assert row["repository"] == "org/toy version 2"
        assert sorted(os.listdir(row["directory"])) == ["__init__.py", "layers.py", "metadata.json"]
        offline()
        assert run("download", "org/toy", "--version", "2", "--backend", "cpu")[0] == 0

    def test_all_variants_are_downloaded_if_asked_for(self, run, toy):
        status, out, _ = run("download", "org/toy", "--version", "2", "--all-variants", "--json")
        assert status == 0
        assert [row["variant"] for row in json.loads(out)] == ["torch-cuda", "torch-universal"]

    def test_an_error_says_why_nothing_fits(self, run, toy):
        status, _, error = run("download", "org/toy", "--version", "1", "--backend", "cpu")
        assert status == 1
        assert "torch-rocm: built for rocm, wanted for cpu" in error
        assert "its later version v2 has one that fits" in error

    def test_an_untrusted_owner_is_refused(self, run, hub, toy):
        hub.organisation("org", trusted=False)
        status, _, error = run("download", "org/toy", "--version", "2")
        assert status == 1
        assert "trusted publisher" in error
        assert run("download", "org/toy", "--version", "2", "--trust-remote-code")[0] == 0

    def test_kernels_that_a_kernel_uses_are_downloaded(self, run, hub, toy):
        depends = {**METADATA, "kernel-depends": [{"repo-id": "org/toy", "version": 2}]}
        hub.repository("org/user").commit(variant_files(metadata=depends), branch="v1")
        status, out, _ = run("download", "org/user", "--version", "1", "--json")
        assert status == 0
        rows = [row["repository"] for row in json.loads(out)]
        assert rows == ["org/user version 1", "org/toy version 2"]

    def test_a_project_gets_the_commits_that_it_has_locked(self, run, toy, project):
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
    def test_lock_writes_commit_and_digests(self, run, toy, project, monkeypatch):
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

    def test_a_failure_keeps_the_old_lock_file(self, run, hub, toy, project):
        run("lock", project)
        before = (project / "kernels.lock").read_text()
        hub.fault("drop")
        status, _, error = run("lock", project)
        assert (status, (project / "kernels.lock").read_text()) == (3, before)
        assert error.startswith("kernelgraph: org/toy: could not be fetched from the Hub")

    def test_a_directory_without_pyproject_is_refused(self, run, tmp_path):
        status, _, error = run("lock", tmp_path)
        assert status == 1
        assert "pyproject.toml" in error


class TestVerify:
    def test_a_changed_file_of_a_path_is_found(self, run, tmp_path):
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

    def test_a_build_without_digests_is_not_good(self, run, tmp_path):
        write_repository(tmp_path, digest=False)
        status, out, _ = run("verify", tmp_path)
        assert status == 1
        assert "nothing to compare its files with" in out

    def test_the_cache_is_compared_with_the_listing(self, run, hub, toy):
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

    def test_verify_repairs_nothing(self, run, toy):
        _, out, _ = run("download", "org/toy", "--version", "2", "--backend", "cpu", "--json")
        path = os.path.join(json.loads(out)[0]["directory"], "layers.py")
        with open(os.path.realpath(path), "w") as stream:
            stream.write("poison")
        for _ in range(2):
            status, out, _ = run("verify", "org/toy", "--version", "2")
            assert status == 1
            assert "not as the Hub lists it: changed: layers.py" in out

    def test_a_project_is_compared_with_its_lock(self, run, toy, project):
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
