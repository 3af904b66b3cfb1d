"""A Hub that fails: the load gives the right kernel or a clear error, and leaves no damage."""

from __future__ import annotations

import pytest
from huggingface_hub import close_session, constants

from kernelgraph import get_kernel
from tests.support.loopback import Fault
from tests.support.toy_repository import layer_files, variant_files

FILES = {**layer_files(), "_ops.so": b"\x7fELF" * 50}


@pytest.fixture(autouse=True)
def repository(hub, no_waiting, monkeypatch):
    """The repository that is loaded, with a client that does not wait between its attempts."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.2)
    hub.organisation("org", trusted=True)
    repository = hub.repository("org/toy")
    commit = repository.commit(variant_files(FILES, digest=False), branch="v1", tag="v0.1.0")
    repository.branches["main"] = commit
    return repository


WANTED = [{"version": 1}, {"version": ">=0.1"}]
FAULTS = [
    Fault("drop"),
    Fault("stall"),
    Fault("portal"),
    Fault("status", status=429, headers={"Retry-After": "0"}),
    Fault("status", status=500),
    Fault("status", status=503),
    Fault("cut", method="GET"),
    Fault("corrupt", method="GET"),
]
STEPS = {
    "resolving": "v1",
    "versions": "/refs",
    "trust": "/organizations/",
    "listing": "/tree/",
    "source": "layers.py",
    "binary": "_ops.so",
    "metadata": "metadata.json",
    "everything": "",
}


def faulty(fault, path, times):
    return Fault(**{**vars(fault), "path": path, "times": times})


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kind}{fault.status}")
@pytest.mark.parametrize("times", [1, 1 << 30], ids=["once", "always"])
def test_cold_load_is_right_or_names_the_repository(hub, step, fault, times):
    """After the fault has passed, the kernel loads."""
    hub.faults.append(faulty(fault, STEPS[step], times))
    wanted = WANTED[step == "versions"]
    failure = None
    try:
        assert get_kernel("org/toy", **wanted).RESULT == 1
    except (OSError, ValueError) as error:
        failure = error
    if failure is not None:
        assert str(failure).startswith("org/toy")
        assert type(failure) in (OSError, ValueError)
    hub.faults.clear()
    kernel = get_kernel("org/toy", **wanted)
    assert kernel.RESULT == 1
    assert kernel.layers.Add().forward(1) == 2


@pytest.mark.parametrize("fault", FAULTS[:6], ids=lambda fault: f"{fault.kind}{fault.status}")
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_warm_load_needs_no_hub(hub, fault, wanted):
    """A kernel that was loaded once loads again, and is the same module."""
    kernel = get_kernel("org/toy", **wanted)
    hub.faults.append(fault)
    assert get_kernel("org/toy", **wanted) is kernel


@pytest.mark.parametrize("kind", ["status", "stall", "corrupt"])
def test_passing_fault_is_not_noticed(hub, kind):
    """The client repeats the request, or the file is downloaded again."""
    hub.fault(kind, "layers.py", times=1, method="GET" if kind == "corrupt" else None)
    assert get_kernel("org/toy", version=1).RESULT == 1


@pytest.mark.parametrize("wanted", [*WANTED, {"revision": "a" * 40}], ids=str)
def test_refused_connection_is_an_error_at_once(hub, no_waiting, wanted):
    """Later the kernel loads without any cleaning up, and then also without the Hub."""
    hub.stop()
    close_session()
    with pytest.raises(OSError, match=r"^org/toy: could not be fetched from the Hub: "):
        get_kernel("org/toy", **wanted)
    assert not no_waiting, "the client was left to try again and again"
    hub.start()
    if "revision" in wanted:
        return
    kernel = get_kernel("org/toy", **wanted)
    hub.stop()
    close_session()
    assert get_kernel("org/toy", **wanted) is kernel
    hub.start()


def test_tag_lost_between_two_requests_does_not_matter(hub, repository):
    """Once the commit is known, only the commit is used."""

    def lose(method, path):
        if path.endswith("/refs"):
            return
        repository.tags.clear()
        repository.branches.clear()

    hub.hooks.append(lose)
    assert get_kernel("org/toy", version=">=0.1").RESULT == 1


def test_branch_moved_between_two_requests_does_not_matter(hub, repository):
    """All files are from the commit that was resolved first."""
    commit = repository.branches["v1"]

    def move(method, path):
        if "/tree/" in path or "/resolve/" in path:
            repository.commit(variant_files(layer_files(result=9)), branch="v1")

    hub.hooks.append(move)
    kernel = get_kernel("org/toy", version=1)
    assert (kernel.RESULT, kernel.layers.Add().forward(1)) == (1, 2)
    assert commit in kernel.__file__
