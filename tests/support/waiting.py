"""
Polling for changes in a server that it cannot signal to a test.

If there is a signal, a log line, a notification or an event, wait for that instead. The time limits
only end a test that hangs; a test of a time measures it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from asyncflow.errors import StoreUnavailable
from asyncflow.store.database import Executor

PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.01


async def until(
    condition: Callable[[], Awaitable[object]], *, seconds: float = PATIENCE_SECONDS
) -> None:
    """
    Return once `condition` is true. An unavailable store counts as false.

    Raises:
        TimeoutError: It was not true within `seconds`.
    """
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(StoreUnavailable):
                if await condition():
                    return
            await asyncio.sleep(POLL_SECONDS)


async def until_someone_waits_for_a_lock(db: Executor) -> None:
    """
    Return once a statement in this database is waiting for a lock.
    """
    await until(lambda: db.fetchval(WAITING))


WAITING = """
    SELECT count(*)
      FROM pg_stat_activity
     WHERE datname = current_database()
       AND wait_event_type = 'Lock'
"""
