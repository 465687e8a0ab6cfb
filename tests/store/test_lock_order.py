"""
Bulk statements that meet the same rows in opposite orders never deadlock.

Every statement that moves tasks runs concurrently over a few dozen of them, each batch in its own
order. `Database` would retry a deadlock and hide it, so the test checks PostgreSQL's deadlock
counter.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from uuid import UUID, uuid4

from asyncflow.domain.states import Event
from asyncflow.domain.task import Claim
from asyncflow.errors import IllegalTransition
from asyncflow.store import claims, hints, settle, steer, submit, upkeep, workers
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.store.settle import Settling
from tests.support.builders import SETTLEMENTS, as_sent, backdate, new_task

ROUNDS = 300
TASKS = 48
NAMES = ("a", "b", "c")
QUEUE = "default"
OFFERS = [Offer(name, 1_000, 60.0) for name in NAMES]

Act = Callable[[Database, list[UUID]], Awaitable[object]]


async def test_no_two_bulk_statements_deadlock(fresh_db: Database) -> None:
    """
    Thousands of statements by claims, settles, the relay, cancellations, the reaper and expiry
    cause no deadlock.
    """
    random.seed(7)
    ids = await _new_tasks(fresh_db, TASKS)
    acts: list[Act] = [
        _claim_and_settle,
        _claim_and_settle,
        _claim_due_and_settle,
        _relay,
        _relay,
        _reap,
        _reap,
        _decline,
        _cancel_and_redrive,
        _expire,
        _report_progress,
    ]

    await asyncio.gather(*(_many_times(act, fresh_db, ids) for act in acts))

    await fresh_db.fetchval("SELECT pg_stat_force_next_flush()")
    assert 0 == await fresh_db.fetchval(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    # Tasks moved, and nothing is stuck: whatever still runs can be settled.
    assert TASKS * 10 < await fresh_db.fetchval("SELECT sum(attempt) FROM asyncflow.tasks")
    await _reap(fresh_db, ids)
    assert [] == await upkeep.lost_leases(fresh_db, limit=TASKS)


async def _many_times(act: Act, db: Database, ids: list[UUID]) -> None:
    for _ in range(ROUNDS):
        await act(db, random.sample(ids, len(ids)))


async def _claim_and_settle(db: Database, ids: list[UUID]) -> None:
    found = await claims.claim_hinted(
        db,
        ids,
        lease_id=uuid4(),
        worker_id=uuid4(),
        offers=random.sample(OFFERS, len(OFFERS)),
    )
    await _settle(db, found)


async def _claim_due_and_settle(db: Database, ids: list[UUID]) -> None:
    found = await claims.claim_due(
        db,
        lease_id=uuid4(),
        worker_id=uuid4(),
        offers=OFFERS,
        queues=[QUEUE],
        limit=TASKS,
    )
    await _settle(db, found)


async def _settle(db: Database, found: list[Claim]) -> None:
    events = [Event.RETRY, Event.RETRY, Event.RELEASE, Event.FAIL]
    settlings = [
        Settling(claim.task_id, claim.lease_id, SETTLEMENTS[random.choice(events)])
        for claim in random.sample(found, len(found))
    ]
    await settle.settle(db, settlings)


async def _relay(db: Database, ids: list[UUID]) -> None:
    await hints.mark_queued(db, await as_sent(db, ids))
    await hints.unqueue_lost(db, queue=QUEUE, older_than_seconds=0, ready=0, limit=5)


async def _reap(db: Database, ids: list[UUID]) -> None:
    lost = await upkeep.lost_leases(db, limit=TASKS)
    retry = SETTLEMENTS[Event.RETRY]
    await settle.settle(db, [Settling(one.task_id, one.lease_id, retry) for one in lost[::-1]])


async def _decline(db: Database, ids: list[UUID]) -> None:
    await hints.decline(db, ids, names=["a"], delay_seconds=0)


async def _cancel_and_redrive(db: Database, ids: list[UUID]) -> None:
    for task_id in ids[:3]:
        for change in (steer.cancel, steer.redrive):
            try:
                await change(db, 1, task_id)
            except IllegalTransition:
                pass
    # Tasks that failed on their own are redriven too.
    for task_id in ids[3:9]:
        try:
            await steer.redrive(db, 1, task_id)
        except IllegalTransition:
            pass


async def _expire(db: Database, ids: list[UUID]) -> None:
    await upkeep.expire(db, limit=5)
    await backdate(db, "tasks", ids[0], expires_at=0)
    await workers.mark_lost(db, grace_seconds=0)


async def _report_progress(db: Database, ids: list[UUID]) -> None:
    rows = await db.fetch("SELECT id, lease_id FROM asyncflow.tasks WHERE state = 'running'")
    if rows:
        await claims.record_progress(db, [(r["id"], r["lease_id"], '{"at": 1}') for r in rows])


async def _new_tasks(db: Database, count: int) -> list[UUID]:
    new = [new_task(name=random.choice(NAMES)) for _ in range(count)]
    await submit.submit(db, new)
    return [task.id for task in new]
