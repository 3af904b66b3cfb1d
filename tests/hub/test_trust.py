"""Trust: who is asked, when, and what is remembered of the answer."""

from __future__ import annotations

import pytest

from kernelgraph import get_kernel, has_kernel
from kernelgraph.builds.wanted import Wanted
from kernelgraph.hub.client import Hub
from kernelgraph.hub.resolver import resolve
from kernelgraph.hub.trust import check_trust, parse_trust
from tests.support.toy_repository import layer_files, variant_files


@pytest.fixture
def repository(hub):
    repository = hub.repository("org/toy")
    repository.commit(variant_files(), branch="v1")
    return repository


def check(trust=False, **wanted):
    hub = Hub()
    check_trust(hub, resolve(hub, Wanted("org/toy", **(wanted or {"version": 1}))), trust)


class TestTheHubsWord:
    def test_a_trusted_publisher(self, hub, repository):
        hub.organisation("org", trusted=True)
        check()

    def test_anybody_else(self, hub, repository):
        hub.organisation("org", trusted=False)
        with pytest.raises(ValueError, match="the Hub does not call its owner org a trusted publ"):
            check()

    def test_a_user_is_no_organisation(self, repository):
        with pytest.raises(ValueError, match="the Hub does not call its owner org a trusted publ"):
            check()

    @pytest.mark.parametrize("said", ["true", 1, None, {}])
    def test_only_true_is_yes(self, hub, repository, said):
        hub.organisations["org"] = {"trustedKernelPublisher": said}
        with pytest.raises(ValueError, match="trusted publisher"):
            check()

    def test_the_owner_is_who_owns_it_today(self, hub, repository):
        """The Hub forwards a repository's old name to wherever it has moved."""
        hub.organisation("org", trusted=True)
        repository.moved_to = "elsewhere/toy"
        with pytest.raises(ValueError, match="does not call its owner elsewhere a trusted"):
            check()


class TestWhenItIsAsked:
    def test_before_any_code_is_downloaded(self, hub, repository):
        hub.organisation("org", trusted=False)
        for load in (get_kernel, has_kernel):
            with pytest.raises(ValueError, match="trusted publisher"):
                load("org/toy", version=1)
        assert not [request for request in hub.asked() if "/resolve/" in request]

    def test_not_for_what_the_user_allows(self, hub, repository):
        check(True)
        check(("org/other", "org/toy"))
        assert not [request for request in hub.asked() if "organizations" in request]

    def test_the_list_names_repositories(self, hub, repository):
        hub.organisation("org", trusted=False)
        with pytest.raises(ValueError, match="trusted publisher"):
            check(("org/other",))

    def test_once_for_each_commit(self, hub, repository, offline):
        hub.organisation("org", trusted=True)
        check()
        hub.asked()
        check()
        assert hub.asked() == ["GET /api/kernels/org/toy/revision/v1"]
        hub.organisation("org", trusted=False)
        check()
        repository.commit(variant_files(layer_files(result=2)), branch="v1")
        with pytest.raises(ValueError, match="trusted publisher"):
            check()

    def test_offline_as_it_was_online(self, hub, repository, offline):
        hub.organisation("org", trusted=True)
        check()
        offline()
        check()

    def test_offline_nobody_vouches_for_the_rest(self, repository, offline):
        check(True)
        offline()
        with pytest.raises(ValueError, match=r"whether to trust its owner could not be asked: org"):
            check()
        check(True)

    @pytest.mark.parametrize("kind", ["drop", "status", "portal"])
    def test_a_hub_that_does_not_answer_is_no_yes(self, hub, repository, kind):
        hub.organisation("org", trusted=True)
        hub.fault(kind, "organizations")
        with pytest.raises(ValueError, match=r"whether to trust its owner could not be asked: org"):
            check()
        hub.faults.clear()
        check()


def test_the_three_ways_out(repository):
    with pytest.raises(ValueError, match=r"^org/toy: loading a kernel runs its repo") as caught:
        check()
    message = str(caught.value)
    assert "pass trust_remote_code=True" in message
    assert 'trust_remote_code=["org/toy"]' in message
    assert "LocalLayerRepository or get_local_kernel" in message


def test_a_list_that_changes_later():
    trusted = ["a/b"]
    kept = parse_trust(trusted)
    trusted.append("c/d")
    assert kept == ("a/b",)
