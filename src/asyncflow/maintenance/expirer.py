"""
Cancels waiting tasks whose `expires_at` has passed.
"""

from __future__ import annotations

from asyncflow.store import upkeep
from asyncflow.store.database import Executor
from asyncflow.telemetry import events

BATCH = 1_000


async def expire(db: Executor) -> int:
    """
    Cancel waiting tasks that have expired; return how many.
    """
    count = await upkeep.expire(db, limit=BATCH)
    if count:
        events.tasks_expired(count=count)
    return count
