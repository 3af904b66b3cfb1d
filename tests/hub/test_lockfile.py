"""Lock files: their format, the dependencies of a project, and loads at a locked commit."""

from __future__ import annotations

import importlib.metadata
import json
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelgraph import get_locked_kernel
from kernelgraph.builds.wanted import Wanted
from kernelgraph.hub.client import Hub
from kernelgraph.hub.lockfile import Lock, Locks, find_locks, lock, parse_locks, read_dependencies
from tests.support.toy_repository import METADATA, layer_files, variant_files

COMMIT = "0123456789" * 4

# The output of `kernels lock` of the `kernels` package 0.17.2.
OF_KERNELS = """\
[
  {
    "dependency": {
      "repo-id": "org/a",
      "version": 1
    },
    "lock": {
      "commit": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
    }
  },
  {
    "dependency": {
      "repo-id": "org/b",
      "revision": "main"
    },
    "lock": {
      "commit": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    }
  }
]"""

wanted = st.builds(
    lambda repo_id, how: Wanted(repo_id, **how),
    st.sampled_from(["org/a", "org/b", "x/y.z"]),
    st.one_of(
        st.builds(lambda n: {"version": n}, st.integers(0, 9)),
        st.sampled_from([{"version": ">=0.1,<1"}, {"revision": "main"}, {"revision": COMMIT}]),
    ),
)
digests = st.dictionaries(
    st.sampled_from(["torch-cpu", "torch-cuda"]),
    st.integers(0, 2**256 - 1).map(lambda n: f"sha256-{n:064x}"),
)
locks = st.builds(
    lambda w, n, d: Lock(w, f"{n:040x}", tuple(sorted(d.items()))),
    wanted,
    st.integers(0, 2**160 - 1),
    digests,
)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


def assert_parsed_or_refused(content):
    try:
        found = parse_locks(content)
    except ValueError as error:
        message = str(error)
    else:
        assert parse_locks(found.to_json()) == found
        return
    assert message.startswith("kernels.lock: ")


class TestFormat:
    @given(st.lists(locks, unique_by=lambda lock: lock.wanted))
    def test_written_locks_are_read_back(self, content):
        written = Locks(tuple(content))
        assert parse_locks(written.to_json()) == written

    def test_lock_file_of_the_kernels_package_is_read(self):
        found = parse_locks(OF_KERNELS)
        assert found.locks == (
            Lock(Wanted("org/a", version=1), "a" * 40),
            Lock(Wanted("org/b", "main"), "b" * 40),
        )
        assert found.to_json() == OF_KERNELS + "\n"

    def test_first_lock_of_a_repository_is_the_projects_own(self):
        first, second = (Lock(Wanted("org/a", version=n), COMMIT) for n in (2, 1))
        assert Locks((first, second)).of("org/a") == first
        assert Locks((first, second)).get(second.wanted) == second

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "expected a JSON list: "),
            ("{}", r"expected a JSON list, got \{\}$"),
            ("[1]", r'\[0\]: expected an object with "dependency" and "lock", got 1$'),
            ('[{"repo_id": "org/a", "sha": "x"}]', r'\[0\]: expected an object with "depend'),
            ('[{"lock": {}}]', r'"\[0\]\.dependency": expected an object, got None$'),
            (
                '[{"dependency": {"repo-id": "org/a"}, "lock": {}}]',
                r'"\[0\]\.dependency": expected "repo-id", and either "version" or "revision"$',
            ),
            (
                '[{"dependency": {"repo-id": "a", "version": 1}, "lock": {}}]',
                r'"\[0\]\.dependency": repo_id: expected owner/name, got \'a\'$',
            ),
            (
                '[{"dependency": {"repo-id": "o/a", "version": 1}, "lock": {"commit": "A"}}]',
                r'\[0\]: expected a commit of 40 hex digits as "lock\.commit", got \'A\'$',
            ),
            (
                OF_KERNELS.replace('aa"', 'aa", "digests": {"torch-cpu": "md5-1"}'),
                r'\[0\]: expected an object of "sha256-" digests as "lock\.digests", got',
            ),
            (
                OF_KERNELS.replace("org/b", "org/a").replace('"revision": "main"', '"version": 1'),
                "org/a version 1 is locked twice$",
            ),
        ],
    )
    def test_malformed_lock_file_is_refused(self, content, message):
        with pytest.raises(ValueError, match=rf"^some\.lock: {message}"):
            parse_locks(content, "some.lock")

    @given(st.binary(max_size=60))
    def test_any_bytes_are_parsed_or_refused(self, data):
        assert_parsed_or_refused(data)

    @given(st.data())
    def test_any_change_of_a_lock_file_is_parsed_or_refused(self, data):
        """Any part of the file is replaced by any JSON."""
        content = json.loads(OF_KERNELS)
        content[0]["lock"]["digests"] = {"torch-cpu": "sha256-" + "0" * 64}
        places = [(content, 0), (content[0], "dependency"), (content[0], "lock")]
        places += [(content[0]["dependency"], key) for key in ("repo-id", "version", "revision")]
        places += [(content[0]["lock"], "commit"), (content[0]["lock"], "digests")]
        holder, key = data.draw(st.sampled_from(places))
        holder[key] = data.draw(anything)
        assert_parsed_or_refused(json.dumps(content))


class TestDependencies:
    def test_each_form_of_a_dependency_is_read(self, tmp_path):
        (tmp_path / "pyproject.toml").write_text(
            '[tool.kernels.dependencies]\n"org/a" = 1\n"org/b" = ">=0.1"\n'
            '"org/c" = { revision = "main" }\n"org/d" = { version = 2 }\n'
        )
        assert read_dependencies(tmp_path / "pyproject.toml") == (
            Wanted("org/a", version=1),
            Wanted("org/b", version=">=0.1"),
            Wanted("org/c", "main"),
            Wanted("org/d", version=2),
        )

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[", r"pyproject\.toml: .*document"),
            ("", r"expected a table \[tool\.kernels\.dependencies\]"),
            ("tool = 1", r"expected a table \[tool\.kernels\.dependencies\]"),
            ("[tool.kernels]\ndependencies = 1", r"expected a table \[tool\.kernels\.dependencies"),
            (
                '[tool.kernels.dependencies]\n"a" = 1',
                r'\.dependencies\.a": repo_id: expected owner',
            ),
            (
                '[tool.kernels.dependencies]\n"a/b" = "x"',
                r'"tool\..*": version: expected an int or',
            ),
            ('[tool.kernels.dependencies]\n"a/b" = 1.5', "expected a number or a string, got 1.5$"),
            ('[tool.kernels.dependencies]\n"a/b" = {}', 'and either "version" or "revision"$'),
        ],
    )
    def test_malformed_dependencies_are_refused(self, tmp_path, content, message):
        (tmp_path / "pyproject.toml").write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_dependencies(tmp_path / "pyproject.toml")
        assert str(tmp_path / "pyproject.toml") in str(caught.value)

    def test_missing_pyproject_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_dependencies(tmp_path / "pyproject.toml")


class TestFindLocks:
    def test_lock_file_of_the_calling_package_is_found(self, tmp_path, monkeypatch):
        """An installed package has its `kernels.lock` in its metadata."""
        info = tmp_path / "caller-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: caller\nVersion: 1.0\n")
        (info / "top_level.txt").write_text("caller_package\n")
        (info / "kernels.lock").write_text(OF_KERNELS)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir("/")
        importlib.invalidate_caches()
        caller = ModuleType("caller_package.module")
        code = (
            "from kernelgraph.hub.lockfile import find_locks\ndef find(): return find_locks(None)"
        )
        exec(code, vars(caller))
        found = caller.find()
        assert found.source == "kernels.lock of caller"
        assert found.of("org/a").commit == "a" * 40
        with pytest.raises(FileNotFoundError, match=r"^there is no kernels\.lock in the working"):
            find_locks(None)

    def test_given_lock_file_that_is_no_json_is_refused(self, tmp_path):
        (tmp_path / "kernels.lock").write_text("x")
        with pytest.raises(ValueError, match=r"kernels\.lock: expected a JSON list"):
            find_locks(tmp_path / "kernels.lock")


class TestLockedKernel:
    @pytest.fixture
    def toy(self, hub):
        hub.organisation("org", trusted=True)
        repository = hub.repository("org/toy")
        files = variant_files() | variant_files(variant="torch-rocm")
        repository.commit(files, branch="v1", tag="v0.1.0")
        return repository

    @pytest.fixture
    def lockfile(self, toy, tmp_path):
        path = tmp_path / "kernels.lock"
        path.write_text(lock(Hub(), [Wanted("org/toy", version=">=0.1")]).to_json())
        return path

    def test_every_variant_is_locked_without_downloading_code(self, hub, toy):
        (locked,) = lock(Hub(), [Wanted("org/toy", version=1)]).locks
        assert locked.commit == toy.branches["v1"]
        assert [variant for variant, _ in locked.digests] == ["torch-rocm", "torch-universal"]
        downloaded = {r.rpartition("/")[2] for r in hub.asked() if r.startswith("GET /kernels")}
        assert downloaded == {"metadata.json"}

    def test_own_dependencies_come_first(self, hub, toy):
        depends = {**METADATA, "kernel-depends": [{"repo-id": "org/toy", "version": 1}]}
        hub.repository("org/user").commit(variant_files(metadata=depends), branch="v1")
        asked = [Wanted("org/user", version=1), Wanted("org/toy", version=">=0.1")]
        found = [lock.wanted for lock in lock(Hub(), asked).locks]
        assert found == [*asked, Wanted("org/toy", version=1)]

    def test_locked_commit_is_loaded(self, toy, lockfile, offline):
        toy.commit(variant_files(layer_files(result=2)), branch="v1", tag="v0.2.0")
        assert get_locked_kernel("org/toy", lockfile=lockfile).RESULT == 1
        offline()
        assert get_locked_kernel("org/toy", lockfile=lockfile).RESULT == 1

    @pytest.mark.parametrize("name", ["layers.py", "metadata.json"])
    @pytest.mark.parametrize("digest", [True, False])
    def test_changed_byte_stops_the_load(
        self, hub, toy, lockfile, tmp_path, as_a_new_process, name, digest
    ):
        """Even if the Hub serves and lists the changed content for the locked commit."""
        as_a_new_process()
        commit = toy.branches["v1"]
        files = variant_files({**layer_files(), "ran.py": ""}, digest=digest)
        code = f"open({str(tmp_path / 'ran')!r}, 'w')\nRESULT = 1"
        if name == "layers.py":
            files = variant_files({**layer_files(), "__init__.py": code}, digest=digest)
        toy.commits[commit] = files
        with pytest.raises(
            ValueError,
            match=r"^org/toy version >=0\.1, variant torch-universal: is not the content that .*"
            r"kernels\.lock has locked",
        ):
            get_locked_kernel("org/toy", lockfile=lockfile)
        assert not (tmp_path / "ran").exists()

    def test_damaged_listing_in_the_cache_is_repaired(self, toy, lockfile, as_a_new_process):
        get_locked_kernel("org/toy", lockfile=lockfile)
        storage = Hub().storage("org/toy", "kernel")
        (listing,) = (storage / "trees").iterdir()
        text = listing.read_text()
        id_ = text.split('"blob_id": "')[-1][:40]
        listing.write_text(text.replace(id_, "0" * 40))
        as_a_new_process()
        assert get_locked_kernel("org/toy", lockfile=lockfile).RESULT == 1

    def test_variant_added_after_locking_is_refused(self, toy, lockfile, as_a_new_process):
        as_a_new_process()
        files = toy.commits[toy.branches["v1"]]
        files |= variant_files(variant="torch-cpu")
        with pytest.raises(ValueError, match="variant torch-cpu: is not the content"):
            get_locked_kernel("org/toy", lockfile=lockfile)

    def test_locked_kernel_needs_trust(self, hub, toy, lockfile):
        hub.organisation("org", trusted=False)
        with pytest.raises(ValueError, match="trusted publisher"):
            get_locked_kernel("org/toy", lockfile=lockfile)
        assert get_locked_kernel("org/toy", lockfile=lockfile, trust_remote_code=True).RESULT == 1

    def test_locked_commit_that_is_gone_is_an_error(self, toy, lockfile):
        toy.commits.clear()
        with pytest.raises(FileNotFoundError, match=r"^org/toy: the Hub has no such revision"):
            get_locked_kernel("org/toy", lockfile=lockfile)

    def test_used_kernel_that_is_not_locked_is_refused(self, hub, toy, tmp_path):
        depends = {**METADATA, "kernel-depends": [{"repo-id": "org/toy", "version": 1}]}
        user = hub.repository("org/user")
        commit = user.commit(variant_files(metadata=depends), branch="v1")
        lockfile = tmp_path / "kernels.lock"
        lockfile.write_text(Locks((Lock(Wanted("org/user", version=1), commit),)).to_json())
        with pytest.raises(ValueError, match=r"^org/toy version 1 is not in .*kernels\.lock"):
            get_locked_kernel("org/user", lockfile=lockfile)

    def test_lock_file_of_the_kernels_package_locks_the_commit(self, toy, tmp_path):
        content = OF_KERNELS.replace("org/a", "org/toy").replace("a" * 40, toy.branches["v1"])
        (tmp_path / "kernels.lock").write_text(content)
        assert get_locked_kernel("org/toy", lockfile=tmp_path / "kernels.lock").RESULT == 1

    def test_kernels_package_reads_locks_without_digests(self, toy):
        """It reads a lock file of this library if that has no digests."""
        rust = pytest.importorskip("kernels._rust")
        ours = Locks((Lock(Wanted("org/toy", version=1), COMMIT),)).to_json()
        theirs = rust.KernelLocks.from_json(ours)
        assert parse_locks(theirs.to_json()) == parse_locks(ours)
