"""All processes of a group use the winner that one of them has found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kernelgraph.graph import _torch
from kernelgraph.graph.autotune import ranks

PROGRAM = """
import json, sys
import torch
from kernelgraph import use_kernel_mapping, last_report
from kernelgraph.graph.autotune import contest
from kernelgraph.graph.timing import samplers
from tests.support.costs import CLOCK, Work, kernel
from tests.support.toy_models import Repository

rank, path = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{path}", rank=rank, world_size=2
)
samplers.clock = CLOCK
measured = []
own = contest.Contest.winner
contest.Contest.winner = lambda self: measured.append(self.layer_name) or own(self)
model = torch.nn.Sequential(Work(1.0))
CLOCK.backwards = rank == 1  # it would choose the layer, and the other rank the kernel
compiled = torch.compile(
    model, backend="hubkernels", options={"policy": "fastest", "inner": "eager"}
)
with use_kernel_mapping({"Work": {"cpu": Repository(kernel(0.5))}}, inherit_mapping=False):
    with torch.no_grad():
        out = compiled(torch.zeros(2, 4))
    torch.distributed.barrier()
    # No rank waits for a call that only the other one makes.
    if rank == 1:
        with torch.no_grad():
            compiled(torch.zeros(3, 4, dtype=torch.float64).float()[:1].expand(5, 4))
print(json.dumps({"out": out[0, 0].item(), "measured": measured}))
torch.distributed.destroy_process_group()
"""


def test_two_processes_use_the_same_winner(tmp_path):
    """Each has a cache and times of its own; one measures, and both use its winner."""
    root = Path(__file__).parents[3]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "store")],
            cwd=root,
            env={**os.environ, "KERNELGRAPH_CACHE_DIR": str(tmp_path / f"cache{rank}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = []
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        answers.append(json.loads(out.splitlines()[-1]))
    assert answers[0]["out"] == answers[1]["out"]
    measured = [len(answer["measured"]) for answer in answers]
    assert sum(measured) == 2  # once for both ranks, and once for the call of the second rank alone
    assert measured[1] >= 1


@pytest.fixture
def store(monkeypatch):
    made = torch.distributed.HashStore()
    monkeypatch.setattr(_torch, "store_of_group", lambda: made)
    return made


def test_process_alone_decides_each_time():
    assert not ranks.has_other_ranks()
    assert ranks.agree("a", lambda: 1, 0.0) == 1
    assert ranks.agree("a", lambda: 2, 0.0) == 2


def test_first_rank_to_ask_decides(store):
    assert ranks.has_other_ranks()
    assert ranks.agree("a", lambda: {"how": "op"}, 1.0) == {"how": "op"}
    assert ranks.agree("a", lambda: {"how": "reference"}, 1.0) == {"how": "op"}
    assert ranks.agree("b", lambda: 3, 1.0) == 3


def test_other_ranks_wait_for_the_first(store):
    asked, go = threading.Event(), threading.Event()

    def slowly() -> int:
        asked.set()
        assert go.wait(30)
        return 7

    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(ranks.agree("a", slowly, 30.0)))
    first.start()
    assert asked.wait(30)
    second = threading.Thread(target=lambda: answers.append(ranks.agree("a", lambda: 8, 30.0)))
    second.start()
    go.set()
    first.join()
    second.join()
    assert answers == [7, 7]


def test_rank_that_fails_or_goes_keeps_no_other_waiting(store, caplog):
    with pytest.raises(ValueError, match="no"):
        ranks.agree("a", lambda: (_ for _ in ()).throw(ValueError("no")), 1.0)
    assert ranks.agree("a", lambda: 1, 1.0) is None
    store.add(ranks.store_key("gone") + "/asked", 1)
    assert ranks.agree("gone", lambda: 1, 0.01) is None
    assert "no rank has answered" in caplog.text
