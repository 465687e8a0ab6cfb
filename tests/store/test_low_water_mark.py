"""
The low-water mark: scans for due tasks while rows that have moved on cannot be removed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from asyncflow.domain.states import State
from asyncflow.errors import StoreUnavailable
from asyncflow.store import due
from asyncflow.store.database import Database, Executor
from asyncflow.store.due import LowWaterMark, Marks, Measured, measure_marks
from tests.support.builders import NAME, QUEUE, a_task, backdate, claimed_due, submitted

OTHER_QUEUE = "elsewhere"
ASKED: dict[str, list[str]] = {"queues": [QUEUE], "names": [NAME]}


async def test_nothing_pending_was_due_before_the_first(db: Database) -> None:
    """
    Marks are kept per priority and queue; tasks with another name, or not pending, do not count.
    """
    (urgent,) = await submitted(db, 1, priority=9)
    (first, second) = await submitted(db, 2, priority=0)
    for task_id, age_seconds in ((urgent, 100), (first, 200), (second, 150)):
        await backdate(db, "tasks", task_id, run_at=age_seconds)
    (unoffered,) = await submitted(db, 1, name="other")
    (elsewhere,) = await submitted(db, 1, queue="elsewhere", priority=3)
    running = await a_task(db, state=State.RUNNING)
    for task_id in (unoffered, elsewhere, running.id):
        await backdate(db, "tasks", task_id, run_at=300)

    found = (await measure_marks(db, queues=[QUEUE, "elsewhere", "empty"], names=[NAME])).marks

    now = await db.fetchval("SELECT now()")
    ages = {
        queue: [(now - moment).total_seconds() // 50 * 50 for moment in moments]
        for queue, moments in found.items()
    }
    assert [200, *[0] * 8, 100] == ages[QUEUE]
    assert [0, 0, 0, 300, *[0] * 6] == ages["elsewhere"]
    assert [0] * 10 == ages["empty"]


async def test_a_queue_with_nothing_due_yet_begins_now(db: Database) -> None:
    """
    The mark of a queue with nothing due is now: a task submitted meanwhile is due after that.
    """
    await submitted(db, 1, delay_seconds=1_000)

    found = await measure_marks(db, **ASKED)

    assert max(found.marks[QUEUE]) <= await db.fetchval("SELECT now()")


@pytest.mark.parametrize("priority", range(10))
async def test_a_scan_that_begins_late_leaves_out_what_was_due_before(
    db: Database, priority: int
) -> None:
    """
    The claim and the relay's listing both use a mark per priority and queue.
    """
    names: dict[UUID, str] = {}
    for queue in (QUEUE, OTHER_QUEUE):
        for name, age_seconds in (("late", 200), ("early", 100)):
            (task_id,) = await submitted(db, 1, queue=queue, priority=priority)
            await backdate(db, "tasks", task_id, run_at=age_seconds)
            names[task_id] = f"{name} {queue}"
    now = await db.fetchval("SELECT now()")
    never, early = now + timedelta(days=1), now - timedelta(seconds=150)
    since = {queue: [never] * 10 for queue in (QUEUE, OTHER_QUEUE)}
    since[QUEUE][priority] = early

    listed = await due.admissible(db, queue=QUEUE, names=[NAME], limit=9, since=since[QUEUE])
    claimed = await claimed_due(db, 9, queues=[OTHER_QUEUE, QUEUE], since=since)

    assert [f"early {QUEUE}"] == [names[task.task_id] for task in listed]
    assert [f"early {QUEUE}"] == [names[claim.task_id] for claim in claimed]


@pytest.fixture
async def mark(db: Database) -> AsyncIterator[LowWaterMark]:
    """
    A mark that always pays off, however fast the scans, and refreshes without a pause.
    """
    eager = LowWaterMark(db, worth_seconds=0.0, rest_seconds_min=0.0, rest_share=0.0)
    async with aclosing(eager) as mark:
        yield mark


async def refreshed(mark: LowWaterMark) -> Mapping[str, Marks]:
    """
    The marks after a refresh.
    """
    mark.since(**ASKED)
    assert mark._refreshing is not None
    await mark._refreshing
    return mark._marks


SLOW = 2 * due.SLOW_SECONDS


async def test_scans_begin_late_only_while_they_are_slow(mark: LowWaterMark) -> None:
    """
    Scans start at the beginning; after a slow one they start at the mark, for as long as that pays
    off.
    """
    assert {} == mark.since(**ASKED)
    mark.note(scan_seconds=due.SLOW_SECONDS / 2)
    assert {} == mark.since(**ASKED)
    assert mark._refreshing is None

    mark.note(scan_seconds=SLOW)
    assert [QUEUE] == [*await refreshed(mark)]
    mark._worth_seconds = 60.0
    assert {} == await refreshed(mark)

    mark.note(scan_seconds=SLOW)
    assert {} == await refreshed(mark)
    assert {} == mark.since(**ASKED)
    assert mark._refreshing is None


async def test_what_turns_up_below_the_mark_is_found_after_the_next_refresh(
    db: Database, mark: LowWaterMark
) -> None:
    """
    A task released below the mark is found after the next refresh: late, but not forgotten.
    """
    mark.note(scan_seconds=SLOW)
    since = await refreshed(mark)
    (task_id,) = await submitted(db, 1)
    await backdate(db, "tasks", task_id, run_at=100)

    assert [] == await claimed_due(db, since=since)
    since = await refreshed(mark)

    assert [task_id] == [claim.task_id for claim in await claimed_due(db, since=since)]


async def test_a_new_name_or_queue_is_scanned_from_the_beginning(mark: LowWaterMark) -> None:
    """
    A new name or queue is scanned from the beginning, since its tasks may have waited for long. The
    order of the queues does not matter.
    """
    queues = [QUEUE, OTHER_QUEUE]
    mark.note(scan_seconds=SLOW)
    mark.since(queues=queues, names=[NAME])
    assert mark._refreshing is not None
    await mark._refreshing

    assert set(queues) == set(mark.since(queues=queues[::-1], names=[NAME]))
    assert {} == mark.since(queues=queues, names=[NAME, "other"])


async def test_each_queue_keeps_its_mark_while_another_is_added(mark: LowWaterMark) -> None:
    """
    A queue keeps its mark although the relay asks for one queue at a time, each with its own names.
    """
    mark.note(scan_seconds=SLOW)
    await refreshed(mark)

    assert {} == mark.since(queues=[OTHER_QUEUE], names=["other"])
    assert [QUEUE] == [*mark.since(**ASKED)]
    assert {QUEUE, OTHER_QUEUE} == set(await refreshed(mark))
    assert {} == mark.since(queues=[OTHER_QUEUE], names=[NAME])


async def test_names_that_change_during_a_refresh_are_scanned_from_the_beginning(
    mark: LowWaterMark,
) -> None:
    """
    Marks measured for other names are not used.
    """
    mark.note(scan_seconds=SLOW)
    mark.since(**ASKED)
    refreshing = mark._refreshing
    assert refreshing is not None
    mark.since(queues=[QUEUE], names=[NAME, "other"])
    await refreshing

    assert {} == mark.since(queues=[QUEUE], names=[NAME, "other"])


async def test_marks_serve_while_refreshing_them_fails(
    db: Database, mark: LowWaterMark, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Old marks stay in use while refreshes fail, since scanning from the beginning would be even
    slower.
    """
    mark.note(scan_seconds=SLOW)
    since = await refreshed(mark)

    async def fails(db: Executor, **asked: Any) -> Measured:
        raise StoreUnavailable("too slow")

    monkeypatch.setattr(due, "measure_marks", fails)
    with capture_logs() as logs:
        assert since == await refreshed(mark)

    assert ["low-water mark"] == [line["where"] for line in logs]


async def test_refreshes_rest(db: Database) -> None:
    """
    There is a pause between refreshes, however slow scans are.
    """
    async with aclosing(LowWaterMark(db, worth_seconds=0.0)) as mark:
        mark.note(scan_seconds=SLOW)
        await refreshed(mark)
        mark.note(scan_seconds=SLOW)

        assert [QUEUE] == [*mark.since(**ASKED)]
        assert mark._refreshing is None
