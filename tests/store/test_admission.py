"""
The relay's queries: which queues are open, which tasks are admissible, which hints were lost.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

import pytest

from asyncflow.domain.states import Event, State
from asyncflow.store import due, hints, queues, workers
from asyncflow.store.database import Database
from tests.support.builders import (
    SETTLEMENTS,
    a_task,
    a_worker,
    as_sent,
    backdate,
    claimed,
    row_of,
    settled,
    state_of,
    submitted,
)


async def test_a_queue_is_open_while_a_live_worker_consumes_it(db: Database) -> None:
    """
    An open queue lists the names and total slots of its live workers, and its queued tasks.
    """
    await a_worker(db, queues=("a", "b"), handlers=("x", "y"), slots=3)
    await a_worker(db, queues=("b",), handlers=("y", "z"), slots=4)
    for state in (State.QUEUED, State.QUEUED, State.PENDING, State.RUNNING):
        await a_task(db, state=state, queue="b")

    facts = [queue[:4] for queue in await hints.open_queues(db)]

    assert [("a", ["x", "y"], 3, 0), ("b", ["x", "y", "z"], 7, 2)] == facts


async def test_the_next_count_begins_before_the_oldest_that_is_queued(db: Database) -> None:
    """
    The next count starts shortly before the oldest queued task, and skips the range known to be
    empty.
    """
    await a_worker(db, queues=("default",))
    old = await a_task(db, state=State.QUEUED)
    await backdate(db, "tasks", old.id, queued_at=100)
    await a_task(db, state=State.QUEUED)

    [first] = await hints.open_queues(db)
    [again] = await hints.open_queues(db, queued_since={"default": first.queued_since})
    later = first.queued_since + timedelta(seconds=50)
    [younger] = await hints.open_queues(db, queued_since={"default": later})

    assert [2, 2, 1] == [first.queued, again.queued, younger.queued]
    assert again.queued_since == first.queued_since
    now = await db.fetchval("SELECT now()")
    assert 100 < (now - first.queued_since).total_seconds() < 130
    assert 0 < (now - younger.queued_since).total_seconds() < 30


async def test_a_count_of_nothing_begins_a_little_earlier_the_next_time(db: Database) -> None:
    """
    After an empty count the next one starts a little in the past, because a mark becomes visible
    later than its timestamp.
    """
    await a_worker(db, queues=("default",))

    [queue] = await hints.open_queues(db)

    now = await db.fetchval("SELECT now()")
    assert 10 <= (now - queue.queued_since).total_seconds() < 30


async def test_a_queue_without_a_live_worker_or_that_is_paused_is_closed(db: Database) -> None:
    """
    A queue is closed if it is paused or has only stopped and lost workers.
    """
    stopped = await a_worker(db, queues=("stopped",))
    await workers.stop(db, stopped.id)
    lost = await a_worker(db, queues=("lost",))
    await backdate(db, "workers", lost.id, heartbeat_at=60)
    await workers.mark_lost(db, grace_seconds=0)
    await a_worker(db, queues=("paused", "open"))
    await queues.pause(db, "paused")

    assert ["open"] == [queue.name for queue in await hints.open_queues(db)]


async def test_tasks_are_admitted_by_priority_and_then_by_due_time(db: Database) -> None:
    """
    The relay sends tasks in the order in which they would be claimed.
    """
    low = await submitted(db, 2, priority=0)
    high = await submitted(db, 2, priority=9)
    await backdate(db, "tasks", low[1], run_at=10)

    found = await due.admissible(db, queue="default", names=["greet"], limit=3)

    assert [(high[0], 0, 9), (high[1], 0, 9), (low[1], 0, 0)] == found


async def test_a_task_that_may_not_go_is_not_admitted(db: Database) -> None:
    """
    A task is not admitted if it is not due, expired, on another queue, not pending, or if no worker
    offers its name.
    """
    await submitted(db, 1, delay_seconds=60)
    await submitted(db, 1, queue="other")
    await submitted(db, 1, name="other")
    (expired,) = await submitted(db, 1)
    await backdate(db, "tasks", expired, expires_at=0)
    for state in State:
        if state is not State.PENDING:
            await a_task(db, state=state)

    assert [] == await due.admissible(db, queue="default", names=["greet"], limit=9)


async def test_admission_waits_for_no_lock(db: Database) -> None:
    """
    Admission may list a task that is being claimed, rather than wait for it; the claim decides.
    """
    ids = await submitted(db, 3)

    async with db.transaction() as other:
        await claimed(other, ids[0])
        async with asyncio.timeout(5):
            found = await due.admissible(db, queue="default", names=["greet"], limit=9)
            await hints.mark_queued(db, found)

    assert [State.RUNNING, State.QUEUED, State.QUEUED] == [await state_of(db, i) for i in ids]


async def test_a_note_never_overtakes_what_happened_meanwhile(db: Database) -> None:
    """
    A mark changes nothing if the task was claimed, finished or cancelled meanwhile, or waits for a
    retry: its hint is used up.
    """
    moved = [
        await a_task(db, state=State.RUNNING),
        await a_task(db, state=State.COMPLETED),
        await a_task(db, state=State.CANCELLED),
        await a_task(db, attempt=1, due_in_seconds=30),
    ]
    before = [await row_of(db, task.id) for task in moved]

    await hints.mark_queued(db, await as_sent(db, [task.id for task in moved]))

    assert before == [await row_of(db, task.id) for task in moved]


async def test_a_note_counts_only_for_the_attempt_that_its_hint_was_for(db: Database) -> None:
    """
    A task that was sent, claimed, failed and is due again has used up its hint, so the old mark
    does not count and another hint must be sent.
    """
    task = await a_task(db)
    sent = await as_sent(db, [task.id])
    for event in (Event.RETRY, Event.RELEASE):
        (claim,) = await claimed(db, task.id)
        await settled(db, task.id, claim.lease_id, SETTLEMENTS[event])

        await hints.mark_queued(db, sent)

        assert State.PENDING == await state_of(db, task.id)
        sent = await as_sent(db, [task.id])

    await hints.mark_queued(db, sent)

    assert State.QUEUED == await state_of(db, task.id)


async def test_notes_and_claims_that_race_leave_no_task_behind(db: Database) -> None:
    """
    Each task is claimed exactly once, whether its hint or its mark comes first.
    """
    ids = await submitted(db, 600)
    batches = [ids[i : i + 20] for i in range(0, len(ids), 20)]
    sent = [await as_sent(db, batch) for batch in batches]

    async def relay() -> None:
        for batch in sent:
            await hints.mark_queued(db, batch)

    async def worker() -> list[UUID]:
        return [c.task_id for batch in batches for c in await claimed(db, *batch)]

    (_, _, one, two) = await asyncio.gather(relay(), relay(), worker(), worker())

    assert sorted(ids) == sorted([*one, *two])
    states = await db.fetch("SELECT DISTINCT state FROM asyncflow.tasks")
    assert ["running"] == [row["state"] for row in states]


async def test_a_worker_declines_only_what_it_does_not_offer(db: Database) -> None:
    """
    A declined task is due again after the delay, without a failure; tasks that the worker offers
    stay queued.
    """
    unknown = await a_task(db, state=State.QUEUED, name="other")
    known = await a_task(db, state=State.QUEUED)

    await hints.decline(db, [known.id, unknown.id], names=["greet"], delay_seconds=5.0)

    row = await row_of(db, unknown.id)
    now = await db.fetchval("SELECT now()")
    assert (State.PENDING, None, 0, 0) == (
        row["state"],
        row["queued_at"],
        row["attempt"],
        row["failures"],
    )
    assert 4 < (row["run_at"] - now).total_seconds() <= 5
    assert State.QUEUED == await state_of(db, known.id)


async def test_a_task_may_be_declined_before_the_note_that_its_hint_was_sent(
    db: Database,
) -> None:
    """
    A mark that comes after the decline does not make the task wait for a hint that is used up.
    """
    task = await a_task(db, name="other")
    sent = await as_sent(db, [task.id])

    await hints.decline(db, [task.id], names=["greet"], delay_seconds=5.0)
    await hints.mark_queued(db, sent)

    row = await row_of(db, task.id)
    now = await db.fetchval("SELECT now()")
    assert State.PENDING == row["state"]
    assert 4 < (row["run_at"] - now).total_seconds() <= 5


async def test_a_task_that_waits_for_a_retry_is_not_hurried_by_a_worker_that_declines_it(
    db: Database,
) -> None:
    """
    Declining an old hint does not change when the retry is due.
    """
    task = await a_task(db, name="other", attempt=1, due_in_seconds=30)
    before = await row_of(db, task.id)

    await hints.decline(db, [task.id], names=["greet"], delay_seconds=5.0)

    assert before == await row_of(db, task.id)


@pytest.mark.parametrize(
    ("ready", "limit", "expected"),
    [(0, 9, 4), (1, 9, 4), (2, 9, 3), (4, 9, 1), (5, 9, 0), (99, 9, 0), (0, 3, 3)],
)
async def test_a_queued_task_is_lost_only_beyond_what_rabbitmq_still_holds(
    db: Database, ready: int, limit: int, expected: int
) -> None:
    """
    Of five queued tasks, one of them young, as many stay as there are messages, and the oldest
    count as lost first. Otherwise the messages of young tasks would hide the loss of old ones.
    """
    old = [await a_task(db, state=State.QUEUED) for _ in range(4)]
    for age, task in enumerate(reversed(old), start=31):
        await backdate(db, "tasks", task.id, queued_at=age)
    young = await a_task(db, state=State.QUEUED)
    elsewhere = await a_task(db, state=State.QUEUED, queue="other")
    await backdate(db, "tasks", elsewhere.id, queued_at=99)

    count = await hints.unqueue_lost(
        db, queue="default", older_than_seconds=30, ready=ready, limit=limit
    )

    states = [await state_of(db, task.id) for task in old]
    assert expected == count
    assert [State.PENDING] * expected + [State.QUEUED] * (4 - expected) == states
    assert [State.QUEUED] * 2 == [await state_of(db, t.id) for t in (young, elsewhere)]


async def test_a_task_that_was_queued_once_can_be_admitted_again(db: Database) -> None:
    """
    A task can be admitted again after a lost hint, a retry and a release.
    """
    lost = await a_task(db, state=State.QUEUED)
    await hints.unqueue_lost(db, queue="default", older_than_seconds=0, ready=0, limit=1)
    released = await a_task(db, state=State.QUEUED)
    (claim,) = await claimed(db, released.id)
    await settled(db, released.id, claim.lease_id, SETTLEMENTS[Event.RELEASE])
    retried = await a_task(db, state=State.QUEUED)
    (claim,) = await claimed(db, retried.id)
    await settled(db, retried.id, claim.lease_id, SETTLEMENTS[Event.RETRY])

    found = await due.admissible(db, queue="default", names=["greet"], limit=9)

    assert {lost.id, released.id, retried.id} == {task_id for task_id, *_ in found}
