"""
Deletes old finished tasks, and the rows of workers that ended long ago.
"""

from __future__ import annotations

from asyncflow.store import upkeep, workers
from asyncflow.store.database import Executor
from asyncflow.telemetry import events

BATCH = 2_000


async def prune(db: Executor, *, retention_days: float) -> int:
    """
    Delete tasks that finished more than `retention_days` ago; return how many.
    """
    await workers.prune(db)
    count = await upkeep.prune_finished(db, older_than_days=retention_days, limit=BATCH)
    if count:
        events.tasks_pruned(count=count)
    return count
