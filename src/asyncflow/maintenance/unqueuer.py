"""
Frees tasks that were queued for a broker that is no longer used.
"""

from __future__ import annotations

from asyncflow.store import hints
from asyncflow.store.database import Executor
from asyncflow.telemetry import events

BATCH = 1_000


async def unqueue(db: Executor) -> int:
    """
    Put queued tasks back to pending, where workers without a broker find them; return how many.
    """
    count = await hints.unqueue_stranded(db, limit=BATCH)
    if count:
        events.tasks_unqueued(count=count)
    return count
