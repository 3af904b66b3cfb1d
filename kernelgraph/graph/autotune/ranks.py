"""One decision for all processes of a group.

The first rank that asks about something decides, and the others wait for what it says. They meet
in the store of the default process group, where no rank waits for one that never asks: ranks may
compile different graphs, in another order.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

from kernelgraph.graph import _torch

logger = logging.getLogger("kernelgraph")


def several() -> bool:
    """Whether there are other processes to agree with."""
    return _torch.store_of_group() is not None


def agree(about: str, decide: Callable[[], Any], patience: float) -> Any:
    """What the first rank to ask has decided; without other ranks, what ``decide`` says.

    Args:
        about: What is decided.
        decide: Decides; its result is what JSON can hold.
        patience: How many seconds to wait for another rank.

    Returns:
        The decision; None if there was no answer in time.

    Raises:
        Exception: What ``decide`` raises.
    """
    store = _torch.store_of_group()
    if store is None:
        return decide()
    key = f"kernelgraph/{hashlib.sha256(about.encode()).hexdigest()}"
    if store.add(f"{key}/asked", 1) == 1:
        answer: Any = None
        try:
            answer = decide()
        finally:
            store.set(f"{key}/answer", json.dumps(answer))
        return answer
    try:
        store.wait([f"{key}/answer"], datetime.timedelta(seconds=patience))
        return json.loads(store.get(f"{key}/answer"))
    except RuntimeError as error:  # the time is up, or the rank has gone
        logger.warning("no rank has answered what to compile: %s", error)
        return None
