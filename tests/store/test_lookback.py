"""
Looks for due tasks while rows that have moved on cannot be removed.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest

from asyncflow.domain.states import State
from asyncflow.store import admission, lookback
from asyncflow.store.database import Database
from asyncflow.store.lookback import Lookback, first_due
from builders import NAME, QUEUE, a_task, backdate, claimed_due, submitted

OTHER_QUEUE = "elsewhere"
ASKED: dict[str, list[str]] = {"queues": [QUEUE], "names": [NAME]}


async def test_nothing_pending_was_due_before_the_first(db: Database) -> None:
    """
    Per priority and queue; what is of another name, or not pending, does not count.
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

    found = await first_due(db, queues=[QUEUE, "elsewhere", "empty"], names=[NAME])

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
    What is submitted meanwhile is due before that.
    """
    await submitted(db, 1, delay_seconds=1_000)

    found = await first_due(db, **ASKED)

    assert max(found[QUEUE]) <= await db.fetchval("SELECT now()")


async def test_a_look_that_begins_late_leaves_out_what_was_due_before(db: Database) -> None:
    """
    The claim and the relay's listing alike, each priority and queue by its own moment.
    """
    ages = {("urgent", QUEUE): (9, 200), ("late", QUEUE): (0, 200), ("early", QUEUE): (0, 100)}
    ages |= {("other late", OTHER_QUEUE): (9, 200), ("other early", OTHER_QUEUE): (9, 100)}
    names: dict[UUID, str] = {}
    for (name, queue), (priority, age_seconds) in ages.items():
        (task_id,) = await submitted(db, 1, queue=queue, priority=priority)
        await backdate(db, "tasks", task_id, run_at=age_seconds)
        names[task_id] = name
    now = await db.fetchval("SELECT now()")
    early, late = now - timedelta(seconds=150), now - timedelta(seconds=300)
    since = {QUEUE: [early, *[late] * 9], OTHER_QUEUE: [late, *[early] * 9]}

    listed = await admission.admissible(db, queue=QUEUE, names=[NAME], limit=9, since=since[QUEUE])
    claimed = await claimed_due(db, 9, queues=[OTHER_QUEUE, QUEUE], since=since)

    assert ["urgent", "early"] == [names[task.task_id] for task in listed]
    assert {"other early", "urgent", "early"} == {names[claim.task_id] for claim in claimed}


async def test_looks_begin_late_only_while_they_are_slow(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    At first from the beginning; after a slow one late, if that is worth it; until it is not.
    """
    monkeypatch.setattr(lookback, "REST_SECONDS_MIN", 0.0)
    monkeypatch.setattr(lookback, "REST_SHARE", 0)
    looks = Lookback()

    at_first = await looks.since(db, **ASKED)
    looks.note(look_seconds=lookback.SLOW_SECONDS * 2)
    monkeypatch.setattr(lookback, "WORTH_SECONDS", 60.0)
    not_worth_it = await looks.since(db, **ASKED)
    monkeypatch.setattr(lookback, "WORTH_SECONDS", 0.0)
    slow = await looks.since(db, **ASKED)
    looks.note(look_seconds=0.0)
    still = await looks.since(db, **ASKED)
    monkeypatch.setattr(lookback, "WORTH_SECONDS", 60.0)
    in_the_end = await looks.since(db, **ASKED)

    assert ({}, {}, {}) == (at_first, not_worth_it, in_the_end)
    assert [QUEUE] == [*slow]
    assert still[QUEUE] >= slow[QUEUE]
