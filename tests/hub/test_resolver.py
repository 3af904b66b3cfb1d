"""Resolving: the commit of each form of revision and version, online and offline."""

from __future__ import annotations

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from kernelgraph.builds.wanted import Wanted
from kernelgraph.hub.client import Hub, Resolved
from kernelgraph.hub.resolver import list_versions, resolve

FILES = {"build/torch-universal/__init__.py": b""}


@pytest.fixture
def repository(hub):
    """A repository with three releases, of which the second is branch v1; main is ahead."""
    repository = hub.repository("org/toy")
    repository.commit(FILES, tag="v0.1.0")
    repository.branches["v1"] = repository.commit(FILES, tag="v0.2.0")
    repository.commit(FILES, tag="v0.3.0rc1")
    repository.commit(FILES)
    repository.branches["feature/x"] = repository.tags["v0.1.0"]
    return repository


def commit_of(**wanted: object) -> str:
    return resolve(Hub(), Wanted("org/toy", **wanted)).commit


EACH = [
    ({}, "main"),
    ({"revision": "main"}, "main"),
    ({"revision": "feature/x"}, "v0.1.0"),
    ({"revision": "v0.1.0"}, "v0.1.0"),
    ({"version": 1}, "v0.2.0"),
    ({"version": ">=0.1"}, "v0.2.0"),
    ({"version": "<0.2"}, "v0.1.0"),
    ({"version": ">=0.3.0rc1"}, "v0.3.0rc1"),
]


class TestOnline:
    @pytest.mark.parametrize(("wanted", "name"), EACH, ids=str)
    def test_each_form_costs_one_request(self, hub, repository, wanted, name):
        assert commit_of(**wanted) == repository.find(name)
        assert len(hub.asked()) == 1

    def test_commit_hash_is_resolved_to_itself(self, hub, repository):
        commit = repository.tags["v0.1.0"]
        assert resolve(Hub(), Wanted("org/toy", commit)) == Resolved("org/toy", "kernel", commit)

    def test_branch_is_followed(self, repository):
        before = commit_of(version=1)
        repository.commit(FILES, branch="v1")
        assert commit_of(version=1) not in (before, None)

    def test_lost_tag_is_not_chosen_any_more(self, hub, repository):
        assert commit_of(version=">=0.1") == repository.tags["v0.2.0"]
        del repository.tags["v0.2.0"]
        assert commit_of(version=">=0.1") == repository.tags["v0.1.0"]
        with pytest.raises(ValueError, match=r"^org/toy: no version fits '>=0.2'; there are: v0.1"):
            commit_of(version=">=0.2")

    def test_older_repository_of_type_model_is_found(self, hub):
        model = hub.repository("org/toy", "model")
        commit = model.commit(FILES, branch="v1", tag="v0.1.0")
        for wanted in ({"version": 1}, {"version": ">=0"}, {"revision": commit}):
            found = resolve(Hub(), Wanted("org/toy", **wanted))
            assert found == Resolved("org/toy", "model", commit)

    def test_kernel_comes_before_a_model_of_its_name(self, hub, repository):
        hub.repository("org/toy", "model").commit({"build/x/y": b"1"}, branch="v1")
        assert commit_of(version=1) == repository.branches["v1"]


class TestMissing:
    def test_missing_repository_is_an_error(self, hub):
        for wanted in ({"version": 1}, {"version": ">=0"}, {"revision": "main"}):
            with pytest.raises(FileNotFoundError, match=r"^org/toy: the Hub has no such reposit"):
                commit_of(**wanted)

    @pytest.mark.parametrize("wanted", [{"version": 3}, {"revision": "v3"}])
    def test_missing_revision_is_an_error_that_lists_the_versions(self, repository, wanted):
        with pytest.raises(
            FileNotFoundError,
            match=r"^org/toy: there is no v3; its versions are: v1, v0\.1\.0, v0\.2\.0, v0\.3\.0rc",
        ):
            commit_of(**wanted)

    def test_missing_commit_is_an_error(self, repository):
        with pytest.raises(FileNotFoundError, match=f"^org/toy: there is no {'0' * 40}; its vers"):
            commit_of(revision="0" * 40)

    def test_branch_named_like_a_commit_is_refused(self, repository):
        repository.branches["a" * 40] = repository.branches["main"]
        with pytest.raises(ValueError, match=r"is no commit of it$"):
            commit_of(revision="a" * 40)

    def test_bound_on_a_repository_without_versions_is_an_error(self, hub):
        hub.repository("org/toy").commit(FILES)
        with pytest.raises(ValueError, match=r"no version fits '>=0'; there are: none$"):
            commit_of(version=">=0")


class TestOffline:
    @pytest.mark.parametrize(("wanted", "name"), EACH, ids=str)
    def test_offline_answer_is_the_last_one_online(self, hub, repository, offline, wanted, name):
        commit = commit_of(**wanted)
        hub.asked()
        for moved in (repository.branches, repository.tags):
            moved.update(dict.fromkeys(moved, "0" * 40))
        offline()
        assert commit_of(**wanted) == commit
        assert hub.asked() == []

    def test_last_answer_is_used_though_a_higher_tag_is_cached(self, repository, offline):
        commit_of(version=">=0.1")
        lost = repository.tags.pop("v0.2.0")
        commit = commit_of(version=">=0.1")
        commit_of(revision=lost)
        offline()
        assert commit_of(version=">=0.1") == commit != lost

    def test_question_that_was_never_asked_is_an_error(self, repository, offline):
        commit_of(version=">=0.1")
        offline()
        for wanted in ({"version": ">=0.2"}, {"version": 1}, {"revision": "0" * 40}):
            with pytest.raises(OSError, match=r"^org/toy: could not be fetched from the Hub: "):
                commit_of(**wanted)

    def test_model_is_found_offline(self, hub, offline):
        commit = hub.repository("org/toy", "model").commit(FILES, branch="v1", tag="v0.1.0")
        every = ({"version": 1}, {"version": ">=0"})
        assert [commit_of(**wanted) for wanted in every] == [commit] * 2
        offline()
        assert [commit_of(**wanted) for wanted in every] == [commit] * 2

    @pytest.mark.parametrize("garbage", ["", "x", "../../x", "0" * 39])
    def test_ref_in_the_cache_that_is_no_commit_is_an_error(
        self, repository, offline, tmp_path, garbage
    ):
        commit_of(version=1)
        (tmp_path / "cache/kernels--org--toy/refs/v1").write_text(garbage)
        offline()
        message = r"^org/toy: could not be fetched.*expected a commit hash"
        with pytest.raises(OSError, match=message):
            commit_of(version=1)

    @pytest.mark.parametrize("garbage", ["", "[]", "{}", '{"question": 1}', "\xff", "[" * 10**5])
    def test_malformed_note_in_the_cache_is_no_answer(self, repository, offline, tmp_path, garbage):
        commit_of(version=">=0.1")
        (note,) = (tmp_path / "cache/kernels--org--toy/kernelgraph").iterdir()
        note.write_bytes(garbage.encode("latin-1"))
        offline()
        with pytest.raises(OSError, match=r"^org/toy: could not be fetched from the Hub"):
            commit_of(version=">=0.1")


UNREACHABLE = [
    ("drop", {}),
    ("status", {"status": 500}),
    ("status", {"status": 503}),
    ("status", {"status": 429}),
    ("portal", {}),
]


class TestUnreachable:
    @pytest.mark.parametrize(("kind", "how"), UNREACHABLE, ids=str)
    @pytest.mark.parametrize(("wanted", "name"), EACH[3:6], ids=str)
    def test_last_answer_is_used_if_the_hub_cannot_be_reached(
        self, hub, repository, caplog, kind, how, wanted, name
    ):
        commit = commit_of(**wanted)
        repository.tags["v0.2.1"] = repository.branches["v1"] = repository.branches["main"]
        hub.fault(kind, **how)
        with caplog.at_level(logging.WARNING):
            assert commit_of(**wanted) == commit
        assert len(hub.asked()) == 2
        hub.faults.clear()
        assert commit_of(**wanted) == repository.find(wanted.get("revision", "main"))

    @pytest.mark.parametrize(("kind", "how"), UNREACHABLE, ids=str)
    @pytest.mark.parametrize(
        "wanted", [{"version": 1}, {"version": ">=0"}, {"revision": "a" * 40}], ids=str
    )
    def test_question_that_was_never_asked_is_an_error_at_once(
        self, hub, repository, no_waiting, kind, how, wanted
    ):
        hub.fault(kind, **how)
        with pytest.raises(OSError, match=r"^org/toy: could not be fetched from the Hub: "):
            commit_of(**wanted)
        assert not no_waiting, "the client was left to try again and again"

    def test_refusal_of_the_hub_is_an_error(self, hub, repository):
        commit_of(version=1)
        hub.fault("status", status=403)
        with pytest.raises(OSError, match=r"^org/toy: could not be fetched from the Hub: .*403"):
            commit_of(version=1)


numbers = st.tuples(*[st.integers(0, 3)] * 3)
suffixes = st.sampled_from(["", "", "", "a1", "rc2", ".post1", ".dev3", "+local"])
tags = st.builds(lambda n, s: "v" + ".".join(map(str, n)) + s, numbers, suffixes)
clauses = st.builds(
    lambda operator, n, s: operator + ".".join(map(str, n)) + s,
    st.sampled_from([">=", "<=", ">", "<", "==", "!=", "~="]),
    numbers,
    st.sampled_from(["", "", "rc1"]),
)


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sets(tags, max_size=6), st.lists(clauses, min_size=1, max_size=2).map(",".join))
def test_bound_chooses_the_highest_version_that_packaging_accepts(hub, tags, bound):
    """The chosen tag is the highest of those whose versions the specifier contains."""
    repository = hub.repository("org/toy")
    repository.tags.clear()
    for tag in sorted(tags):
        repository.commit(FILES, tag=tag)
    specifier = SpecifierSet(bound)
    versions = [Version(tag[1:]) for tag in tags]
    fitting = [
        version
        for version in versions
        if specifier.contains(version, prereleases=bool(specifier.prereleases))
    ]
    if not fitting:
        with pytest.raises(ValueError, match=r"^org/toy: no version fits"):
            commit_of(version=bound)
    else:
        assert commit_of(version=bound) == repository.tags[f"v{max(fitting)}"]


def test_versions_are_listed_in_order(hub, repository):
    repository.branches |= {"v10": repository.branches["v1"], "v2": repository.branches["v1"]}
    repository.tags["latest"] = repository.branches["main"]
    versions = list_versions(Hub(), "org/toy")
    assert [v.name for v in versions] == ["v1", "v2", "v10", "v0.1.0", "v0.2.0", "v0.3.0rc1"]
    assert versions[0].commit == Resolved("org/toy", "kernel", repository.branches["v1"])
