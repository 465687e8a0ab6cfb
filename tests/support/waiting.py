"""
Waiting for what PostgreSQL does and tells nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from asyncflow.store.database import Executor

PATIENCE_SECONDS = 15.0
LOOK_SECONDS = 0.005


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """
    Return as soon as `condition` is true; fail after some seconds.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if await condition():
                return
            await asyncio.sleep(LOOK_SECONDS)


async def until_someone_waits_for_a_lock(db: Executor) -> None:
    """
    Return when a statement of this database is held up by another one.
    """
    await until(lambda: db.fetchval(WAITING))


WAITING = """
    SELECT count(*)
      FROM pg_stat_activity
     WHERE datname = current_database()
       AND wait_event_type = 'Lock'
"""
