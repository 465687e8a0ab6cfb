"""
Reading: a single task in full, lists page by page, and the statuses that users see.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import product
from uuid import UUID, uuid4

import pytest

from asyncflow.domain.states import Event, State
from asyncflow.errors import InvalidTask, TaskNotFound
from asyncflow.store import claims, presence, queues, read, settle, steer, workers
from asyncflow.store.database import Database
from asyncflow.store.settle import Settling
from tests.support.builders import (
    SETTLEMENTS,
    a_task,
    a_worker,
    backdate,
    claimed,
    settled,
    submitted,
)

OTHER_TENANT_ID = 2


async def one_of_each(db: Database) -> dict[str, UUID]:
    """
    A task of every status that users see.
    """
    kinds = {
        "PENDING": {"state": State.PENDING},
        "SCHEDULED": {"state": State.PENDING, "due_in_seconds": 60.0},
        "RETRYING": {"state": State.PENDING, "attempt": 1, "due_in_seconds": 60.0},
        "QUEUED": {"state": State.QUEUED},
        "RUNNING": {"state": State.RUNNING},
        "COMPLETED": {"state": State.COMPLETED},
        "FAILED": {"state": State.FAILED},
        "CANCELLED": {"state": State.CANCELLED},
    }
    return {status: (await a_task(db, **kind)).id for status, kind in kinds.items()}  # type: ignore[arg-type]


async def test_each_status_filter_finds_exactly_the_tasks_that_show_it(db: Database) -> None:
    """
    The SQL of the filters and `display_status` agree, in lists and in single reads.
    """
    expected = await one_of_each(db)

    assert set(expected) == set(read.STATUS_FILTERS)
    for status, task_id in expected.items():
        page = await read.list_tasks(db, 1, statuses=[status])
        assert [(task_id, status)] == [(task.id, task.status) for task in page.tasks]
        assert status == (await read.get(db, 1, task_id)).status


async def test_a_list_is_read_page_by_page_without_gaps_or_repeats(db: Database) -> None:
    """
    Pages go from newest to oldest, and tasks that arrive meanwhile do not shift them.
    """
    ids = await submitted(db, 23)
    seen: list[UUID] = []
    cursor = None
    while True:
        page = await read.list_tasks(db, 1, cursor=cursor, limit=5)
        seen += [task.id for task in page.tasks]
        await submitted(db, 1)
        cursor = page.next_cursor
        if cursor is None:
            break

    assert ids[::-1] == seen


async def test_a_list_crosses_the_border_between_live_and_finished_tasks(db: Database) -> None:
    """
    Tasks are in one order by id, whichever partition they are in.
    """
    ids = list((await one_of_each(db)).values()) + list((await one_of_each(db)).values())

    page = await read.list_tasks(db, 1, limit=500)

    assert ids[::-1] == [task.id for task in page.tasks]
    assert page.next_cursor is None


async def test_the_last_page_says_so_even_when_it_is_full(db: Database) -> None:
    """
    A full last page says that it is the last, and no empty page follows.
    """
    await submitted(db, 4)

    page = await read.list_tasks(db, 1, limit=4)

    assert (4, None) == (len(page.tasks), page.next_cursor)


@pytest.mark.parametrize(("name", "queue"), list(product([None, "a", "b"], [None, "x", "y"])))
async def test_filters_combine(db: Database, name: str | None, queue: str | None) -> None:
    """
    Status, name, queue and cursor apply together.
    """
    made = []
    for n, q in product("ab", "xy"):
        made += [(n, q, id) for id in await submitted(db, 3, name=n, queue=q)]
        await submitted(db, 1, name=n, queue=q, delay_seconds=60)
    expected = sorted((id for n, q, id in made if name in (n, None) and queue in (q, None)))

    found: list[UUID] = []
    page = await read.list_tasks(db, 1, statuses=["PENDING"], name=name, queue=queue, limit=2)
    found += [task.id for task in page.tasks]
    while page.next_cursor:
        page = await read.list_tasks(
            db, 1, statuses=["PENDING"], name=name, queue=queue, limit=2, cursor=page.next_cursor
        )
        found += [task.id for task in page.tasks]

    assert expected[::-1] == found


async def test_a_tenant_sees_only_its_own_tasks(db: Database) -> None:
    """
    Another tenant's task is invisible in lists and by its id, and cannot be changed.
    """
    task = await a_task(db, tenant_id=OTHER_TENANT_ID)
    dead = await a_task(db, state=State.FAILED, tenant_id=OTHER_TENANT_ID)

    assert () == (await read.list_tasks(db, 1)).tasks
    assert 2 == len((await read.list_tasks(db, OTHER_TENANT_ID)).tasks)
    for touch in (read.get, steer.cancel):
        with pytest.raises(TaskNotFound):
            await touch(db, 1, task.id)
    with pytest.raises(TaskNotFound):
        await steer.redrive(db, 1, dead.id)


async def test_an_unknown_id_is_not_found(db: Database) -> None:
    """
    All three operations report an unknown id as not found.
    """
    for touch in (read.get, steer.cancel, steer.redrive):
        with pytest.raises(TaskNotFound):
            await touch(db, 1, uuid4())


@pytest.mark.parametrize("cursor", ["", "x", "ä", "=" * 24, "A" * 23, "A" * 300, "AAAA\nAAAA"])
async def test_a_cursor_that_is_not_ours_is_refused(db: Database, cursor: str) -> None:
    """
    An invalid cursor raises an error that names the field, not a database error.
    """
    with pytest.raises(InvalidTask) as refusal:
        await read.list_tasks(db, 1, cursor=cursor)

    assert ["/cursor"] == [fault.pointer for fault in refusal.value.errors]


async def test_every_attempt_is_kept_in_order(db: Database) -> None:
    """
    Five attempts that were retried, released, retried, redriven after a failure, and completed are
    listed in order.
    """
    task = await a_task(db)
    for event in (Event.RETRY, Event.RELEASE, Event.RETRY):
        (claim,) = await claimed(db, task.id)
        await settled(db, task.id, claim.lease_id, SETTLEMENTS[event])
        await backdate(db, "tasks", task.id, run_at=0)
    (claim,) = await claimed(db, task.id)
    await settled(db, task.id, claim.lease_id, SETTLEMENTS[Event.FAIL])
    await steer.redrive(db, 1, task.id)
    (claim,) = await claimed(db, task.id)
    while_it_runs = (await read.get(db, 1, task.id)).attempts[-1]
    await settled(db, task.id, claim.lease_id, SETTLEMENTS[Event.COMPLETE])

    found = await read.get(db, 1, task.id)

    assert [
        (1, 1, "retried", "ValueError"),
        (2, 1, "released", None),
        (3, 1, "retried", "ValueError"),
        (4, 1, "failed", "ValueError"),
        (5, 2, "completed", None),
    ] == [
        (a.attempt, a.generation, a.outcome, a.failure and a.failure["kind"])
        for a in found.attempts
    ]
    assert ("running", None) == (while_it_runs.outcome, while_it_runs.finished_at)
    times = [t for a in found.attempts for t in (a.started_at, a.finished_at)]
    assert None not in times
    assert sorted(times) == times  # type: ignore[type-var]
    assert all(a.worker_id for a in found.attempts)
    assert '"done"' == found.result


@pytest.mark.parametrize("microsecond", [0, 1, 100_000, 123_400])
async def test_times_of_attempts_are_read_exactly(db: Database, microsecond: int) -> None:
    """
    Times are exact although PostgreSQL drops trailing zeros of fractions in JSON.
    """
    task = await a_task(db, attempt=1)
    await db.execute(
        "UPDATE asyncflow.attempts SET started_at = "
        "timestamptz '2026-03-01 12:00:00+02' + $1 * interval '1 microsecond'",
        microsecond,
    )

    (attempt,) = (await read.get(db, 1, task.id)).attempts

    assert datetime(2026, 3, 1, 10, microsecond=microsecond, tzinfo=UTC) == attempt.started_at


async def test_a_due_task_says_what_it_waits_for(db: Database) -> None:
    """
    A due task names what it waits for only if time alone will not start it.
    """
    task = await a_task(db)
    later = await a_task(db, due_in_seconds=60)

    async def reason() -> str | None:
        return (await read.get(db, 1, task.id)).waiting_for

    unoffered = await reason()
    worker = await a_worker(db)
    offered = await reason()
    await queues.pause(db, "default")
    paused = await reason()
    await queues.resume(db, "default")
    resumed = await reason()
    await workers.stop(db, worker.id)
    stopped = await reason()
    await a_worker(db, handlers=("other",))
    await a_worker(db, queues=("other",))
    of_no_use = await reason()

    assert unoffered and "'greet'" in unoffered and "'default'" in unoffered
    assert (None, None) == (offered, resumed)
    assert paused and "paused" in paused
    assert unoffered == stopped == of_no_use
    assert (await read.get(db, 1, later.id)).waiting_for is None


async def test_a_completed_task_is_shown_as_done(db: Database) -> None:
    """
    A completed task shows 100 % although its handler last reported 90 %.
    """
    task = await a_task(db, state=State.RUNNING)
    assert task.lease_id
    report = json.dumps({"fraction": 0.9, "message": "9 of 10"})
    await claims.record_progress(db, [(task.id, task.lease_id, report)])
    await settle.settle(db, [Settling(task.id, task.lease_id, SETTLEMENTS[Event.COMPLETE])])

    shown = await read.get(db, 1, task.id)

    assert {"fraction": 1.0, "message": None} == shown.progress


async def test_a_running_task_whose_worker_is_gone_waits_for_maintenance(db: Database) -> None:
    """
    The wait is shown once the worker is overdue, and only if no maintenance process can recover the
    task.
    """
    worker = await a_worker(db)
    task = await a_task(db)
    [claim] = await claimed(db, task.id, worker_id=worker.id)

    async def reason() -> str | None:
        return (await read.get(db, 1, claim.task_id)).waiting_for

    alive = await reason()
    await db.execute("UPDATE asyncflow.workers SET heartbeat_at = now() - interval '16 seconds'")
    unreaped = await reason()
    await presence.sign(db, relay_trouble=None)
    maintained = await reason()
    await db.execute("UPDATE asyncflow.maintenance SET seen_at = now() - interval '31 seconds'")
    silent = await reason()

    assert (None, None) == (alive, maintained)
    assert unreaped and "no maintenance process is running" in unreaped
    assert unreaped == silent


async def test_with_rabbitmq_a_due_task_waits_for_the_relay(db: Database) -> None:
    """
    With RabbitMQ, a due task waits for a maintenance process to send its hint and for RabbitMQ to
    accept it.
    """
    await a_worker(db)
    task = await a_task(db)

    async def reason(*, through_relay: bool) -> str | None:
        return (await read.get(db, 1, task.id, through_relay=through_relay)).waiting_for

    by_itself = await reason(through_relay=False)
    unsent = await reason(through_relay=True)
    await presence.sign(db, relay_trouble="User 'a' lacks the write permission.")
    refused = await reason(through_relay=True)
    await presence.sign(db, relay_trouble=None)
    sent = await reason(through_relay=True)
    await db.execute("UPDATE asyncflow.workers SET heartbeat_at = now() - interval '16 seconds'")
    unoffered = await reason(through_relay=True)

    assert (None, None) == (by_itself, sent)
    assert unsent and "No maintenance process is running" in unsent
    assert refused and refused.endswith("User 'a' lacks the write permission.")
    assert unoffered and "No live worker offers" in unoffered


async def test_a_failure_and_progress_are_shown_as_they_were_recorded(db: Database) -> None:
    """
    Failure and progress are objects, in single reads and in lists.
    """
    failed = await a_task(db, state=State.FAILED)
    running = await a_task(db, state=State.RUNNING)
    assert running.lease_id
    await claims.record_progress(db, [(running.id, running.lease_id, json.dumps({"at": 3}))])

    shown = {task.id: task for task in (await read.list_tasks(db, 1)).tasks}

    assert {
        "kind": "ValueError",
        "message": "It did not work.",
        "traceback": "Traceback …",
    } == shown[failed.id].failure
    assert {"at": 3} == shown[running.id].progress
    assert (None, None) == (shown[failed.id].payload, shown[failed.id].result)
