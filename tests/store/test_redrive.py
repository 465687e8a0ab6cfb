"""
A redrive starts a new generation of a dead letter and loses nothing.
"""

from __future__ import annotations

import asyncio

import pytest

from asyncflow.domain.states import Event, State
from asyncflow.errors import IllegalTransition
from asyncflow.store import read, steer
from asyncflow.store.database import Database
from tests.support.builders import SETTLEMENTS, a_task, claimed, row_of, settled


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED])
async def test_a_redriven_task_starts_afresh_with_all_its_attempts(
    db: Database, state: State
) -> None:
    """
    A redriven task is due now, without failures or a trace of its last end; its attempt count
    continues.
    """
    task = await a_task(db, state=state, attempt=3)

    found = await steer.redrive(db, 1, task.id)

    row = await row_of(db, task.id)
    assert ("PENDING", 2, 3, 0) == (found.status, found.generation, found.attempt, found.failures)
    assert {None} == {
        row[column]
        for column in (
            "queued_at",
            "finished_at",
            "cancel_requested_at",
            "expires_at",
            "worker_id",
            "lease_id",
            "progress",
            "result",
        )
    }
    (claim,) = await claimed(db, task.id)
    assert (4, 0) == (claim.attempt, claim.failures)


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED])
@pytest.mark.parametrize("attempt", [1, 2])
async def test_the_attempts_before_a_redrive_stay_in_the_history(
    db: Database, state: State, attempt: int
) -> None:
    """
    The redrive moves the last attempt, which was part of the row, into the history.
    """
    task = await a_task(db, state=state, attempt=attempt)
    before = (await read.get(db, 1, task.id)).attempts

    await steer.redrive(db, 1, task.id)

    found = await read.get(db, 1, task.id)
    assert attempt == len(before)
    assert before == found.attempts


async def test_a_task_cancelled_before_it_ran_has_no_attempt_after_a_redrive(
    db: Database,
) -> None:
    """
    A redrive does not invent an attempt for a task that never ran.
    """
    task = await a_task(db, state=State.CANCELLED, attempt=0)

    await steer.redrive(db, 1, task.id)

    assert () == (await read.get(db, 1, task.id)).attempts


@pytest.mark.parametrize("state", [State.PENDING, State.QUEUED, State.RUNNING, State.COMPLETED])
async def test_only_a_dead_letter_can_be_redriven(db: Database, state: State) -> None:
    """
    Only a failed task can be redriven; a completed one stays completed.
    """
    task = await a_task(db, state=state)

    with pytest.raises(IllegalTransition) as refusal:
        await steer.redrive(db, 1, task.id)

    assert f"Task {task.id} is {state}; only failed or cancelled tasks can be redriven." == str(
        refusal.value
    )


async def test_two_concurrent_redrives_open_one_generation(db: Database) -> None:
    """
    Of two concurrent redrives one succeeds and one is refused.
    """
    for _ in range(25):
        task = await a_task(db, state=State.FAILED)

        answers = await asyncio.gather(
            *(steer.redrive(db, 1, task.id) for _ in range(4)), return_exceptions=True
        )

        refused = [a for a in answers if isinstance(a, IllegalTransition)]
        found = await read.get(db, 1, task.id)
        assert 3 == len(refused)
        assert (2, 1) == (found.generation, len(found.attempts))


async def test_a_redriven_task_that_fails_again_can_be_redriven_again(db: Database) -> None:
    """
    The history grows without gaps from generation to generation.
    """
    task = await a_task(db, state=State.FAILED)
    for _ in range(3):
        await steer.redrive(db, 1, task.id)
        (claim,) = await claimed(db, task.id)
        await settled(db, task.id, claim.lease_id, SETTLEMENTS[Event.FAIL])

    found = await read.get(db, 1, task.id)

    assert [(n, n, "failed") for n in range(1, 5)] == [
        (a.attempt, a.generation, a.outcome) for a in found.attempts
    ]
