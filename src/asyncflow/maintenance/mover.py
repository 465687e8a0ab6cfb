"""
Brings tasks that were submitted before their handler was known to the queue it asks for.
"""

from __future__ import annotations

from asyncflow.domain.policy import DEFAULT_POLICY
from asyncflow.store import upkeep
from asyncflow.store.database import Executor
from asyncflow.telemetry import events

BATCH = 1_000
SINCE_SECONDS = 3_600.0
"""How long after a handler was first published on a queue to look for such tasks."""

LATE_SECONDS = 15.0
"""How long after that an API process may not have heard of it yet, with room to spare."""


async def move(db: Executor) -> int:
    """
    Move tasks that nobody takes from `default` to their handler's queue; return how many.
    """
    count = await upkeep.move_to_handlers_queue(
        db,
        queue=DEFAULT_POLICY.queue,
        since_seconds=SINCE_SECONDS,
        late_seconds=LATE_SECONDS,
        limit=BATCH,
    )
    if count:
        events.tasks_moved(count=count)
    return count
