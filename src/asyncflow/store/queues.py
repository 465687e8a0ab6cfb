"""
Pausing and resuming queues. A paused queue accepts tasks and starts none.
"""

from __future__ import annotations

from asyncflow.store.database import Executor

PAUSE = """
    INSERT INTO asyncflow.queues (name, paused_at)
    VALUES ($1, now())
        ON CONFLICT (name) DO UPDATE
       SET paused_at = coalesce(asyncflow.queues.paused_at, now())
"""


async def pause(db: Executor, queue: str) -> None:
    """
    Start no more tasks of `queue`; what runs goes on.
    """
    await db.execute(PAUSE, queue)


RESUME = """
    UPDATE asyncflow.queues
       SET paused_at = NULL
     WHERE name = $1
"""


async def resume(db: Executor, queue: str) -> None:
    """
    Let tasks of `queue` start again.
    """
    await db.execute(RESUME, queue)
