"""
A task that waits for its time can be run now, without any other change to it.
"""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from asyncflow.domain.states import State
from asyncflow.domain.task import Task
from asyncflow.errors import IllegalTransition, TaskNotFound
from asyncflow.store import steer
from asyncflow.store.database import Database
from tests.support.builders import a_task, claimed, claimed_due, row_of

LONG_SECONDS = 3_600.0


@pytest.mark.parametrize("attempt", [0, 2], ids=["scheduled", "retrying"])
async def test_a_task_that_waits_for_its_time_is_due_and_nothing_else_changes(
    db: Database, attempt: int
) -> None:
    """
    The task becomes due; its attempts and failures are kept.
    """
    task = await a_task(db, attempt=attempt, due_in_seconds=LONG_SECONDS)
    before = await row_of(db, task.id)
    assert [] == await claimed(db, task.id)

    found = await steer.run_now(db, 1, task.id)

    after = await row_of(db, task.id)
    assert ("PENDING", attempt) == (found.status, found.failures)
    assert after["run_at"] < before["run_at"]
    assert before == after | {"run_at": before["run_at"]}
    (claim,) = await claimed(db, task.id)
    assert (attempt + 1, attempt) == (claim.attempt, claim.failures)


@pytest.mark.parametrize("state", [State.PENDING, State.QUEUED])
async def test_a_task_that_is_due_is_left_as_it_is(db: Database, state: State) -> None:
    """
    A task that is already due keeps its place; a new `run_at` would put it behind others.
    """
    task = await a_task(db, state=state)
    before = await row_of(db, task.id)

    found = await steer.run_now(db, 1, task.id)

    assert state == found.state
    assert before == await row_of(db, task.id)


@pytest.mark.parametrize("state", [State.RUNNING, State.COMPLETED, State.FAILED, State.CANCELLED])
async def test_what_does_not_wait_cannot_be_run_now(db: Database, state: State) -> None:
    """
    The refusal names the state, and the row is unchanged.
    """
    task = await a_task(db, state=state)
    before = await row_of(db, task.id)

    with pytest.raises(IllegalTransition, match=f"is {state}; only pending or queued tasks"):
        await steer.run_now(db, 1, task.id)

    assert before == await row_of(db, task.id)


async def test_an_unknown_task_cannot_be_run_now(db: Database) -> None:
    """
    Neither an unknown task nor another tenant's task can be run now.
    """
    task = await a_task(db, due_in_seconds=LONG_SECONDS)

    for tenant_id, task_id in ((1, uuid4()), (2, task.id)):
        with pytest.raises(TaskNotFound):
            await steer.run_now(db, tenant_id, task_id)

    assert [] == await claimed(db, task.id)


async def test_a_task_that_is_run_now_by_many_runs_once(db: Database) -> None:
    """
    A task that many callers run now runs once, even if it is claimed meanwhile: a caller that loses
    the race finds it running, which is a conflict.
    """
    task = await a_task(db, due_in_seconds=LONG_SECONDS)

    async def claimed_meanwhile() -> int:
        return sum([len(await claimed_due(db, 9)) for _ in range(20)])

    claiming = asyncio.create_task(claimed_meanwhile())
    results = await asyncio.gather(
        *(steer.run_now(db, 1, task.id) for _ in range(10)), return_exceptions=True
    )

    assert 1 == await claiming + len(await claimed_due(db, 9))
    assert {Task, IllegalTransition} >= {type(result) for result in results}
