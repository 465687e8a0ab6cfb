"""
Cancelling: the first commit wins, and a decision never changes.
"""

from __future__ import annotations

import asyncio
import random
from uuid import UUID

import pytest

from asyncflow.domain.states import TERMINAL, Event, State
from asyncflow.errors import IllegalTransition
from asyncflow.store import steer
from asyncflow.store.database import Database
from tests.support.builders import (
    SETTLEMENTS,
    a_task,
    claimed,
    row_of,
    settled,
    state_of,
    submitted,
)
from tests.support.waiting import until_someone_waits_for_a_lock

RACES = 1_000


@pytest.mark.parametrize("state", [State.PENDING, State.QUEUED])
async def test_a_waiting_task_is_cancelled_immediately(db: Database, state: State) -> None:
    """
    A cancelled task never starts, and its failure says why.
    """
    task = await a_task(db, state=state)

    found = await steer.cancel(db, 1, task.id)

    assert State.CANCELLED == found.state
    assert found.finished_at is not None
    assert found.failure and "Cancelled" == found.failure["kind"]
    assert [] == await claimed(db, task.id)


@pytest.mark.parametrize("state", sorted(TERMINAL))
async def test_a_finished_task_cannot_be_cancelled(db: Database, state: State) -> None:
    """
    The refusal names the task's state.
    """
    task = await a_task(db, state=state)

    with pytest.raises(IllegalTransition) as refusal:
        await steer.cancel(db, 1, task.id)

    assert state == refusal.value.state
    assert (
        f"Task {task.id} is {state}; only pending, queued or running tasks can be cancelled."
    ) == str(refusal.value)


async def test_of_a_cancellation_and_an_attempt_that_race_one_wins(db: Database) -> None:
    """
    A thousand tasks are each claimed and settled while they are being cancelled.

    The answer CANCELLED means that no attempt completed, IllegalTransition that one did, RUNNING
    that the worker was asked to stop. No answer is contradicted later.
    """
    ids = await submitted(db, RACES)
    random.seed(1)
    turns = asyncio.Semaphore(8)

    async def attempt(task_id: UUID, event: Event) -> bool:
        async with turns:
            for claim in await claimed(db, task_id):
                return await settled(db, claim.task_id, claim.lease_id, SETTLEMENTS[event])
            return False

    async def cancel(task_id: UUID) -> State:
        await asyncio.sleep(0)
        async with turns:
            try:
                return (await steer.cancel(db, 1, task_id)).state
            except IllegalTransition as refusal:
                return State(refusal.state)

    events = [random.choice([Event.COMPLETE, Event.RETRY, Event.FAIL]) for _ in ids]
    both = [
        pair
        for task_id, event in zip(ids, events, strict=True)
        for pair in (attempt(task_id, event), cancel(task_id))
    ]
    answers = await asyncio.gather(*both)
    settles, cancels = answers[0::2], answers[1::2]

    ends = [await state_of(db, task_id) for task_id in ids]
    wrong = [
        (event, written, answer, end)
        for event, written, answer, end in zip(events, settles, cancels, ends, strict=True)
        if end not in _possible_ends(event, bool(written), answer)  # type: ignore[arg-type]
    ]
    assert [] == wrong
    # It was a real race: each side won some.
    assert {State.CANCELLED} < set(ends)


async def test_a_cancellation_waits_for_a_settlement_that_is_being_committed(
    db: Database,
) -> None:
    """
    The cancellation does not overwrite the row, which the settlement has moved to the finished
    tasks.
    """
    task = await a_task(db, state=State.RUNNING)
    assert task.lease_id
    async with db.transaction() as settling:
        await settled(settling, task.id, task.lease_id, SETTLEMENTS[Event.COMPLETE])
        cancelling = asyncio.create_task(steer.cancel(db, 1, task.id))
        await until_someone_waits_for_a_lock(db)

    with pytest.raises(IllegalTransition):
        await cancelling

    assert State.COMPLETED == await state_of(db, task.id)


async def test_a_claim_waits_for_a_cancellation_that_is_being_committed(db: Database) -> None:
    """
    After waiting for the cancellation, the claim finds nothing to run.
    """
    task = await a_task(db)
    async with db.transaction() as cancelling:
        await steer.cancel(cancelling, 1, task.id)
        claiming = asyncio.create_task(claimed(db, task.id))
        await until_someone_waits_for_a_lock(db)

    assert [] == await claiming
    assert State.CANCELLED == await state_of(db, task.id)


async def test_cancelling_twice_changes_nothing_more(db: Database) -> None:
    """
    The second cancellation is refused, because the task is finished.
    """
    task = await a_task(db)
    await steer.cancel(db, 1, task.id)
    before = await row_of(db, task.id)

    with pytest.raises(IllegalTransition):
        await steer.cancel(db, 1, task.id)

    assert before == await row_of(db, task.id)


def _possible_ends(event: Event, written: bool, answer: State) -> set[State]:
    settled_to: set[State] = {
        Event.COMPLETE: {State.COMPLETED},
        Event.FAIL: {State.FAILED},
        # Retried; then cancelled while it waited, or before the retry was written.
        Event.RETRY: {State.CANCELLED},
    }[event]
    if answer is State.CANCELLED:
        return {State.CANCELLED}
    if answer is State.RUNNING:
        return settled_to if written else set()
    return settled_to & {answer}
