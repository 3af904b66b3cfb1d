from __future__ import annotations

import gc
import weakref

import pytest

from kernelgraph.report import WeakSlot


class Owner:
    def method(self) -> None: ...


def of(owner: Owner, kind: str) -> object:
    """What stands for ``owner``; a method is another object each time."""
    return owner.method if kind == "method" else owner


@pytest.mark.parametrize("kind", ["object", "method"])
def test_it_is_there_for_the_last_alone(kind: str) -> None:
    one, other = Owner(), Owner()
    kept: WeakSlot[int] = WeakSlot()
    assert kept.get(of(one, kind)) is None
    assert kept.put(of(one, kind), 1) == 1
    assert [kept.get(of(owner, kind)) for owner in (one, other)] == [1, None]
    kept.put(of(other, kind), 2)
    assert [kept.get(of(owner, kind)) for owner in (one, other)] == [None, 2]
    kept.clear()
    assert kept.get(of(other, kind)) is None


@pytest.mark.parametrize("kind", ["object", "method"])
def test_it_keeps_nobody_alive(kind: str) -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    kept: WeakSlot[int] = WeakSlot()
    kept.put(of(owner, kind), 1)
    del owner
    gc.collect()
    assert gone() is None
    assert kept.get(of(Owner(), kind)) is None


def test_nothing_belongs_to_nobody() -> None:
    owner = Owner()
    kept: WeakSlot[int] = WeakSlot()
    kept.put(owner, 1)
    kept.put(None, 2)
    assert [kept.get(None), kept.get(owner)] == [None, None]
