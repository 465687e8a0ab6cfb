"""
One process leads, the others stand by, and a dead leader is replaced quickly.
"""

from __future__ import annotations

from asyncflow.store.database import Database
from asyncflow.store.leadership import IDLE_SECONDS_MAX, leadership
from tests.support.waiting import until


async def test_only_one_of_many_leads(db: Database) -> None:
    """
    All but one process learn immediately that another one leads.
    """
    async with leadership(db, purpose="one") as one, leadership(db, purpose="two") as two:
        assert one is not None
        assert two is None


async def test_leadership_passes_on_when_the_leader_ends(db: Database) -> None:
    """
    PostgreSQL frees the lock with the connection, however the leader ended.
    """

    async def can_lead() -> bool:
        async with leadership(db, purpose="next") as connection:
            return connection is not None

    async with leadership(db, purpose="first") as connection:
        assert connection is not None
        assert not await can_lead()

    await until(can_lead)


async def test_a_leader_works_on_the_connection_that_proves_it(db: Database) -> None:
    """
    If the leader freezes, PostgreSQL ends its session, and with it the lock.
    """
    async with leadership(db, purpose="relay") as connection:
        assert connection is not None

        limit = await connection.fetchval("SHOW idle_session_timeout")

        assert f"{IDLE_SECONDS_MAX}s" == limit


async def test_behind_a_pooler_every_process_leads(shared_database_url: str) -> None:
    """
    Behind a pooler every process leads: a session lock would stay with a shared server connection.
    """
    async with Database(shared_database_url, pooler=True) as pooled:
        async with (
            leadership(pooled, purpose="one") as one,
            leadership(pooled, purpose="two") as two,
        ):
            assert one is not None
            assert two is not None
            assert 0 == await one.fetchval(
                "SELECT count(*) FROM pg_locks"
                " WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
            )
