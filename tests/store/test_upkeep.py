"""
Upkeep: expiry, pruning and the readiness probe.
"""

from __future__ import annotations

from uuid import UUID

import pytest

from asyncflow.domain.states import TERMINAL, State
from asyncflow.errors import StoreUnavailable
from asyncflow.store import due, read, upkeep, workers
from asyncflow.store.database import Database
from asyncflow.store.workers import Published
from tests.support.builders import (
    NAME,
    a_task,
    a_worker,
    backdate,
    claimed,
    claimed_due,
    row_of,
    state_of,
    submitted,
)

DAY = 86_400


@pytest.mark.parametrize("state", [State.PENDING, State.QUEUED])
async def test_a_waiting_task_is_cancelled_when_it_expires(db: Database, state: State) -> None:
    """
    An expired task is cancelled, and its failure says that it expired.
    """
    task = await a_task(db, state=state)
    other = await a_task(db, state=state)
    await backdate(db, "tasks", task.id, expires_at=0)
    await backdate(db, "tasks", other.id, expires_at=-60)

    count = await upkeep.expire(db, limit=10)

    found = await read.get(db, 1, task.id)
    assert (1, State.CANCELLED) == (count, found.state)
    assert found.failure and "Expired" == found.failure["kind"]
    assert state == await state_of(db, other.id)


async def test_a_task_that_waits_for_a_retry_expires_too(db: Database) -> None:
    """
    A task that waits for a retry expires, and its attempts stay in the history.
    """
    task = await a_task(db, attempt=1, due_in_seconds=60)
    await backdate(db, "tasks", task.id, expires_at=0)

    await upkeep.expire(db, limit=10)

    found = await read.get(db, 1, task.id)
    assert State.CANCELLED == found.state
    assert ["retried"] == [attempt.outcome for attempt in found.attempts]


async def test_a_running_task_does_not_expire(db: Database) -> None:
    """
    `expires_at` limits only the start.
    """
    task = await a_task(db, state=State.RUNNING)
    await backdate(db, "tasks", task.id, expires_at=1)

    assert 0 == await upkeep.expire(db, limit=10)
    assert State.RUNNING == await state_of(db, task.id)


async def test_expiring_is_bounded_and_goes_on_where_it_stopped(db: Database) -> None:
    """
    Each run is bounded, and tasks that expired first go first.
    """
    ids = await submitted(db, 5)
    for age, task_id in enumerate(ids, start=1):
        await backdate(db, "tasks", task_id, expires_at=age)

    counts = [await upkeep.expire(db, limit=2)]
    first = [await state_of(db, task_id) for task_id in ids]
    counts += [await upkeep.expire(db, limit=2) for _ in range(3)]

    assert [2, 2, 1, 0] == counts
    assert [State.PENDING] * 3 + [State.CANCELLED] * 2 == first


async def test_expiring_steps_over_a_task_that_is_being_claimed(db: Database) -> None:
    """
    Expiry skips a task that is being claimed, so neither statement waits for the other.
    """
    (task_id,) = await submitted(db, 1)

    async with db.transaction() as worker:
        await claimed(worker, task_id)
        await backdate(worker, "tasks", task_id, expires_at=1)
        count = await upkeep.expire(db, limit=10)

    assert (0, State.RUNNING) == (count, await state_of(db, task_id))


async def test_only_tasks_finished_before_the_retention_are_pruned(db: Database) -> None:
    """
    Finished tasks past the retention are pruned with their attempts; live tasks stay, however old.
    """
    kept = [await a_task(db, state=state, attempt=2) for state in State if state != State.PENDING]
    old = [await a_task(db, state=state, attempt=3) for state in sorted(TERMINAL)]
    for task in old:
        await backdate(db, "tasks", task.id, finished_at=2 * DAY)
    for task in kept:
        await db.execute(
            "UPDATE asyncflow.tasks SET created_at = 'epoch', run_at = 'epoch' WHERE id = $1",
            task.id,
        )

    count = await upkeep.prune_finished(db, older_than_days=1, limit=100)

    rows = await db.fetch("SELECT id FROM asyncflow.tasks")
    history = await db.fetch("SELECT DISTINCT task_id FROM asyncflow.attempts")
    assert 3 == count
    assert {task.id for task in kept} == {row["id"] for row in rows}
    assert {task.id for task in kept} == {row["task_id"] for row in history}


async def test_pruning_is_bounded_and_the_oldest_go_first(db: Database) -> None:
    """
    Each run prunes a bounded number, oldest first, so it stays short even after a long outage.
    """
    finished = [await a_task(db, state=State.COMPLETED) for _ in range(5)]
    for age, task in enumerate(finished, start=2):
        await backdate(db, "tasks", task.id, finished_at=age * DAY)

    counts = [await upkeep.prune_finished(db, older_than_days=1, limit=3)]
    rows = await db.fetch("SELECT id FROM asyncflow.tasks")
    counts += [await upkeep.prune_finished(db, older_than_days=1, limit=3) for _ in range(2)]

    assert [3, 2, 0] == counts
    assert {task.id for task in finished[:2]} == {row["id"] for row in rows}


async def test_a_hint_to_a_pruned_task_is_harmless(db: Database) -> None:
    """
    A hint may outlive its task in RabbitMQ, and then claims nothing.
    """
    task = await a_task(db, state=State.COMPLETED)
    await upkeep.prune_finished(db, older_than_days=0, limit=10)

    assert [] == await claimed(db, task.id)


async def test_the_probe_finds_out_that_a_database_takes_no_writes(db: Database) -> None:
    """
    The probe fails on a demoted primary, although that answers every SELECT.
    """
    await upkeep.probe(db)

    async with db.transaction() as connection:
        await connection.execute("SET TRANSACTION READ ONLY")
        assert 1 == await connection.fetchval("SELECT 1")
        with pytest.raises(StoreUnavailable, match="read-only"):
            async with db.transaction() as standby:
                await standby.execute("SET TRANSACTION READ ONLY")
                await upkeep.probe(standby)


async def moved(db: Database, *, limit: int = 10) -> int:
    """
    Move tasks that wait in `default` to their handler's queue.
    """
    return await upkeep.move_to_handlers_queue(
        db, queue="default", since_seconds=3_600, late_seconds=15, limit=limit
    )


async def published(db: Database, queue: str, *, seconds_ago: float = 0) -> None:
    """
    Publish the handler of these tests.
    """
    await workers.publish_handlers(db, [Published(NAME, queue, {})])
    await db.execute(
        "UPDATE asyncflow.publications SET published_at = now() - $1 * interval '1 second'",
        seconds_ago,
    )


async def queue_of(db: Database, task_id: UUID) -> str:
    return str((await row_of(db, task_id))["queue"])


async def test_a_task_older_than_its_handler_moves_to_the_handlers_queue(db: Database) -> None:
    """
    A task submitted before its queue was known moves there, where workers and the relay find it.
    """
    [early] = await submitted(db, 1)
    [other] = await submitted(db, 1, name="other")
    delayed = await a_task(db, due_in_seconds=60)
    await published(db, "reports")
    await a_worker(db, queues=("reports",), handlers=(NAME,), handler_queues=("reports",))

    assert 2 == await moved(db)
    assert 0 == await moved(db)

    assert ["reports", "default", "reports"] == [
        await queue_of(db, task_id) for task_id in (early, other, delayed.id)
    ]
    admitted = await due.admissible(db, queue="reports", names=[NAME], limit=9)
    assert [early] == [task.task_id for task in admitted]
    assert [early] == [claim.task_id for claim in await claimed_due(db, 9, queues=("reports",))]


@pytest.mark.parametrize(
    ("why", "seconds_ago"),
    [("it was published long before", 60), ("too long ago to look", 4_000)],
)
async def test_a_task_that_was_sent_to_default_stays_there(
    db: Database, why: str, seconds_ago: float
) -> None:
    """
    A task explicitly sent to `default` stays there, since its submitter could have left the choice
    to the handler.
    """
    [task_id] = await submitted(db, 1)
    await published(db, "reports", seconds_ago=seconds_ago)

    assert 0 == await moved(db), why
    assert "default" == await queue_of(db, task_id)


async def test_a_task_that_some_worker_takes_from_default_stays_there(db: Database) -> None:
    """
    A task that a worker can take from `default` will run there and keeps its place.
    """
    [task_id] = await submitted(db, 1)
    await published(db, "reports")
    await a_worker(db, queues=("default", "reports"), handlers=(NAME,))

    assert 0 == await moved(db)
    assert "default" == await queue_of(db, task_id)


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.COMPLETED, State.FAILED])
async def test_only_pending_tasks_move(db: Database, state: State) -> None:
    """
    A queued task does not move: its hint is in flight to the old queue, or was taken from there.
    """
    task = await a_task(db, state=state)
    await published(db, "reports")

    assert 0 == await moved(db)
    assert "default" == await queue_of(db, task.id)


async def test_moving_is_bounded_and_goes_on_where_it_stopped(db: Database) -> None:
    """
    Each run moves a bounded number and the next one continues; the newer of two publications
    counts.
    """
    await submitted(db, 3)
    await published(db, "older")
    await published(db, "newer")

    counts = [await moved(db, limit=2) for _ in range(3)]

    assert [2, 1, 0] == counts
    rows = await db.fetch("SELECT DISTINCT queue FROM asyncflow.tasks")
    assert ["newer"] == [row["queue"] for row in rows]
