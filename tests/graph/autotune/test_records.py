"""Winners that are kept, and sessions."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from kernelgraph import cache as disk
from kernelgraph import last_report
from kernelgraph.graph.autotune import records
from kernelgraph.report import Reason
from tests.support.costs import kernel
from tests.support.tuned_models import mapping, measured_layers, reasons, run, stack


def files_on_disk() -> list[Path]:
    """The files of the winners that are kept."""
    return [*(disk.directory() / disk.CHOICES).glob("*.json")]


def test_measured_winner_is_kept_on_disk(monkeypatch):
    model = stack(1.0)
    with mapping(Work=kernel(2.0)):
        run(model)
        assert disk.entries() == {"choices": 1}
        torch.compiler.reset()  # forgets what this process knows
        found = measured_layers(monkeypatch)
        run(model)
    assert found == []
    assert reasons() == [Reason.SLOWER]
    assert "2e+03 ms" in last_report().decisions[0].detail


@pytest.mark.parametrize(
    "value", [None, 3, {}, {"how": "magic", "kernel": 0, "why": "", "measured": True},
              {"how": "op", "kernel": -1, "why": "", "measured": True},
              {"how": "op", "kernel": True, "why": "", "measured": True},
              {"how": "op", "kernel": 7, "why": "", "measured": True}]
)  # fmt: skip
def test_value_on_disk_that_is_no_winner_is_measured_again(monkeypatch, value):
    model = stack(1.0)[:1]
    with mapping(Work=kernel(2.0)):
        run(model)
        for path in files_on_disk():
            content = json.loads(path.read_text())
            path.write_text(json.dumps({**content, "value": value}))
        torch.compiler.reset()
        found = measured_layers(monkeypatch)
        assert torch.equal(run(model), torch.full((3, 4), 1.0))
    assert found == ["Work"]


def test_damaged_file_is_ignored_with_a_warning(monkeypatch, caplog):
    model = stack(1.0)[:1]
    monkeypatch.setattr(disk, "_complained", False)
    with mapping(Work=kernel(2.0)):
        run(model)
        for path in files_on_disk():
            path.write_text("{")
        torch.compiler.reset()
        with caplog.at_level(logging.WARNING, "kernelgraph"):
            run(model)
    assert "is ignored, and will be written over" in caplog.text
    assert reasons() == [Reason.SLOWER]


def test_session_is_found_again_by_an_equal_bound_method():
    """Python makes a new object for each access to a bound method."""

    class Compiler:
        def compile(self) -> None: ...

    compiler = Compiler()
    session = records.session_of(compiler.compile, 3.0)
    assert records.session_of(compiler.compile, 3.0) is session
    assert records.session_of(Compiler().compile, 3.0) is not session
