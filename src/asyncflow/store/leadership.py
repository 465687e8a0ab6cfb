"""
One leader among many processes, by a session advisory lock.

The lock lives on the connection that the leader works on. If the process dies, PostgreSQL
frees it; if the process freezes, the session times out after `IDLE_SECONDS_MAX` and frees it.

Nothing may depend on there being only one leader: two of them waste work and do no harm. Behind a
pooler in transaction mode, where a session lock would stay with a connection that serves others,
every process leads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asyncflow.store.database import Database, Executor, translated_errors

RELAY_LOCK = 0x4153_594E_4352_4C59
IDLE_SECONDS_MAX = 5

LIMIT_IDLENESS = """
    SELECT set_config('idle_session_timeout', $1, false)
"""

TRY_LOCK = """
    SELECT pg_try_advisory_lock($1)
"""


@asynccontextmanager
async def leadership(
    db: Database, *, purpose: str, idle_seconds_max: float = IDLE_SECONDS_MAX
) -> AsyncIterator[Executor | None]:
    """
    Try to become the relay's leader; yields the leader's connection, or None if another leads.

    Args:
        idle_seconds_max: How long the leader may leave the connection unused before PostgreSQL
            ends it.

    Raises:
        StoreUnavailable: PostgreSQL cannot be reached, or the connection was lost.
    """
    connection = await db.connect(purpose)
    try:
        with translated_errors():
            yield connection if db.pooler or await _wins(connection, idle_seconds_max) else None
    finally:
        connection.terminate()


async def keep_leading(leader: Executor) -> None:
    """
    Show PostgreSQL that the leader is alive, which every statement on its connection does.

    Raises:
        StoreUnavailable: The lead is lost. Raised by the `leadership` block that this is called in.
    """
    await leader.execute("SELECT 1")


async def _wins(connection: Executor, idle_seconds_max: float) -> bool:
    await connection.execute(LIMIT_IDLENESS, f"{idle_seconds_max * 1_000:.0f}ms")
    return bool(await connection.fetchval(TRY_LOCK, RELAY_LOCK))
