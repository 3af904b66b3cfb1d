"""The entry point: exit statuses, errors, and the command as a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from huggingface_hub import constants


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
    def test_status_is_2_for_wrong_usage(self, run, arguments):
        status, out, error = run(*arguments)
        assert (status, out) == (2, "")
        assert error.startswith("usage: kernelgraph")

    @pytest.mark.parametrize("command", ["versions", "info", "download", "verify"])
    def test_status_is_1_for_an_unknown_repository(self, run, hub, command):
        status, out, error = run(command, "org/nothing")
        assert (status, out) == (1, "")
        assert error.startswith("kernelgraph: org/nothing: the Hub has no such repository")

    @pytest.mark.parametrize("command", ["versions", "info", "download", "verify"])
    def test_status_is_3_if_the_hub_cannot_be_reached(self, run, hub, toy, command):
        hub.fault("drop")
        status, out, error = run(command, "org/toy")
        assert (status, out) == (3, "")
        assert error.startswith("kernelgraph: org/toy: could not be fetched from the Hub")

    def test_help_explains_the_statuses(self, run):
        status, out, _ = run("verify", "--help")
        assert status == 0
        assert "exit status: 0 done; 1 no" in out


def test_the_package_runs_as_a_process(hub, toy):
    done = subprocess.run(
        [sys.executable, "-m", "kernelgraph", "versions", "org/nothing"],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kernelgraph: org/nothing: the Hub has no such repository")
    assert hub.endpoint == constants.ENDPOINT


def test_help_imports_neither_torch_nor_the_hub_client():
    program = (
        "import sys\n"
        "from kernelgraph.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit:\n"
        "    print({'torch', 'huggingface_hub'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
