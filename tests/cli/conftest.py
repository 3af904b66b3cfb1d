"""Fixtures of all commands: a repository on the Hub, a project, and the command itself."""

from __future__ import annotations

import pytest

from kernelgraph.cli.entry import main
from tests.support.toy_repository import METADATA, variant_files


@pytest.fixture
def toy(hub):
    hub.organisation("org", trusted=True)
    repository = hub.repository("org/toy")
    repository.commit(variant_files(variant="torch-rocm"), branch="v1", tag="v0.1.0")
    repository.commit(
        variant_files(metadata={**METADATA, "python-depends": ["einops"]})
        | variant_files(variant="torch-cuda"),
        branch="v2",
    )
    return repository


@pytest.fixture
def project(tmp_path):
    path = tmp_path / "project"
    path.mkdir()
    (path / "pyproject.toml").write_text('[tool.kernels.dependencies]\n"org/toy" = 2\n')
    return path


@pytest.fixture
def run(capsys):
    """A function that runs the command, and returns its exit status and what it printed."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as leave:
            status = leave.code
        out, error = capsys.readouterr()
        assert "Traceback" not in error
        return status, out, error

    return run
