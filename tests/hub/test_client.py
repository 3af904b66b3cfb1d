"""Asking the Hub: time limits, the names of errors, and what is kept of its answers."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi, constants, get_session

from kernelgraph.hub.client import Hub, asking


@pytest.fixture
def limits(hub):
    """The time limits of the requests that are sent, in their order."""
    hub.organisation("org", trusted=True)
    seen = []
    with asking("org/toy"):  # so that ours is the first hook
        pass
    hooks = get_session().event_hooks["request"]

    def look(request):
        if "agent-harnesses" not in request.url.path:  # what the client asks for itself
            seen.append(request.extensions["timeout"]["read"])

    hooks.append(look)
    return seen


class TestLimit:
    def test_only_of_what_is_asked_here(self, limits):
        """The session is everybody's."""
        HfApi().get_organization_overview("org")
        with asking("org/toy"):
            HfApi().get_organization_overview("org")
        HfApi().get_organization_overview("org")
        assert limits == [None, constants.HF_HUB_ETAG_TIMEOUT, None]

    def test_one_that_is_given_stays(self, hub, limits):
        hub.repository("org/toy").commit({"x": b""})
        with asking("org/toy"):
            HfApi().repo_info("org/toy", repo_type="kernel", timeout=3)
        assert limits == [3]

    def test_one_hook_however_often(self, limits):
        before = len(get_session().event_hooks["request"])
        with asking("org/toy"), asking("org/toy"):
            pass
        assert len(get_session().event_hooks["request"]) == before


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyError("x"), ValueError("x"), OSError("x")])
def test_every_error_names_the_repository(error):
    with (
        pytest.raises(OSError, match=r"^org/toy: could not be had from the Hub: .?x") as caught,
        asking("org/toy"),
    ):
        raise error
    assert caught.value.__cause__ is error


def test_an_interrupt_is_let_through():
    with pytest.raises(KeyboardInterrupt), asking("org/toy"):
        raise KeyboardInterrupt


class TestNote:
    def test_is_kept(self, tmp_path):
        hub = Hub(cache=str(tmp_path))
        note = hub.note("org/toy", "kernel", "what?")
        assert note.read() is None
        for answer in ("this", "that", "that"):
            note.write(answer)
            assert hub.note("org/toy", "kernel", "what?").read() == answer
        assert len(list(note.path.parent.iterdir())) == 1

    def test_another_question_has_another(self, tmp_path):
        hub = Hub(cache=str(tmp_path))
        hub.note("org/toy", "kernel", "what?").write("this")
        assert hub.note("org/toy", "kernel", "who?").read() is None
        assert hub.note("org/toy", "model", "what?").read() is None

    def test_a_cache_that_cannot_be_written(self, tmp_path):
        (tmp_path / "kernels--org--toy").write_text("in the way")
        note = Hub(cache=str(tmp_path)).note("org/toy", "kernel", "what?")
        note.write("this")
        assert note.read() is None
