"""
Claiming without a broker: due tasks, in the right order, once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from uuid import UUID, uuid4

import pytest

from asyncflow.domain.states import Event, State
from asyncflow.store import queues, read, submit
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from tests.support.builders import (
    OFFERS,
    PAYLOAD,
    SETTLEMENTS,
    a_task,
    backdate,
    claimed_due,
    new_task,
    row_of,
    settled,
    state_of,
    submitted,
)


async def claimed_one_by_one(db: Database, **changes: object) -> list[UUID]:
    """
    The ids of all claimable tasks, in the order in which single slots would get them.
    """
    ids = []
    while found := await claimed_due(db, 1, **changes):
        ids.append(found[0].task_id)
    return ids


async def test_a_claim_carries_all_that_an_attempt_needs(db: Database) -> None:
    """
    The claim and the row agree: running, under this lease, for this worker.
    """
    lease_id, worker_id = uuid4(), uuid4()
    (task_id,) = await submitted(db, 1, max_attempts=3)

    (claim,) = await claimed_due(db, lease_id=lease_id, worker_id=worker_id)

    row = await row_of(db, task_id)
    assert (task_id, lease_id, 1, "greet", "default", 1, 0, 3, 900.0, PAYLOAD) == (
        claim.task_id,
        claim.lease_id,
        claim.tenant_id,
        claim.name,
        claim.queue,
        claim.attempt,
        claim.failures,
        claim.max_attempts,
        claim.timeout_seconds,
        claim.payload,
    )
    assert ("running", lease_id, worker_id, 1, claim.claimed_at) == (
        row["state"],
        row["lease_id"],
        row["worker_id"],
        row["attempt"],
        row["started_at"],
    )


async def test_the_handlers_policy_fills_in_what_the_task_left_open(db: Database) -> None:
    """
    The task's own numbers win over the policy's, and the numbers of the first claim stay.
    """
    await submitted(db, 1, max_attempts=2, timeout_seconds=1.5)
    await submitted(db, 1)

    own, opened = await claimed_due(db, 2)
    await settled(db, opened.task_id, opened.lease_id, SETTLEMENTS[Event.RELEASE])
    (again,) = await claimed_due(db, 2, offers=[Offer("greet", 99, 99.0)])

    assert {(2, 1.5), (5, 900.0)} == {(c.max_attempts, c.timeout_seconds) for c in (own, opened)}
    assert (5, 900.0) == (again.max_attempts, again.timeout_seconds)


async def test_higher_priority_goes_first_across_queues(db: Database) -> None:
    """
    The order of queues matters only within one priority.
    """
    expected = []
    for priority in range(10):
        for queue in ("b", "a"):
            expected += await submitted(db, 1, queue=queue, priority=priority)

    assert expected[::-1] == await claimed_one_by_one(db, queues=("a", "b"))


async def test_within_one_priority_the_longest_due_goes_first(db: Database) -> None:
    """
    Tasks are ordered by `run_at`, then by submission.
    """
    first, second, third, fourth = await submitted(db, 4)
    await backdate(db, "tasks", fourth, run_at=100)
    await backdate(db, "tasks", second, run_at=50)

    assert [fourth, second, first, third] == await claimed_one_by_one(db)


async def test_a_batch_takes_what_single_claims_would_have_taken(db: Database) -> None:
    """
    The limit cuts by priority over all queues, not queue by queue.
    """
    low = await submitted(db, 5, queue="a", priority=1)
    high = await submitted(db, 3, queue="b", priority=8)

    found = await claimed_due(db, 4, queues=("a", "b"))

    assert {*high, low[0]} == {claim.task_id for claim in found}


async def test_queues_take_turns_in_the_order_given(db: Database) -> None:
    """
    Within one priority, the caller's rotation decides.
    """
    a, b = await submitted(db, 2, queue="a"), await submitted(db, 2, queue="b")

    assert [*b, *a] == await claimed_one_by_one(db, queues=("b", "a"))


async def test_a_task_that_is_not_due_is_never_claimed(db: Database) -> None:
    """
    A task is not claimed if it is not due, has expired, is on another queue, or has a name that is
    not offered.
    """
    await submitted(db, 2, delay_seconds=60)
    await submitted(db, 1, queue="other")
    await submitted(db, 1, name="other")
    (expired,) = await submitted(db, 1)
    await backdate(db, "tasks", expired, expires_at=0)
    await a_task(db, attempt=1, due_in_seconds=60)

    assert [] == await claimed_due(db, 100)


@pytest.mark.parametrize("state", [s for s in State if s is not State.PENDING])
async def test_only_pending_tasks_are_claimed_as_due(db: Database, state: State) -> None:
    """
    A queued task belongs to its hint, a running one to its worker.
    """
    await a_task(db, state=state)

    assert [] == await claimed_due(db, 10)


async def test_a_paused_queue_starts_nothing_until_it_is_resumed(db: Database) -> None:
    """
    A paused queue starts nothing until it is resumed, and does not hold up other queues.
    """
    (held,) = await submitted(db, 1, queue="a", priority=9)
    (other,) = await submitted(db, 1, queue="b")
    await queues.pause(db, "a")

    while_paused = await claimed_one_by_one(db, queues=("a", "b"))
    await queues.resume(db, "a")

    assert [other] == while_paused
    assert [held] == await claimed_one_by_one(db, queues=("a", "b"))


async def test_a_queue_that_was_never_paused_can_be_resumed(db: Database) -> None:
    """
    Resuming a queue that was never paused is allowed; pausing twice keeps the first time.
    """
    await queues.resume(db, "a")
    await queues.pause(db, "a")
    first = await db.fetchval("SELECT paused_at FROM asyncflow.queues")
    await queues.pause(db, "a")

    assert first == await db.fetchval("SELECT paused_at FROM asyncflow.queues")


async def test_concurrent_claimers_never_take_a_task_twice(db: Database) -> None:
    """
    Four concurrent claimers take thousands of tasks in batches of odd sizes, each task once.
    """
    ids: list[UUID] = []
    for priority in (1, 4, 9):
        ids += await submitted(db, 1_200, priority=priority)

    async def claimer(limit: int) -> list[UUID]:
        mine: list[UUID] = []
        while found := await claimed_due(db, limit):
            mine += [claim.task_id for claim in found]
        return mine

    taken = await asyncio.gather(*(claimer(limit) for limit in (7, 10, 33, 100)))

    counts = Counter(task_id for mine in taken for task_id in mine)
    assert dict.fromkeys(ids, 1) == counts
    assert 2 <= sum(1 for mine in taken if mine)
    rows = await db.fetch("SELECT DISTINCT attempt FROM asyncflow.tasks")
    assert [1] == [row["attempt"] for row in rows]


async def test_a_claimer_steps_over_rows_that_another_one_holds(db: Database) -> None:
    """
    A claimer takes the next rows without waiting for locked ones.
    """
    ids = await submitted(db, 4)

    async with db.transaction() as other:
        theirs = await claimed_due(other, 2)
        async with asyncio.timeout(5):
            ours = await claimed_due(db, 4)

    assert ids[:2] == sorted(claim.task_id for claim in theirs)
    assert ids[2:] == sorted(claim.task_id for claim in ours)


async def test_a_claim_that_is_rolled_back_leaves_the_task_pending(db: Database) -> None:
    """
    After a rollback the task is pending, and the attempt is not counted.
    """
    (task_id,) = await submitted(db, 1)
    before = await row_of(db, task_id)

    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as connection:
            await claimed_due(connection)
            raise ZeroDivisionError

    assert before == await row_of(db, task_id)


async def test_a_released_task_keeps_its_place_and_a_retried_one_waits(db: Database) -> None:
    """
    A release changes neither `run_at` nor the failures; a retry changes both.
    """
    task, _ = await submitted(db, 2)
    (claim,) = await claimed_due(db)
    await settled(db, task, claim.lease_id, SETTLEMENTS[Event.RELEASE])
    released = await read.get(db, 1, task)
    (claim,) = await claimed_due(db)
    assert task == claim.task_id
    await settled(db, task, claim.lease_id, SETTLEMENTS[Event.RETRY]._replace(delay_seconds=30))
    retried = await read.get(db, 1, task)

    assert (0, 1) == (released.failures, retried.failures)
    assert State.PENDING == await state_of(db, task)
    assert 29 < (retried.run_at - claim.claimed_at).total_seconds() < 40


async def test_a_claim_without_offers_queues_or_slots_is_empty(db: Database) -> None:
    """
    Without offers, queues or free slots a claim returns nothing and raises nothing.
    """
    await submitted(db, 1)

    assert [] == await claimed_due(db, 1, offers=())
    assert [] == await claimed_due(db, 1, queues=())
    assert [] == await claimed_due(db, 0)


async def test_a_name_offered_twice_is_claimed_once(db: Database) -> None:
    """
    A worker that lists a name twice claims no task twice.
    """
    task = new_task()
    await submit.submit(db, [task])

    assert [task.id] == [c.task_id for c in await claimed_due(db, 5, offers=OFFERS * 2)]
