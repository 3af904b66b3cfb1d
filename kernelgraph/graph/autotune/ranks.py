"""One decision for all processes of a group.

The first rank that asks about something decides, and the others wait for its answer. They meet
in the store of the default process group, where no rank waits for one that never asks: ranks may
compile different graphs, in another order.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Callable

from kernelgraph.graph import _torch

logger = logging.getLogger("kernelgraph")


def has_other_ranks() -> bool:
    """Whether there are other processes to agree with."""
    return _torch.store_of_group() is not None


def agree(about: str, decide: Callable[[], object], patience: float) -> object:
    """Return what the first rank to ask has decided.

    Args:
        about: The question, as text that is the same in all ranks.
        decide: Returns the decision, a value that JSON can hold. Called in the first rank to ask,
            and wherever there are no other ranks.
        patience: The seconds to wait for another rank.

    Returns:
        The decision; None if there was no answer in time.

    Raises:
        Exception: Whatever ``decide`` raises.
    """
    store = _torch.store_of_group()
    if store is None:
        return decide()
    key = store_key(about)
    if store.add(f"{key}/asked", 1) == 1:
        answer: object = None
        try:
            answer = decide()
        finally:
            store.set(f"{key}/answer", json.dumps(answer))
        return answer
    try:
        store.wait([f"{key}/answer"], datetime.timedelta(seconds=patience))
        decision: object = json.loads(store.get(f"{key}/answer"))
    except RuntimeError as error:  # the time is up, or the rank has gone
        logger.warning("no rank has answered what to compile: %s", error)
        return None
    return decision


def store_key(about: str) -> str:
    """Return the prefix under which the store holds a question and its answer."""
    return f"kernelgraph/{hashlib.sha256(about.encode()).hexdigest()}"
