"""
Workers are alive while they send heartbeats, and lost when they are silent or their lock is free.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import asyncpg
import pytest

from asyncflow.domain.retry import Backoff
from asyncflow.domain.states import State
from asyncflow.store import upkeep, workers
from asyncflow.store.database import Database
from asyncflow.store.workers import Held, Published, lock_key
from tests.support.builders import a_task, a_worker, backdate

LEASE_SECONDS = 15.0
# Longer than two heartbeats and half a second, well within the lease.
OVERDUE = 5.0


@pytest.fixture
async def session(db: Database) -> AsyncIterator[asyncpg.Connection]:
    """
    The connection on which a worker would hold its lock.
    """
    connection = await db.connect("worker")
    yield connection
    connection.terminate()


async def lost(db: Database, *, grace_seconds: float = 0, **outage: float) -> list[object]:
    """
    The workers that the reaper declares lost now, as if PostgreSQL had been up for long.
    """
    marked = await workers.mark_lost(db, grace_seconds=grace_seconds, **outage)
    return [worker_id for worker_id, _ in marked]


async def test_a_worker_that_just_registered_is_alive(db: Database) -> None:
    """
    A worker that just registered is alive, although it has not yet taken its lock or sent a
    heartbeat.
    """
    worker = await a_worker(db)

    assert [] == await lost(db)
    assert await workers.heartbeat(db, worker.id)


async def test_a_silent_worker_is_lost_when_its_lease_ends(
    db: Database, session: asyncpg.Connection
) -> None:
    """
    A silent worker is lost at the end of its lease even if it holds its lock: it may be frozen or
    cut off.
    """
    worker = await a_worker(db, lease_seconds=LEASE_SECONDS)
    await workers.hold_lock(session, worker.id)
    await backdate(db, "workers", worker.id, heartbeat_at=LEASE_SECONDS + 1)

    assert [(worker.id, worker.name)] == await workers.mark_lost(db, grace_seconds=0)


async def test_an_overdue_worker_is_alive_while_it_holds_its_lock(
    db: Database, session: asyncpg.Connection
) -> None:
    """
    A worker that holds its lock is alive, since a late heartbeat alone does not prove death.
    """
    worker = await a_worker(db, lease_seconds=LEASE_SECONDS)
    assert await workers.hold_lock(session, worker.id)
    await backdate(db, "workers", worker.id, heartbeat_at=OVERDUE)

    assert [] == await lost(db)


async def test_an_overdue_worker_is_lost_once_its_lock_is_free(
    db: Database, session: asyncpg.Connection
) -> None:
    """
    A free lock shows that the connection of an overdue worker is closed, so it is declared lost
    long before its lease ends.
    """
    worker = await a_worker(db, lease_seconds=LEASE_SECONDS)
    await workers.hold_lock(session, worker.id)
    await backdate(db, "workers", worker.id, heartbeat_at=OVERDUE)
    await session.close()

    assert [worker.id] == await lost(db)


async def test_a_free_lock_alone_is_no_death(db: Database) -> None:
    """
    A worker with a free lock is alive while heartbeats arrive: its lock connection may just be
    reconnecting.
    """
    worker = await a_worker(db)
    await backdate(db, "workers", worker.id, heartbeat_at=1.5)

    assert [] == await lost(db)


async def test_behind_a_pooler_only_the_heartbeat_tells_that_a_worker_lives(db: Database) -> None:
    """
    Behind a pooler no worker holds a lock, so a free one proves nothing; the lease still expires.
    """
    worker = await a_worker(db, holds_lock=False, lease_seconds=LEASE_SECONDS)
    await backdate(db, "workers", worker.id, heartbeat_at=OVERDUE)
    overdue = await lost(db)
    await backdate(db, "workers", worker.id, heartbeat_at=LEASE_SECONDS + 1)

    assert [] == overdue
    assert [worker.id] == await lost(db)


@pytest.mark.parametrize("silent_seconds", [OVERDUE, LEASE_SECONDS + 1])
async def test_no_worker_is_lost_right_after_an_outage(db: Database, silent_seconds: float) -> None:
    """
    After an outage, in which no worker could send heartbeats or keep its lock, workers get time to
    return.
    """
    worker = await a_worker(db, lease_seconds=LEASE_SECONDS)
    await backdate(db, "workers", worker.id, heartbeat_at=silent_seconds)

    assert [] == await lost(db, grace_seconds=10**6, outage_seconds_ago=0)
    assert [worker.id] == await lost(db)


async def test_no_heartbeat_revives_a_lost_worker(db: Database) -> None:
    """
    A lost worker cannot return by a heartbeat or by registering again, since its leases were given
    away.
    """
    worker = await a_worker(db)
    await backdate(db, "workers", worker.id, heartbeat_at=LEASE_SECONDS + 1)
    await lost(db)

    assert not await workers.heartbeat(db, worker.id)
    await workers.register(db, worker)
    assert not await workers.heartbeat(db, worker.id)
    assert [] == await lost(db)


async def test_a_heartbeat_keeps_a_worker_alive(db: Database) -> None:
    """
    A heartbeat counts, however late, until the worker is declared lost.
    """
    worker = await a_worker(db)
    await backdate(db, "workers", worker.id, heartbeat_at=LEASE_SECONDS + 1)

    assert await workers.heartbeat(db, worker.id)
    assert [] == await lost(db)


async def test_a_stopped_or_unknown_worker_has_no_heartbeat(db: Database) -> None:
    """
    The heartbeat of a worker that signed off, or whose row was pruned, is refused.
    """
    worker = await a_worker(db)
    await workers.stop(db, worker.id)

    assert not await workers.heartbeat(db, worker.id)
    assert not await workers.heartbeat(db, uuid4())


async def test_registering_twice_is_one_worker(db: Database) -> None:
    """
    Registering again after a lost answer does not create a second worker.
    """
    worker = await a_worker(db)
    await workers.register(db, worker)

    assert 1 == await db.fetchval("SELECT count(*) FROM asyncflow.workers")


async def test_a_worker_gets_its_lock_only_once(db: Database, session: asyncpg.Connection) -> None:
    """
    A worker's lock can be taken only once, so a second process with the same id is detected.
    """
    worker = await a_worker(db)

    assert await workers.hold_lock(session, worker.id)
    assert not await workers.hold_lock(db, worker.id)
    assert 0 < lock_key(worker.id) < 2**62


async def test_a_worker_is_told_of_old_leases_and_of_requested_cancellations(
    db: Database,
) -> None:
    """
    A heartbeat lists leases old enough to be known to the worker, and all requested cancellations:
    the answer to a young claim may still be in flight.
    """
    worker = await a_worker(db)
    old = await a_task(db, state=State.RUNNING, worker_id=worker.id)
    await backdate(db, "tasks", old.id, started_at=30)
    await a_task(db, state=State.RUNNING, worker_id=worker.id)
    unwanted = await a_task(db, state=State.RUNNING, worker_id=worker.id, cancel_requested=True)
    await a_task(db, state=State.RUNNING, cancel_requested=True)
    await a_task(db, state=State.COMPLETED, worker_id=worker.id)

    found = await workers.held(db, worker.id, older_than_seconds=20)

    assert {
        Held(old.id, old.lease_id, False),  # type: ignore[arg-type]
        Held(unwanted.id, unwanted.lease_id, True),  # type: ignore[arg-type]
    } == set(found)


async def test_the_leases_of_workers_that_are_gone_are_lost(db: Database) -> None:
    """
    Leases of stopped, lost or unknown workers are lost; those of a live worker are kept.
    """
    alive, stopped, silent = [await a_worker(db) for _ in range(3)]
    kept = await a_task(db, state=State.RUNNING, worker_id=alive.id)
    gone = [
        await a_task(db, state=State.RUNNING, worker_id=stopped.id),
        await a_task(db, state=State.RUNNING, worker_id=silent.id, cancel_requested=True),
        await a_task(db, state=State.RUNNING),
    ]
    await workers.stop(db, stopped.id)
    await backdate(db, "workers", silent.id, heartbeat_at=LEASE_SECONDS + 1)
    await lost(db)

    found = {lease.task_id: lease for lease in await upkeep.lost_leases(db, limit=9)}

    assert {task.id for task in gone} == set(found)
    assert kept.id not in found
    for task in gone:
        lease = found[task.id]
        assert (task.lease_id, task.worker_id, 0, 5) == (
            lease.lease_id,
            lease.worker_id,
            lease.failures,
            lease.max_attempts,
        )
        assert (task is gone[1]) == lease.cancel_requested
    assert 2 == len(await upkeep.lost_leases(db, limit=2))


async def test_a_backoff_of_a_newer_version_is_read_as_far_as_it_is_known(db: Database) -> None:
    """
    Unknown fields of a backoff are ignored; an unreadable lease would stop the reaper for all
    others.
    """
    worker = await a_worker(db)
    await a_task(db, state=State.RUNNING, worker_id=worker.id)
    await workers.stop(db, worker.id)
    await db.execute(
        "UPDATE asyncflow.workers SET backoffs = $1::text::json",
        '{"greet": {"base_seconds": 7, "shape": "round"}}',
    )

    [lease] = await upkeep.lost_leases(db, limit=9)

    assert Backoff(base_seconds=7) == lease.backoff


async def test_a_backoff_that_this_version_refuses_does_not_stop_the_reaper(db: Database) -> None:
    """
    The default serves instead.
    """
    worker = await a_worker(db)
    await a_task(db, state=State.RUNNING, worker_id=worker.id)
    await workers.stop(db, worker.id)
    await db.execute(
        "UPDATE asyncflow.workers SET backoffs = $1::text::json",
        '{"greet": {"base_seconds": 7e9, "cap_seconds": 8e9}}',
    )

    [lease] = await upkeep.lost_leases(db, limit=9)

    assert Backoff() == lease.backoff


async def test_workers_that_ended_long_ago_are_forgotten(db: Database) -> None:
    """
    Workers are deleted a day after their end; live ones never are.
    """
    alive, stopped, recent = [await a_worker(db) for _ in range(3)]
    await backdate(db, "workers", alive.id, started_at=10**6)
    await backdate(db, "workers", stopped.id, stopped_at=86_500)
    await backdate(db, "workers", recent.id, stopped_at=86_300)

    await workers.prune(db)

    rows = await db.fetch("SELECT id FROM asyncflow.workers")
    assert {alive.id, recent.id} == {row["id"] for row in rows}


async def test_the_newest_word_on_a_handler_counts(db: Database) -> None:
    """
    The latest publication of a handler counts, since a deployment may change its queue or payload.
    """
    await workers.publish_handlers(db, [Published("a", "x", {}), Published("b", "x", {})])

    await workers.publish_handlers(db, [Published("a", "x", {"type": "object"})])

    found = await workers.published_handlers(db)
    assert [Published("a", "x", {"type": "object"}), Published("b", "x", {})] == found


async def test_a_handler_is_live_on_a_queue_while_a_worker_lives_that_declares_it_so(
    db: Database,
) -> None:
    """
    A handler is live on each queue for which a live worker declares it: two services may declare
    one name, and a deployment may change its queue.
    """
    old = await a_worker(db, handlers=("a", "b"), handler_queues=("x", "y"), queues=("x", "y", "z"))
    await workers.publish_handlers(db, [Published("a", "x", {}), Published("b", "y", {})])
    await a_worker(db, handlers=("b", "a"), handler_queues=("y", "z"), queues=("x", "y", "z"))
    await workers.publish_handlers(db, [Published("a", "z", {}), Published("b", "y", {})])

    both = await workers.published_handlers(db)
    await workers.stop(db, old.id)
    later = await workers.published_handlers(db)

    def live(found: list[Published]) -> set[tuple[str, str]]:
        return {(handler.name, handler.queue) for handler in found if handler.is_live}

    assert {("a", "x"), ("a", "z"), ("b", "y")} == live(both)
    assert {("a", "z"), ("b", "y")} == live(later)
    assert ("a", "z") == later[0][:2]


async def test_a_queue_that_a_handler_has_left_is_forgotten(db: Database) -> None:
    """
    A queue is forgotten a day after its last worker; the latest publication of a name is kept.
    """
    await a_worker(db, handlers=("b",), handler_queues=("old",))
    for queue in ("old", "new"):
        await workers.publish_handlers(db, [Published("a", queue, {}), Published("b", queue, {})])
    await workers.publish_handlers(db, [Published("c", "old", {})])
    await db.execute(
        "UPDATE asyncflow.publications SET updated_at = updated_at - interval '25 hours'"
    )

    await workers.prune(db)

    found = {(handler.name, handler.queue) for handler in await workers.published_handlers(db)}
    assert {("a", "new"), ("b", "old"), ("b", "new"), ("c", "old")} == found
