"""
Moves tasks that were submitted before their handler was known to the handler's queue.
"""

from __future__ import annotations

from asyncflow.domain.policy import DEFAULT_POLICY
from asyncflow.store import upkeep
from asyncflow.store.database import Executor
from asyncflow.telemetry import events

BATCH = 1_000
SINCE_SECONDS = 3_600.0
"""How long after a handler is first published on a queue such tasks are searched for."""

LATE_SECONDS = 15.0
"""How long an API process may take to learn of a published handler, with a margin."""


async def move(db: Executor) -> int:
    """
    Move tasks that no worker takes from `default` to their handler's queue; return how many.
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
