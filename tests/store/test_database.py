"""
The pool: bounded, honest about what failed, and whole again after every outage.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from asyncflow.domain.states import Event, State
from asyncflow.errors import StatementRefused, StoreUnavailable
from asyncflow.store import tasks, upkeep
from asyncflow.store.database import Database
from builders import SETTLEMENTS, a_task, claimed, new_task, settled, state_of
from services.postgres import PostgresServer
from store.waiting import until, until_someone_waits_for_a_lock


@pytest.fixture
async def small(shared_database_url: str) -> AsyncIterator[Database]:
    """
    A pool of two connections that waits for at most half a second.
    """
    async with Database(shared_database_url, size=2, timeout_seconds=0.5, name="small") as database:
        yield database


async def backends(db: Database, name: str = "small") -> int:
    """
    How many connections PostgreSQL counts under this name.
    """
    count: int = await db.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name
    )
    return count


async def serves(db: Database) -> bool:
    """
    Whether the database takes writes now.
    """
    try:
        await upkeep.probe(db)
    except StoreUnavailable:
        return False
    return True


async def test_a_pool_never_opens_more_connections_than_its_size(
    db: Database, small: Database
) -> None:
    """
    However many callers there are; they wait their turn.
    """
    waits = [small.fetchval("SELECT pg_sleep(0.02)") for _ in range(20)]

    await asyncio.gather(*waits)

    assert 2 == await backends(db)


async def test_waiting_for_a_connection_ends_after_the_timeout(small: Database) -> None:
    """
    A caller hears that the store is busy; the pool is whole afterwards.
    """
    async with small.transaction(), small.transaction():
        with pytest.raises(StoreUnavailable):
            await small.fetchval("SELECT 1")

    assert 1 == await small.fetchval("SELECT 1")


async def test_a_statement_ends_after_the_timeout(db: Database, small: Database) -> None:
    """
    PostgreSQL stops working on it, too; the connection is used again.
    """
    await small.fetchval("SELECT 1")

    with pytest.raises(StoreUnavailable):
        await small.fetchval("SELECT pg_sleep(60)")

    assert 1 == await small.fetchval("SELECT 1")
    assert 0 == await db.fetchval(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE state = 'active' AND query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()"
    )


async def test_callers_that_give_up_leak_no_connections(
    db: Database, shared_database_url: str
) -> None:
    """
    Cancelled while waiting for a connection, for an answer, or inside a transaction.
    """

    async def in_transaction(pool: Database) -> None:
        async with pool.transaction() as connection:
            await connection.fetchval("SELECT pg_sleep(30)")

    async with Database(shared_database_url, size=2, timeout_seconds=40, name="leaky") as pool:
        for _ in range(10):
            callers = [
                asyncio.ensure_future(call)
                for _ in range(3)
                for call in (pool.fetchval("SELECT pg_sleep(30)"), in_transaction(pool))
            ]
            await until(
                lambda: db.fetchval(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE application_name = 'leaky' AND state = 'active'"
                )
            )
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)

        assert [1, 1] == await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(2)))
        assert await backends(db, "leaky") <= 2


async def test_a_deadlock_is_tried_again(fresh_db: Database) -> None:
    """
    PostgreSQL undoes one side; that side's caller never hears of it.
    """
    first, second = sorted(await _two_tasks(fresh_db))
    touch = "UPDATE asyncflow.tasks SET run_at = run_at WHERE id = $1"

    async with fresh_db.transaction() as other:
        await other.execute(touch, second)
        # Locks `first`, then waits for us.
        victim = asyncio.create_task(
            fresh_db.fetch(
                "WITH a AS (UPDATE asyncflow.tasks SET run_at = run_at WHERE id = $1 RETURNING id),"
                " b AS (UPDATE asyncflow.tasks SET run_at = run_at"
                "        WHERE id = $2 AND EXISTS (SELECT FROM a) RETURNING id)"
                " SELECT id FROM b",
                first,
                second,
            )
        )
        await until_someone_waits_for_a_lock(fresh_db)
        # Whoever looks first finds the deadlock; make it the other side.
        await other.execute("SET LOCAL deadlock_timeout = '60s'")
        await other.execute(touch, first)

    assert [second] == [row["id"] for row in await victim]
    assert 1 <= await _deadlocks(fresh_db)


async def test_a_row_that_moved_away_while_we_waited_is_looked_up_again(db: Database) -> None:
    """
    PostgreSQL reports a row that changed its partition as a serialization failure.
    """
    task = await a_task(db, state=State.RUNNING)
    assert task.lease_id
    async with db.transaction() as settling:
        await settled(settling, task.id, task.lease_id, SETTLEMENTS[Event.COMPLETE])
        late = asyncio.create_task(claimed(db, task.id))
        touched = asyncio.create_task(
            db.fetch(
                "UPDATE asyncflow.tasks SET run_at = run_at WHERE id = $1 RETURNING 1", task.id
            )
        )
        await until_someone_waits_for_a_lock(db)

    assert [] == await late
    assert 1 == len(await touched)


async def test_a_read_only_database_is_unavailable_until_it_is_not(
    fresh_db: Database, database_url: str
) -> None:
    """
    As after a demotion: what writes is refused, and no connection to that server is kept.
    """
    name = await fresh_db.fetchval("SELECT current_database()")
    await fresh_db.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with Database(database_url, size=2) as demoted:
        assert 1 == await demoted.fetchval("SELECT 1")
        with pytest.raises(StoreUnavailable, match="read-only"):
            await tasks.submit(demoted, [new_task()])

        await fresh_db.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")

        # A pooled connection would still be read-only; a new one is not.
        await tasks.submit(demoted, [new_task()])


async def test_a_pool_comes_back_after_every_way_a_server_can_end(
    postgres_server: PostgresServer, shared_database_url: str
) -> None:
    """
    Stopped, killed, started again: callers hear StoreUnavailable and nothing else, then go on.
    """
    async with Database(shared_database_url, size=4, timeout_seconds=5) as db:
        for end in (
            postgres_server.cluster.stop,
            lambda: postgres_server.cluster.stop("immediate"),
            postgres_server.cluster.kill,
        ):
            before = new_task()
            await tasks.submit(db, [before])
            under_way = [asyncio.ensure_future(db.fetchval("SELECT pg_sleep(60)")) for _ in "ab"]
            await until(
                lambda: db.fetchval(
                    "SELECT count(*) = 2 FROM pg_stat_activity"
                    " WHERE query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()"
                )
            )
            await asyncio.to_thread(end)

            broken = await asyncio.gather(*under_way, return_exceptions=True)
            with pytest.raises(StoreUnavailable):
                await upkeep.probe(db)
            await asyncio.to_thread(postgres_server.cluster.start)
            await until(lambda: serves(db))

            assert [StoreUnavailable] * 2 == [type(error) for error in broken]
            assert State.PENDING == await state_of(db, before.id)


async def test_a_refusal_names_the_constraint_and_no_value(db: Database) -> None:
    """
    Values may be payloads, and errors end up in logs.
    """
    with pytest.raises(StatementRefused) as refusal:
        await tasks.submit(db, [new_task(payload='{"card": "4111"}', priority=10)])

    assert "priority" in str(refusal.value)
    assert "4111" not in str(refusal.value)
    assert refusal.value.__cause__ is None


async def test_a_database_that_does_not_exist_is_unavailable(shared_database_url: str) -> None:
    """
    It may be created soon.
    """
    url = shared_database_url.replace("/test_", "/missing_")
    async with Database(url) as db:
        with pytest.raises(StoreUnavailable):
            await upkeep.probe(db)


async def test_an_argument_that_can_never_be_right_is_no_outage(db: Database) -> None:
    """
    Waiting for the database would not help: it is refused as what it is.
    """
    for wrong in ("\ud800", "\x00", 7):
        with pytest.raises(StatementRefused):
            await db.fetchval("SELECT $1::text", wrong)


async def test_the_store_works_without_prepared_statements(
    shared_database_url: str, db: Database
) -> None:
    """
    Behind a pooler in transaction mode there are none, and no session settings.
    """
    async with Database(shared_database_url, size=2, pooler=True) as pooled:
        done = await a_task(pooled, state=State.COMPLETED, attempt=2)
        await a_task(pooled, state=State.FAILED)

        page = await tasks.list_tasks(pooled, 1)

        prepared = await pooled.fetchval("SELECT count(*) FROM pg_prepared_statements")
        settings = await pooled.fetchval("SHOW enable_seqscan")
        assert 2 == len(page.tasks)
        assert State.COMPLETED == await state_of(pooled, done.id)
        assert (0, "on") == (prepared, settings)


async def test_an_open_database_may_be_closed_twice(shared_database_url: str) -> None:
    """
    And one that was never opened, once.
    """
    db = Database(shared_database_url)
    await db.close()
    async with db:
        await db.fetchval("SELECT 1")
        await db.close()


async def _two_tasks(db: Database) -> list[UUID]:
    new = [new_task(), new_task()]
    await tasks.submit(db, new)
    return [task.id for task in new]


async def _deadlocks(db: Database) -> int:
    await db.fetchval("SELECT pg_stat_force_next_flush()")
    count: int = await db.fetchval(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    return count
