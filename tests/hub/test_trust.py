"""Trust: whom the Hub trusts, when it is asked, and how long its answer is kept."""

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


class TestTrustedPublisher:
    def test_trusted_publisher_is_accepted(self, hub, repository):
        hub.organisation("org", trusted=True)
        check()

    def test_other_organisation_is_refused(self, hub, repository):
        hub.organisation("org", trusted=False)
        with pytest.raises(ValueError, match="the Hub does not call its owner org a trusted publ"):
            check()

    def test_user_is_refused(self, repository):
        with pytest.raises(ValueError, match="the Hub does not call its owner org a trusted publ"):
            check()

    @pytest.mark.parametrize("said", ["true", 1, None, {}])
    def test_only_the_value_true_means_trusted(self, hub, repository, said):
        hub.organisations["org"] = {"trustedKernelPublisher": said}
        with pytest.raises(ValueError, match="trusted publisher"):
            check()

    def test_owner_after_a_move_is_the_one_that_counts(self, hub, repository):
        """The Hub redirects the old name of a repository that has moved."""
        hub.organisation("org", trusted=True)
        repository.moved_to = "elsewhere/toy"
        with pytest.raises(ValueError, match="does not call its owner elsewhere a trusted"):
            check()


class TestRequests:
    def test_trust_is_checked_before_any_code_is_downloaded(self, hub, repository):
        hub.organisation("org", trusted=False)
        for load in (get_kernel, has_kernel):
            with pytest.raises(ValueError, match="trusted publisher"):
                load("org/toy", version=1)
        assert not [request for request in hub.asked() if "/resolve/" in request]

    def test_hub_is_not_asked_for_what_the_user_trusts(self, hub, repository):
        check(True)
        check(("org/other", "org/toy"))
        assert not [request for request in hub.asked() if "organizations" in request]

    def test_list_trusts_only_its_repositories(self, hub, repository):
        hub.organisation("org", trusted=False)
        with pytest.raises(ValueError, match="trusted publisher"):
            check(("org/other",))

    def test_hub_is_asked_once_for_each_commit(self, hub, repository, offline):
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

    def test_known_answer_is_used_offline(self, hub, repository, offline):
        hub.organisation("org", trusted=True)
        check()
        offline()
        check()

    def test_commit_without_an_answer_is_refused_offline(self, repository, offline):
        check(True)
        offline()
        with pytest.raises(ValueError, match=r"whether to trust its owner could not be asked: org"):
            check()
        check(True)

    @pytest.mark.parametrize("kind", ["drop", "status", "portal"])
    def test_hub_that_does_not_answer_is_not_taken_for_a_yes(self, hub, repository, kind):
        hub.organisation("org", trusted=True)
        hub.fault(kind, "organizations")
        with pytest.raises(ValueError, match=r"whether to trust its owner could not be asked: org"):
            check()
        hub.faults.clear()
        check()


def test_refusal_names_what_the_user_can_do(repository):
    with pytest.raises(ValueError, match=r"^org/toy: loading a kernel runs its repo") as caught:
        check()
    message = str(caught.value)
    assert "pass trust_remote_code=True" in message
    assert 'trust_remote_code=["org/toy"]' in message
    assert "LocalLayerRepository or get_local_kernel" in message


def test_later_change_of_a_list_has_no_effect():
    trusted = ["a/b"]
    kept = parse_trust(trusted)
    trusted.append("c/d")
    assert kept == ("a/b",)
