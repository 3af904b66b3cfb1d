"""The weak slot: a value that only the owner it was last put for can get."""

from __future__ import annotations

import gc
import weakref

import pytest

from kernelgraph.report import WeakSlot


class Owner:
    def method(self) -> None: ...


def key_of(owner: Owner, kind: str) -> object:
    """The owner itself, or its method, which is another object each time it is looked up."""
    return owner.method if kind == "method" else owner


@pytest.mark.parametrize("kind", ["object", "method"])
def test_only_the_last_owner_gets_the_value(kind: str) -> None:
    one, other = Owner(), Owner()
    kept: WeakSlot[int] = WeakSlot()
    assert kept.get(key_of(one, kind)) is None
    assert kept.put(key_of(one, kind), 1) == 1
    assert [kept.get(key_of(owner, kind)) for owner in (one, other)] == [1, None]
    kept.put(key_of(other, kind), 2)
    assert [kept.get(key_of(owner, kind)) for owner in (one, other)] == [None, 2]
    kept.clear()
    assert kept.get(key_of(other, kind)) is None


@pytest.mark.parametrize("kind", ["object", "method"])
def test_the_slot_keeps_no_owner_alive(kind: str) -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    kept: WeakSlot[int] = WeakSlot()
    kept.put(key_of(owner, kind), 1)
    del owner
    gc.collect()
    assert gone() is None
    assert kept.get(key_of(Owner(), kind)) is None


def test_a_value_put_for_none_is_not_kept() -> None:
    owner = Owner()
    kept: WeakSlot[int] = WeakSlot()
    kept.put(owner, 1)
    kept.put(None, 2)
    assert [kept.get(None), kept.get(owner)] == [None, None]
