"""Requests to the Hub: their time limits, their errors, and the answers that are kept."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi, constants, get_session

from kernelgraph.hub.client import Hub, asking


@pytest.fixture
def limits(hub):
    """The time limits of the requests, in the order in which they are sent."""
    hub.organisation("org", trusted=True)
    seen = []
    with asking("org/toy"):  # adds the hook of this library before the one below
        pass
    hooks = get_session().event_hooks["request"]

    def look(request):
        if "agent-harnesses" not in request.url.path:  # a request of the client itself
            seen.append(request.extensions["timeout"]["read"])

    hooks.append(look)
    return seen


class TestTimeLimit:
    def test_limit_applies_only_to_requests_in_the_context(self, limits):
        """The whole process shares the session."""
        HfApi().get_organization_overview("org")
        with asking("org/toy"):
            HfApi().get_organization_overview("org")
        HfApi().get_organization_overview("org")
        assert limits == [None, constants.HF_HUB_ETAG_TIMEOUT, None]

    def test_given_time_limit_is_kept(self, hub, limits):
        hub.repository("org/toy").commit({"x": b""})
        with asking("org/toy"):
            HfApi().repo_info("org/toy", repo_type="kernel", timeout=3)
        assert limits == [3]

    def test_nested_contexts_add_one_hook(self, limits):
        before = len(get_session().event_hooks["request"])
        with asking("org/toy"), asking("org/toy"):
            pass
        assert len(get_session().event_hooks["request"]) == before


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyError("x"), ValueError("x"), OSError("x")])
def test_every_error_names_the_repository(error):
    with (
        pytest.raises(OSError, match=r"^org/toy: could not be fetched from the Hub: .?x") as caught,
        asking("org/toy"),
    ):
        raise error
    assert caught.value.__cause__ is error


def test_interrupt_is_not_converted():
    with pytest.raises(KeyboardInterrupt), asking("org/toy"):
        raise KeyboardInterrupt


class TestNote:
    def test_note_is_kept(self, tmp_path):
        hub = Hub(cache=str(tmp_path))
        note = hub.note("org/toy", "kernel", "what?")
        assert note.read() is None
        for answer in ("this", "that", "that"):
            note.write(answer)
            assert hub.note("org/toy", "kernel", "what?").read() == answer
        assert len(list(note.path.parent.iterdir())) == 1

    def test_notes_of_other_questions_are_separate(self, tmp_path):
        hub = Hub(cache=str(tmp_path))
        hub.note("org/toy", "kernel", "what?").write("this")
        assert hub.note("org/toy", "kernel", "who?").read() is None
        assert hub.note("org/toy", "model", "what?").read() is None

    def test_cache_that_cannot_be_written_keeps_no_note(self, tmp_path):
        (tmp_path / "kernels--org--toy").write_text("in the way")
        note = Hub(cache=str(tmp_path)).note("org/toy", "kernel", "what?")
        note.write("this")
        assert note.read() is None
