"""Verdicts are kept in the process and on disk, and made again where they may have changed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch

from kernelgraph import cache
from kernelgraph.graph.verify.verdict import Verdict
from kernelgraph.kernel import Kernel
from tests.support.op_calls import own_backward
from tests.support.trials import (
    Norm,
    X,
    composite,
    forget_verdicts,
    kernel,
    verdict,
)


def counted(ran: list[int], revision: str | None = "1" * 40) -> Kernel:
    def forward(self, x):
        ran.append(1)
        return composite(self, x)

    return kernel(forward, revision)


def runs_again(ran: list[int], toy: Kernel, *args: Any, **kwargs: Any) -> bool:
    """Check that ``toy`` may train, and return whether it was run to find out."""
    before = len(ran)
    assert verdict(Norm(), toy, *args, **kwargs) == Verdict(own_backward((0, 1), (), (True,)))
    return len(ran) > before


def test_verdict_is_kept_in_the_process():
    ran: list[int] = []
    toy = counted(ran, None)
    assert runs_again(ran, toy, X)
    assert not runs_again(ran, toy, X)
    assert runs_again(ran, toy, X, compare=False)
    assert not runs_again(ran, toy, torch.randn(6, 16))


def test_verdict_is_kept_on_disk():
    ran: list[int] = []
    toy = counted(ran)
    assert runs_again(ran, toy, X)
    forget_verdicts()
    assert not runs_again(ran, toy, X)
    forget_verdicts()
    assert runs_again(ran, counted(ran, "2" * 40), X), "another commit"
    cache.clear()
    forget_verdicts()
    assert runs_again(ran, toy, X)


def test_verdict_on_a_class_in_no_kernel_is_not_kept_on_disk():
    """The code that its ``forward`` calls may have changed by the next process."""
    ran: list[int] = []
    toy = counted(ran, None)
    assert runs_again(ran, toy, X)
    forget_verdicts()
    assert runs_again(ran, toy, X)
    assert cache.entries() == {}


def test_verdict_on_a_kernel_that_raised_is_not_kept_on_disk():
    """It may have missed a compiler, say, that is installed the next time."""
    missing = [True]

    def forward(self, x):
        if missing:
            raise OSError("no compiler")
        return composite(self, x)

    toy = kernel(forward, "1" * 40)
    assert verdict(Norm(), toy, X).wrong == "it raised OSError: no compiler"
    forget_verdicts()
    missing.clear()
    assert verdict(Norm(), toy, X).own is not None


def test_calls_equal_at_small_sizes_are_judged_once():
    ran: list[int] = []
    toy = counted(ran)
    assert runs_again(ran, toy, torch.randn(100, 16))
    assert not runs_again(ran, toy, torch.randn(3000, 16))
    assert runs_again(ran, toy, torch.randn(16, 100).t())
    assert runs_again(ran, toy, torch.randn(5, 16))
    assert runs_again(ran, toy, torch.randn(3000, 16).double())


def test_broken_verdict_on_disk_is_ignored():
    ran: list[int] = []
    toy = counted(ran)
    assert runs_again(ran, toy, X)
    (path,) = cache.directory().glob("verdicts/*.json")
    for broken in ("{", path.read_text().replace('"own"', '"owned"')):
        path.write_text(broken)
        forget_verdicts()
        assert runs_again(ran, toy, X)


def test_another_process_uses_the_same_key():
    program = """
import torch
from tests.support import trials as here
from kernelgraph.graph.verify import trial

def never(*args): raise AssertionError("it is judged again")

trial._judge = never
print(here.verdict(here.Norm(), here.kernel(here.composite, "1" * 40), here.X))
"""
    found = verdict(Norm(), kernel(composite, "1" * 40), X)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == f"{found}\n", done.stderr
