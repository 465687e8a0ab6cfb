"""
A lost lease settles nothing, whatever happened to the task since.
"""

from __future__ import annotations

from itertools import product
from uuid import UUID, uuid4

import pytest

from asyncflow.domain.states import Event, State
from asyncflow.store import claims, hints, read, settle, steer, upkeep, workers
from asyncflow.store.database import Database
from asyncflow.store.settle import Settling
from tests.support.builders import (
    SETTLEMENTS,
    a_task,
    a_worker,
    as_sent,
    claimed,
    row_of,
    settled,
    state_of,
)


@pytest.mark.parametrize(("state", "event"), list(product(State, SETTLEMENTS)))
async def test_a_lease_that_was_lost_settles_nothing_in_any_state(
    db: Database, state: State, event: Event
) -> None:
    """
    A lost lease settles nothing, whatever state the task has reached through another claim.
    """
    task = await a_task(db)
    (stale,) = await claimed(db, task.id)
    await settled(db, task.id, stale.lease_id, SETTLEMENTS[Event.RELEASE])
    await _move_on(db, task.id, state)
    before = await row_of(db, task.id)

    written = await settled(db, task.id, stale.lease_id, SETTLEMENTS[event])

    assert not written
    assert before == await row_of(db, task.id)


@pytest.mark.parametrize("event", SETTLEMENTS)
async def test_a_lease_settles_only_once(db: Database, event: Event) -> None:
    """
    Repeating a settlement whose answer was lost changes nothing further.
    """
    task = await a_task(db, state=State.RUNNING)
    assert task.lease_id
    first = await settled(db, task.id, task.lease_id, SETTLEMENTS[event])
    before = await read.get(db, 1, task.id)

    again = [await settled(db, task.id, task.lease_id, s) for s in SETTLEMENTS.values()]

    assert first
    assert not any(again)
    assert before.attempts == (await read.get(db, 1, task.id)).attempts


@pytest.mark.parametrize("event", SETTLEMENTS)
async def test_a_record_tells_what_was_written_under_a_lease_and_nothing_else(
    db: Database, event: Event
) -> None:
    """
    A caller that repeats a settlement learns whether it was written, whatever happened to the task
    since.
    """
    task = await a_task(db, state=State.RUNNING)
    assert task.lease_id
    before = await recorded(db, task.id, task.lease_id)
    assert await settled(db, task.id, task.lease_id, SETTLEMENTS[event])
    after = await recorded(db, task.id, task.lease_id)
    if event in (Event.FAIL, Event.CANCEL):
        await steer.redrive(db, 1, task.id)
    if event is not Event.COMPLETE:
        await db.execute("UPDATE asyncflow.tasks SET run_at = now()")
        await claimed(db, task.id)

    assert set() == before
    assert {event} == after
    assert {event} == await recorded(db, task.id, task.lease_id)
    assert set() == await recorded(db, task.id, uuid4())


async def recorded(db: Database, task_id: UUID, lease_id: UUID) -> set[Event]:
    """
    The settlements confirmed by the record.
    """
    told = await settle.recorded(db, [Settling(task_id, lease_id, s) for s in SETTLEMENTS.values()])
    return {event for event, is_so in zip(SETTLEMENTS, told, strict=True) if is_so}


async def test_a_stale_worker_cannot_settle_a_task_that_it_claimed_again(db: Database) -> None:
    """
    The fence is the lease, not the worker: an older claim of the same worker is void too.
    """
    worker_id = uuid4()
    task = await a_task(db)
    (stale,) = await claimed(db, task.id, worker_id=worker_id)
    await settled(db, task.id, stale.lease_id, SETTLEMENTS[Event.RELEASE])
    (fresh,) = await claimed(db, task.id, worker_id=worker_id)

    # Both in one batch, as one worker would send them.
    written = await settle.settle(
        db,
        [
            Settling(task.id, stale.lease_id, SETTLEMENTS[Event.COMPLETE]),
            Settling(task.id, fresh.lease_id, SETTLEMENTS[Event.COMPLETE]),
        ],
    )

    assert [False, True] == written


async def test_a_stale_worker_cannot_report_progress(db: Database) -> None:
    """
    A stale worker's progress report on a task that another worker runs is not shown.
    """
    task = await a_task(db)
    (stale,) = await claimed(db, task.id)
    await settled(db, task.id, stale.lease_id, SETTLEMENTS[Event.RELEASE])
    (fresh,) = await claimed(db, task.id)
    await claims.record_progress(db, [(task.id, fresh.lease_id, '{"done": 1}')])

    await claims.record_progress(db, [(task.id, stale.lease_id, '{"done": 9}')])

    assert {"done": 1} == (await read.get(db, 1, task.id)).progress


async def test_the_reaper_cannot_take_a_task_that_was_claimed_after_it_looked(
    db: Database,
) -> None:
    """
    The reaper's list of lost leases may be outdated when it settles them; the fence protects the
    new claim.
    """
    worker = await a_worker(db)
    task = await a_task(db, state=State.RUNNING, worker_id=worker.id)
    await workers.stop(db, worker.id)
    (lost,) = await upkeep.lost_leases(db, limit=10)
    await settled(db, task.id, lost.lease_id, SETTLEMENTS[Event.RELEASE])
    (fresh,) = await claimed(db, task.id)

    taken = await settled(db, lost.task_id, lost.lease_id, SETTLEMENTS[Event.RETRY])

    assert not taken
    assert fresh.lease_id == (await row_of(db, task.id))["lease_id"]


async def test_a_worker_whose_lease_was_reaped_cannot_settle(db: Database) -> None:
    """
    A worker that wakes up after the reaper settled its lease learns that its result is void.
    """
    task = await a_task(db, state=State.RUNNING)
    (lost,) = await upkeep.lost_leases(db, limit=10)
    assert await settled(db, lost.task_id, lost.lease_id, SETTLEMENTS[Event.RETRY])
    assert task.lease_id

    written = await settled(db, task.id, task.lease_id, SETTLEMENTS[Event.COMPLETE])

    assert not written
    assert State.PENDING == await state_of(db, task.id)


async def test_a_batch_settles_each_attempt_by_its_own_lease(db: Database) -> None:
    """
    Answers come in the given order, and a stale entry affects no other.
    """
    events = [*SETTLEMENTS, *SETTLEMENTS]
    running = [await a_task(db, state=State.RUNNING) for _ in events]
    stale = {1, 4, 8}

    written = await settle.settle(
        db,
        [
            Settling(task.id, uuid4() if i in stale else task.lease_id, SETTLEMENTS[event])  # type: ignore[arg-type]
            for i, (task, event) in reversed(list(enumerate(zip(running, events, strict=True))))
        ],
    )

    assert [i not in stale for i in range(len(events))] == written[::-1]


async def _move_on(db: Database, task_id: UUID, state: State) -> None:
    if state is State.PENDING:
        return
    if state is State.QUEUED:
        return await hints.mark_queued(db, await as_sent(db, [task_id]))
    (fresh,) = await claimed(db, task_id)
    ends = {
        State.COMPLETED: Event.COMPLETE,
        State.FAILED: Event.FAIL,
        State.CANCELLED: Event.CANCEL,
    }
    if state in ends:
        await settled(db, task_id, fresh.lease_id, SETTLEMENTS[ends[state]])
