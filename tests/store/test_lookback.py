"""
Looks for due tasks while rows that have moved on cannot be removed.
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
from asyncflow.store import admission, lookback
from asyncflow.store.database import Database, Executor
from asyncflow.store.lookback import FirstDue, Lookback, Moments, first_due
from tests.support.builders import NAME, QUEUE, a_task, backdate, claimed_due, submitted

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

    found = (await first_due(db, queues=[QUEUE, "elsewhere", "empty"], names=[NAME])).moments

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

    assert max(found.moments[QUEUE]) <= await db.fetchval("SELECT now()")


@pytest.mark.parametrize("priority", range(10))
async def test_a_look_that_begins_late_leaves_out_what_was_due_before(
    db: Database, priority: int
) -> None:
    """
    The claim and the relay's listing alike, each priority and queue by its own moment.
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

    listed = await admission.admissible(db, queue=QUEUE, names=[NAME], limit=9, since=since[QUEUE])
    claimed = await claimed_due(db, 9, queues=[OTHER_QUEUE, QUEUE], since=since)

    assert [f"early {QUEUE}"] == [names[task.task_id] for task in listed]
    assert [f"early {QUEUE}"] == [names[claim.task_id] for claim in claimed]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Finding out need not rest, and is worth it however fast it is.
    """
    monkeypatch.setattr(lookback, "REST_SECONDS_MIN", 0.0)
    monkeypatch.setattr(lookback, "REST_SHARE", 0)
    monkeypatch.setattr(lookback, "WORTH_SECONDS", 0.0)


@pytest.fixture
async def looks(db: Database) -> AsyncIterator[Lookback]:
    """
    What decides where looks begin.
    """
    async with aclosing(Lookback(db)) as looks:
        yield looks


async def found_out(looks: Lookback) -> Mapping[str, Moments]:
    """
    Where looks begin once it was found out.
    """
    looks.since(**ASKED)
    assert looks._finding is not None
    await looks._finding
    return looks._since


SLOW = 2 * lookback.SLOW_SECONDS


@pytest.mark.usefixtures("at_once")
async def test_looks_begin_late_only_while_they_are_slow(
    looks: Lookback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    At first from the beginning; after a slow one late, if that is worth it; until it is not.
    """
    assert {} == looks.since(**ASKED)
    looks.note(look_seconds=lookback.SLOW_SECONDS / 2)
    assert {} == looks.since(**ASKED)
    assert looks._finding is None

    looks.note(look_seconds=SLOW)
    assert [QUEUE] == [*await found_out(looks)]
    monkeypatch.setattr(lookback, "WORTH_SECONDS", 60.0)
    assert {} == await found_out(looks)

    looks.note(look_seconds=SLOW)
    assert {} == await found_out(looks)
    assert {} == looks.since(**ASKED)
    assert looks._finding is None


@pytest.mark.usefixtures("at_once")
async def test_what_turns_up_with_an_older_time_is_met_the_next_time(
    db: Database, looks: Lookback
) -> None:
    """
    A released task is late, not forgotten.
    """
    looks.note(look_seconds=SLOW)
    since = await found_out(looks)
    (task_id,) = await submitted(db, 1)
    await backdate(db, "tasks", task_id, run_at=100)

    assert [] == await claimed_due(db, since=since)
    since = await found_out(looks)

    assert [task_id] == [claim.task_id for claim in await claimed_due(db, since=since)]


@pytest.mark.usefixtures("at_once")
async def test_a_new_name_or_queue_is_looked_for_from_the_beginning(looks: Lookback) -> None:
    """
    Its tasks may have waited for long. In which order queues are looked into does not matter.
    """
    queues = [QUEUE, OTHER_QUEUE]
    looks.note(look_seconds=SLOW)
    looks.since(queues=queues, names=[NAME])
    assert looks._finding is not None
    await looks._finding

    assert set(queues) == set(looks.since(queues=queues[::-1], names=[NAME]))
    assert {} == looks.since(queues=queues, names=[NAME, "other"])


@pytest.mark.usefixtures("at_once")
async def test_what_was_found_serves_while_finding_out_fails(
    db: Database, looks: Lookback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Beginning at the beginning would take even longer.
    """
    looks.note(look_seconds=SLOW)
    since = await found_out(looks)

    async def fails(db: Executor, **asked: Any) -> FirstDue:
        raise StoreUnavailable("too slow")

    monkeypatch.setattr(lookback, "first_due", fails)
    with capture_logs() as logs:
        assert since == await found_out(looks)

    assert ["lookback"] == [line["where"] for line in logs]


async def test_finding_out_rests(looks: Lookback, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    However slow looks are.
    """
    monkeypatch.setattr(lookback, "WORTH_SECONDS", 0.0)
    looks.note(look_seconds=SLOW)
    await found_out(looks)
    looks.note(look_seconds=SLOW)

    assert [QUEUE] == [*looks.since(**ASKED)]
    assert looks._finding is None
