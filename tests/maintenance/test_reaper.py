"""
The reaper: tasks of a dead worker run elsewhere, and no live worker loses its tasks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any
from uuid import UUID, uuid4

import pytest

from asyncflow.domain.retry import Backoff
from asyncflow.domain.task import Task
from asyncflow.errors import StoreUnavailable
from asyncflow.maintenance.reaper import Reaper
from asyncflow.store import read as store
from asyncflow.store import steer, workers
from asyncflow.store.database import Database
from asyncflow.store.workers import Registration
from tests.support.postgres import PostgresServer
from tests.support.roles import administrator
from tests.support.tasks import (
    NAME,
    a_registration,
    a_worker,
    claim,
    complete,
    states,
    submit,
    until,
)


@asynccontextmanager
async def a_living_worker(db: Database, **facts: Any) -> AsyncIterator[Registration]:
    """
    A worker that holds its lock for one block.
    """
    worker = await a_worker(db, **facts)
    connection = await db.connect("leases")
    try:
        assert await workers.hold_lock(connection, worker.id)
        yield worker
    finally:
        await connection.close()


async def age_heartbeat(db: Database, worker_id: UUID, seconds: float) -> None:
    """
    Backdate this worker's last heartbeat.
    """
    await db.execute(
        "UPDATE asyncflow.workers SET heartbeat_at = now() - $2 * interval '1 second'"
        " WHERE id = $1",
        worker_id,
        seconds,
    )


async def read(db: Database, task_id: UUID) -> Task:
    """
    A task with its attempts.
    """
    return await store.get(db, 1, task_id)


async def test_a_killed_worker_is_known_by_its_lock(db: Database) -> None:
    """
    A free lock and one or two missed heartbeats are enough: the worker's tasks run again long
    before the lease ends.
    """
    [task_id] = await submit(db)
    async with a_living_worker(db, lease_seconds=3_600) as worker:
        await claim(db, worker.id)
        await age_heartbeat(db, worker.id, 2)
        # The server of this test may have been started just now.
        assert [] == await workers.mark_lost(db, grace_seconds=0)

    [(lost, _)] = await workers.mark_lost(db, grace_seconds=0)
    assert worker.id == lost
    assert 1 == await Reaper(grace_seconds=0).reap(db)

    task = await read(db, task_id)
    assert ("PENDING", 1) == (task.status, task.failures)
    assert "WorkerLost" == (task.failure or {}).get("kind")
    assert {"pending": 1} == await states(db)


async def test_a_worker_cut_off_is_known_by_its_age(db: Database) -> None:
    """
    A worker that was cut off is declared dead at the end of its lease, even if a dead connection
    still holds its lock.
    """
    [task_id] = await submit(db)
    async with a_living_worker(db, lease_seconds=5) as worker:
        await claim(db, worker.id)
        await age_heartbeat(db, worker.id, 6)

        assert 1 == await Reaper(grace_seconds=0).reap(db)

        assert not await workers.heartbeat(db, worker.id)
    assert "PENDING" == (await read(db, task_id)).status


async def test_after_a_restart_of_the_database_free_locks_prove_nothing(
    db: Database, postgres_server: PostgresServer
) -> None:
    """
    A restart of PostgreSQL released every lock, so free locks prove nothing while live workers have
    yet to send heartbeats.
    """
    worker = await a_worker(db, lease_seconds=3_600)
    await submit(db)
    await claim(db, worker.id)
    await age_heartbeat(db, worker.id, 60)
    postgres_server.cluster.stop()
    postgres_server.cluster.start()

    async def reaped_nothing() -> bool:
        return await Reaper(grace_seconds=10).reap(db) == 0

    await until(reaped_nothing)
    assert await workers.heartbeat(db, worker.id)
    assert {"running": 1} == await states(db)


async def test_a_worker_that_was_back_after_a_restart_is_declared_dead_like_any_other(
    db: Database, postgres_server: PostgresServer
) -> None:
    """
    A worker that returned and then died is declared dead while others are still away; otherwise its
    tasks would wait for them.
    """
    worker = await a_worker(db, heartbeat_seconds=0.05, lease_seconds=0.5)
    await submit(db)
    await claim(db, worker.id)
    reaper = Reaper(grace_seconds=3_600)
    postgres_server.cluster.stop()
    postgres_server.cluster.start()

    async def reaped_nothing() -> bool:
        return await reaper.reap(db) == 0

    await until(reaped_nothing)
    assert await workers.heartbeat(db, worker.id)

    async def reaped_it() -> bool:
        return await reaper.reap(db) == 1

    await until(reaped_it)
    assert {"pending": 1} == await states(db)


async def test_a_worker_that_said_goodbye_leaves_nothing_behind(db: Database) -> None:
    """
    Leases that a stopped worker still held are reaped immediately.
    """
    async with a_living_worker(db) as worker:
        await submit(db)
        await claim(db, worker.id)
        await workers.stop(db, worker.id)

        assert 1 == await Reaper(grace_seconds=0).reap(db)


async def test_a_task_that_kills_its_workers_ends_as_failed(db: Database) -> None:
    """
    Each death is a failure, so a poison task runs out of attempts.
    """
    [task_id] = await submit(db, max_attempts=3)
    for _ in range(3):
        await db.execute("UPDATE asyncflow.tasks SET run_at = now()")
        worker = await a_worker(db)
        assert await claim(db, worker.id)
        await workers.stop(db, worker.id)
        assert 1 == await Reaper(grace_seconds=0).reap(db)

    task = await read(db, task_id)
    assert ("FAILED", 3) == (task.status, task.failures)
    assert ["retried", "retried", "failed"] == [attempt.outcome for attempt in task.attempts]


async def test_the_first_death_costs_no_wait(db: Database) -> None:
    """
    After the first death, for which the machine is usually at fault, the task is due again
    immediately.
    """
    worker = await a_worker(db)
    await submit(db)
    await claim(db, worker.id)
    await workers.stop(db, worker.id)
    await Reaper(grace_seconds=0).reap(db)

    heir = await a_worker(db)
    assert 1 == len(await claim(db, heir.id))


class Stubborn(Backoff):
    """
    A backoff written as code, whose fields do not say how long it waits.
    """

    def delay_seconds(self, failures: int, *, random: float) -> float:
        return 9_000.0


@pytest.mark.parametrize(
    ("backoff", "waits"),
    [
        (Backoff(base_seconds=500, jitter=False), (400, 500)),
        (Backoff(base_seconds=Fraction(500), jitter=False), (400, 500)),  # type: ignore[arg-type]
        (Backoff(), (-60, 2)),
        (Stubborn(base_seconds=500), (-60, 2)),
    ],
    ids=["as declared", "a fraction", "default", "not data"],
)
async def test_the_next_deaths_wait_by_the_backoff_of_the_handler(
    db: Database, backoff: Backoff, waits: tuple[float, float]
) -> None:
    """
    Later deaths wait by the handler's backoff: reaper and worker use the same policy, unless it is
    code that only the worker has.
    """
    [task_id] = await submit(db)
    for _ in range(2):
        worker = replace(a_registration(), backoffs={NAME: backoff, "other": Backoff(9, 9, 9)})
        await workers.register(db, worker)
        assert 1 == len(await claim(db, worker.id))
        await workers.stop(db, worker.id)
        assert 1 == await Reaper(grace_seconds=0).reap(db)

    left = await db.fetchval(
        "SELECT extract(epoch FROM run_at - now())::float8 FROM asyncflow.tasks WHERE id = $1",
        task_id,
    )
    shortest, longest = waits
    assert shortest < left <= longest


async def test_a_task_to_be_cancelled_ends_cancelled_when_its_worker_dies(db: Database) -> None:
    """
    A task with a requested cancellation ends cancelled when its worker dies, rather than running
    again just to be cancelled.
    """
    worker = await a_worker(db)
    [task_id] = await submit(db)
    await claim(db, worker.id)
    await steer.cancel(db, 1, task_id)
    await workers.stop(db, worker.id)

    assert 1 == await Reaper(grace_seconds=0).reap(db)

    assert "CANCELLED" == (await read(db, task_id)).status


async def test_the_first_to_settle_wins(db: Database) -> None:
    """
    A worker that was alive after all cannot overwrite what the reaper wrote.
    """
    worker = await a_worker(db)
    [task_id] = await submit(db)
    taken = await claim(db, worker.id)
    await workers.stop(db, worker.id)
    await Reaper(grace_seconds=0).reap(db)

    assert [False] == await complete(db, taken)
    assert "PENDING" == (await read(db, task_id)).status


async def test_many_leases_are_reaped_in_bounded_turns(db: Database) -> None:
    """
    A turn reaps one batch; later turns find the rest.
    """
    worker = await a_worker(db)
    await submit(db, 600)
    await claim(db, worker.id, 600)
    await workers.stop(db, worker.id)

    assert [500, 100, 0] == [await Reaper(grace_seconds=0).reap(db) for _ in range(3)]


async def test_after_an_outage_of_its_own_the_reaper_declares_no_worker_dead(db: Database) -> None:
    """
    After its own outage the reaper declares no worker dead: PostgreSQL's start time proves nothing
    if only sessions died or another server took over.
    """
    worker = await a_worker(db, lease_seconds=5)
    await age_heartbeat(db, worker.id, 6)
    reaper = Reaper(grace_seconds=0.5)
    async with Database("postgresql://nobody@127.0.0.1:1/nowhere") as unreachable:
        with pytest.raises(StoreUnavailable):
            await reaper.reap(unreachable)

    await reaper.reap(db)

    assert await workers.heartbeat(db, worker.id)
    await age_heartbeat(db, worker.id, 6)

    async def gave_it_up() -> bool:
        await reaper.reap(db)
        return bool(await db.fetchval("SELECT lost_at IS NOT NULL FROM asyncflow.workers"))

    await until(gave_it_up)


async def test_a_lease_of_an_unknown_worker_is_released_and_counts_as_no_failure(
    db: Database,
) -> None:
    """
    A lease restored from a backup without its worker is released. After an outage it waits, since
    the worker's row may not have been restored yet.
    """
    [task_id] = await submit(db)
    await claim(db, uuid4())
    reaper = Reaper(grace_seconds=3_600)
    async with Database("postgresql://nobody@127.0.0.1:1/nowhere") as unreachable:
        with pytest.raises(StoreUnavailable):
            await reaper.reap(unreachable)

    assert 0 == await reaper.reap(db)
    assert 1 == await Reaper().reap(db)

    task = await read(db, task_id)
    assert ("PENDING", 0, ["released"]) == (
        task.status,
        task.failures,
        [attempt.outcome for attempt in task.attempts],
    )


async def test_workers_that_a_missing_right_kept_away_get_time_to_come_back(
    db: Database, postgres_server: PostgresServer, database_url: str
) -> None:
    """
    Workers kept away by a missing privilege get time to return, since the reaper was kept away too.
    """
    worker = await a_worker(db, lease_seconds=5)
    async with (
        administrator(postgres_server, database_url) as admin,
        Database(admin.url) as own,
    ):
        reaper = Reaper(grace_seconds=3_600)
        await admin.execute("REVOKE USAGE ON SCHEMA asyncflow FROM {role}")
        with pytest.raises(StoreUnavailable):
            await reaper.reap(own)
        await admin.execute("GRANT USAGE ON SCHEMA asyncflow TO {role}")
        await age_heartbeat(db, worker.id, 6)

        await reaper.reap(own)

    assert await workers.heartbeat(db, worker.id)


async def test_a_worker_that_was_back_after_an_outage_is_declared_dead_like_any_other(
    db: Database,
) -> None:
    """
    After the reaper's own outage, too, only workers that have not yet returned are protected.
    """
    worker = await a_worker(db, heartbeat_seconds=0.05, lease_seconds=0.5)
    reaper = Reaper(grace_seconds=3_600)
    async with Database("postgresql://nobody@127.0.0.1:1/nowhere") as unreachable:
        with pytest.raises(StoreUnavailable):
            await reaper.reap(unreachable)
    assert await workers.heartbeat(db, worker.id)

    async def gave_it_up() -> bool:
        await reaper.reap(db)
        return bool(await db.fetchval("SELECT lost_at IS NOT NULL FROM asyncflow.workers"))

    await until(gave_it_up)
