"""
The pool is bounded, reports failures accurately, and is intact after every outage.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from asyncflow.domain.states import Event, State
from asyncflow.errors import StatementRefused, StoreUnavailable
from asyncflow.store import read, submit, upkeep
from asyncflow.store.database import Database
from asyncflow.store.migrations import migrate
from tests.support.builders import SETTLEMENTS, a_task, claimed, new_task, settled, state_of
from tests.support.postgres import PostgresServer
from tests.support.roles import GRANTS, administrator
from tests.support.waiting import until, until_someone_waits_for_a_lock
from tests.support.wire import laid


@pytest.fixture
async def small(shared_database_url: str) -> AsyncIterator[Database]:
    """
    A pool of two connections that waits for at most half a second.
    """
    async with Database(shared_database_url, size=2, timeout_seconds=0.5, name="small") as database:
        yield database


async def backends(db: Database, name: str = "small") -> int:
    """
    Number of connections that PostgreSQL reports under this name.
    """
    count: int = await db.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name
    )
    return count


async def serves(db: Database) -> bool:
    """
    Whether the database accepts writes now.
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
    However many callers there are, they wait for their turn.
    """
    waits = [small.fetchval("SELECT pg_sleep(0.02)") for _ in range(20)]

    await asyncio.gather(*waits)

    assert 2 == await backends(db)


async def test_waiting_for_a_connection_ends_after_the_timeout(small: Database) -> None:
    """
    A caller that waits too long learns that the store is busy; the pool is intact afterwards.
    """
    async with small.transaction(), small.transaction():
        with pytest.raises(StoreUnavailable):
            await small.fetchval("SELECT 1")

    assert 1 == await small.fetchval("SELECT 1")


async def test_a_statement_ends_after_the_timeout(db: Database, small: Database) -> None:
    """
    PostgreSQL stops executing the statement too, and the connection is reused.
    """
    await small.fetchval("SELECT 1")

    with pytest.raises(StoreUnavailable):
        await small.fetchval("SELECT pg_sleep(60)")

    assert 1 == await small.fetchval("SELECT 1")
    assert 0 == await db.fetchval(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE state = 'active' AND query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()"
    )


async def test_cancelled_callers_leak_no_connections(
    db: Database, shared_database_url: str
) -> None:
    """
    Callers that are cancelled while they wait for a connection, for an answer, or inside a
    transaction leak no connection.
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
    PostgreSQL rolls back one side, which is retried without its caller noticing.
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
        # The side that checks first detects the deadlock; make it the other one.
        await other.execute("SET LOCAL deadlock_timeout = '60s'")
        await other.execute(touch, first)

    assert [second] == [row["id"] for row in await victim]
    assert 1 <= await _deadlocks(fresh_db)


async def test_a_row_that_moved_away_while_we_waited_is_looked_up_again(db: Database) -> None:
    """
    PostgreSQL reports a row that changed its partition as a serialization failure, which is
    retried.
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
    After a demotion, writes are refused and no connection to that server is kept.
    """
    name = await fresh_db.fetchval("SELECT current_database()")
    await fresh_db.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with Database(database_url, size=2) as demoted:
        assert 1 == await demoted.fetchval("SELECT 1")
        with pytest.raises(StoreUnavailable, match="read-only"):
            await submit.submit(demoted, [new_task()])

        await fresh_db.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")

        # A pooled connection would still be read-only; a new one is not.
        await submit.submit(demoted, [new_task()])


async def test_a_pool_comes_back_after_every_way_a_server_can_end(
    postgres_server: PostgresServer, shared_database_url: str
) -> None:
    """
    When the server is stopped, killed and started again, callers see only StoreUnavailable, then
    continue.
    """
    async with Database(shared_database_url, size=4, timeout_seconds=5) as db:
        for end in (
            postgres_server.cluster.stop,
            lambda: postgres_server.cluster.stop("immediate"),
            postgres_server.cluster.kill,
        ):
            before = new_task()
            await submit.submit(db, [before])
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


MISSING = (
    (
        "REVOKE USAGE ON SCHEMA asyncflow FROM {role}",
        GRANTS,
        "permission denied for schema asyncflow",
    ),
    (
        "REVOKE INSERT ON asyncflow.tasks FROM {role}",
        GRANTS,
        "permission denied for table tasks",
    ),
    (
        "ALTER TABLE asyncflow.tasks RENAME TO away",
        "ALTER TABLE asyncflow.away RENAME TO tasks",
        'relation "asyncflow.tasks" does not exist',
    ),
    (
        "ALTER SCHEMA asyncflow RENAME TO away",
        "ALTER SCHEMA away RENAME TO asyncflow",
        'relation "asyncflow.tasks" does not exist',
    ),
    (
        "ALTER TABLE asyncflow.tasks RENAME queue TO away",
        "ALTER TABLE asyncflow.tasks RENAME away TO queue",
        'column "queue" of relation "tasks" does not exist',
    ),
    (
        "ALTER TABLE asyncflow.tasks DETACH PARTITION asyncflow.tasks_live",
        """
        ALTER TABLE asyncflow.tasks ATTACH PARTITION asyncflow.tasks_live
        FOR VALUES IN ('pending', 'queued', 'running')
        """,
        'no partition of relation "tasks" found for row',
    ),
)
"""How an administrator takes something away, how it is restored, and the error of a submission."""


async def test_what_is_missing_is_named_and_waited_out(
    postgres_server: PostgresServer, database_url: str
) -> None:
    """
    The error names the missing privilege, table or column, and the same connection works once it is
    restored.
    """
    async with (
        administrator(postgres_server, database_url) as admin,
        Database(admin.url, size=1) as db,
    ):
        session = await db.fetchval("SELECT pg_backend_pid()")
        for take, give, words in MISSING:
            await submit.submit(db, [new_task()])
            await admin.execute(take)
            with pytest.raises(StoreUnavailable) as unavailable:
                await submit.submit(db, [new_task()])
            await admin.execute(give)
            await submit.submit(db, [new_task()])

            assert words in str(unavailable.value)
            assert unavailable.value.session_lives
        assert session == await db.fetchval("SELECT pg_backend_pid()")
        assert 2 * len(MISSING) == await db.fetchval("SELECT count(*) FROM asyncflow.tasks")


async def test_a_pool_serves_a_schema_that_was_dropped_and_made_again(
    fresh_db: Database, database_url: str
) -> None:
    """
    Prepared statements still work after every table got a new OID.
    """
    await submit.submit(fresh_db, [new_task()])
    await fresh_db.execute("DROP SCHEMA asyncflow CASCADE")
    with pytest.raises(StoreUnavailable):
        await submit.submit(fresh_db, [new_task()])
    await migrate(database_url)

    await submit.submit(fresh_db, [new_task()])

    assert 1 == await fresh_db.fetchval("SELECT count(*) FROM asyncflow.tasks")


async def test_a_plan_that_is_out_of_date_is_made_again(
    fresh_db: Database,
) -> None:
    """
    A cached plan that PostgreSQL refuses, because column types have changed, is made again.
    """
    await fresh_db.execute("CREATE TABLE asyncflow.changing AS SELECT 1 AS what")
    read = "SELECT what FROM asyncflow.changing"
    assert 1 == await fresh_db.fetchval(read)

    await fresh_db.execute("ALTER TABLE asyncflow.changing ALTER what TYPE text")

    assert "1" == await fresh_db.fetchval(read)


@pytest.mark.any_postgres
async def test_connections_that_a_firewall_forgot_cost_one_timeout(
    shared_database_url: str,
) -> None:
    """
    The first caller to use a dead connection fails within the timeout, and all others are replaced.
    """
    seconds = 3.0
    async with (
        laid({"postgres": shared_database_url}) as wires,
        Database(wires["postgres"].url, size=4, timeout_seconds=seconds, name="forgotten") as db,
    ):
        await asyncio.gather(*(db.fetchval("SELECT pg_sleep(0.1)") for _ in range(4)))
        assert 4 == wires["postgres"].forget()

        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await db.fetchval("SELECT 1")
        took = time.monotonic() - began
        answers = [await db.fetchval("SELECT 1") for _ in range(4)]

        assert [1] * 4 == answers
        assert took < 1.5 * seconds


async def test_a_cancelled_caller_does_not_wait_for_a_dead_connection(
    shared_database_url: str,
) -> None:
    """
    A cancelled caller, such as a readiness probe, does not wait for PostgreSQL to confirm the
    cancellation of a statement that never arrived.
    """
    async with (
        laid({"postgres": shared_database_url}) as wires,
        Database(wires["postgres"].url, size=2, timeout_seconds=60, name="forgotten") as db,
    ):
        db._cancel_seconds = 0.1
        await asyncio.gather(*(db.fetchval("SELECT pg_sleep(0.1)") for _ in range(2)))
        wires["postgres"].forget()

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await db.fetchval("SELECT 1")

        assert 1 == await db.fetchval("SELECT 1")


async def test_a_slow_statement_costs_no_other_connection(db: Database, small: Database) -> None:
    """
    PostgreSQL confirms that the slow statement ended, so no connection is replaced.
    """
    async with small.transaction() as one, small.transaction() as other:
        before = {await c.fetchval("SELECT pg_backend_pid()") for c in (one, other)}

    with pytest.raises(StoreUnavailable):
        await small.fetchval("SELECT pg_sleep(60)")

    async with small.transaction() as one, small.transaction() as other:
        after = {await c.fetchval("SELECT pg_backend_pid()") for c in (one, other)}
    assert before == after


async def test_a_broken_connection_has_the_others_replaced(db: Database, small: Database) -> None:
    """
    Connections opened before one broke are replaced, since they are most likely broken too.
    """
    async with small.transaction() as one, small.transaction() as other:
        before = {await c.fetchval("SELECT pg_backend_pid()") for c in (one, other)}
    broken = asyncio.ensure_future(small.fetchval("SELECT pg_sleep(60), 'broken'"))
    await until(
        lambda: db.fetchval(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE query LIKE '%pg_sleep(60), ''broken''%' AND pid <> pg_backend_pid()"
        )
    )
    with pytest.raises(StoreUnavailable):
        await broken

    async with small.transaction() as one, small.transaction() as other:
        after = {await c.fetchval("SELECT pg_backend_pid()") for c in (one, other)}
    assert set() == before & after


async def test_the_kernel_looks_after_connections_that_say_nothing(
    shared_database_url: str,
) -> None:
    """
    Keepalives keep firewalls from dropping idle connections, and end those whose peer has vanished.
    """
    async with (
        laid({"postgres": shared_database_url}) as wires,
        Database(wires["postgres"].url, timeout_seconds=7) as db,
        db.transaction() as pooled,
    ):
        single = await db.connect("single")
        connections: list[Any] = [single, pooled]
        for connection in connections:
            sock = connection._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert 7_000 == sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                assert 60 > sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        single.terminate()


async def test_a_refusal_names_the_constraint_and_no_value(db: Database) -> None:
    """
    The error names the constraint but no value: values may be payloads, and errors end up in logs.
    """
    with pytest.raises(StatementRefused) as refusal:
        await submit.submit(db, [new_task(payload='{"card": "4111"}', priority=10)])

    assert "priority" in str(refusal.value)
    assert "4111" not in str(refusal.value)
    assert refusal.value.__cause__ is None


async def test_a_database_that_does_not_exist_is_unavailable(shared_database_url: str) -> None:
    """
    A missing database counts as unavailable, because it may be created soon.
    """
    url = shared_database_url.replace("/test_", "/missing_")
    async with Database(url) as db:
        with pytest.raises(StoreUnavailable):
            await upkeep.probe(db)


async def test_an_argument_that_can_never_be_right_is_no_outage(db: Database) -> None:
    """
    An argument that can never be valid raises its own error, since waiting would not help.
    """
    for wrong in ("\ud800", "\x00", 7):
        with pytest.raises(StatementRefused):
            await db.fetchval("SELECT $1::text", wrong)


async def test_the_store_works_without_prepared_statements(
    shared_database_url: str, db: Database
) -> None:
    """
    The store works behind a pooler in transaction mode, without prepared statements or session
    settings.
    """
    async with Database(shared_database_url, size=2, pooler=True) as pooled:
        done = await a_task(pooled, state=State.COMPLETED, attempt=2)
        await a_task(pooled, state=State.FAILED)

        page = await read.list_tasks(pooled, 1)

        prepared = await pooled.fetchval("SELECT count(*) FROM pg_prepared_statements")
        settings = await pooled.fetchval("SHOW enable_seqscan")
        assert 2 == len(page.tasks)
        assert State.COMPLETED == await state_of(pooled, done.id)
        assert (0, "on") == (prepared, settings)


async def test_an_open_database_may_be_closed_twice(shared_database_url: str) -> None:
    """
    A database may be closed twice, and also if it was never opened.
    """
    db = Database(shared_database_url)
    await db.close()
    async with db:
        await db.fetchval("SELECT 1")
        await db.close()


async def _two_tasks(db: Database) -> list[UUID]:
    new = [new_task(), new_task()]
    await submit.submit(db, new)
    return [task.id for task in new]


async def _deadlocks(db: Database) -> int:
    await db.fetchval("SELECT pg_stat_force_next_flush()")
    count: int = await db.fetchval(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    return count
