"""
Submitting a batch is all or nothing, answered in order, and stores tasks exactly as submitted.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from asyncflow.domain.states import State
from asyncflow.errors import StatementRefused
from asyncflow.store import read, submit
from asyncflow.store.database import Database
from tests.support.builders import new_task, row_of


async def test_answers_come_in_the_order_of_the_tasks(db: Database) -> None:
    """
    Answers come in the order of the tasks, not of their ids.
    """
    new = [new_task(delay_seconds=float(seconds)) for seconds in range(50)]
    new = new[25:] + new[:25][::-1]

    answers = await submit.submit(db, new)

    assert [task.delay_seconds for task in new] == [
        (answer.run_at - answer.created_at).total_seconds() for answer in answers
    ]


async def test_an_answer_tells_what_the_row_says(db: Database) -> None:
    """
    An answer matches the row to the microsecond, although most of it is computed here and only one
    time is returned.
    """
    run_at = datetime(2031, 5, 1, 12, 30, 0, 123456, tzinfo=UTC)
    new = [
        new_task(),
        new_task(delay_seconds=600.0000015),
        new_task(delay_seconds=1_234_567.8901235),
        new_task(delay_seconds=34_560_000.0),
        new_task(run_at=run_at),
        new_task(run_at=run_at - timedelta(days=36_500)),
    ]

    answers = await submit.submit(db, new)

    stored = [await read.get(db, 1, task.id) for task in new]
    assert [(t.status, t.created_at, t.run_at) for t in stored] == answers


@pytest.mark.parametrize(
    "wrong", [{"payload": "{"}, {"priority": 10}, {"max_attempts": 0}, {"timeout_seconds": 0.0}]
)
async def test_a_batch_with_one_task_that_cannot_be_stored_stores_nothing(
    db: Database, wrong: dict[str, Any]
) -> None:
    """
    If one task violates a constraint, none of the batch is stored.
    """
    with pytest.raises(StatementRefused):
        await submit.submit(db, [new_task(), new_task(**wrong), new_task()])

    assert 0 == await db.fetchval("SELECT count(*) FROM asyncflow.tasks")


async def test_a_task_is_stored_as_it_was_meant(db: Database) -> None:
    """
    Every field is stored; fields left unset stay unset for the handler's policy.
    """
    run_at = datetime(2031, 5, 1, 12, 30, 0, 123456, tzinfo=UTC)
    full = new_task(
        tenant_id=1,
        name="invoices.render",
        queue="slow",
        priority=9,
        run_at=run_at,
        delay_seconds=99.0,
        expires_at=run_at + timedelta(days=1),
        max_attempts=7,
        timeout_seconds=0.25,
    )
    bare = new_task()

    await submit.submit(db, [full, bare])

    row = await read.get(db, 1, full.id)
    assert ("invoices.render", "slow", 9, 7, 0.25) == (
        row.name,
        row.queue,
        row.priority,
        row.max_attempts,
        row.timeout_seconds,
    )
    assert (run_at, run_at + timedelta(days=1)) == (row.run_at, row.expires_at)
    open_fields = await read.get(db, 1, bare.id)
    assert (None, None, None) == (
        open_fields.max_attempts,
        open_fields.timeout_seconds,
        open_fields.expires_at,
    )


@pytest.mark.parametrize("delay", [0.0, 0.5, 3_600.0, 400 * 86_400.0])
async def test_a_delay_counts_from_the_database_clock(db: Database, delay: float) -> None:
    """
    A delay counts from the database's clock, whatever the submitter's clock says.
    """
    (answer,) = await submit.submit(db, [new_task(delay_seconds=delay)])

    assert timedelta(seconds=delay) == answer.run_at - answer.created_at
    assert ("SCHEDULED" if delay else "PENDING") == answer.status


async def test_a_payload_comes_back_byte_for_byte(db: Database) -> None:
    """
    A payload is not normalised: key order, spaces, big numbers and escapes are kept.
    """
    payloads = [
        '{"b": 1,  "a": 2, "a": 3}',
        '{"n": 12345678901234567890.10}',
        '{"nul": "\\u0000", "lone": "\\ud800"}',
        "{}",
        json.dumps({"text": "ü😀" * 1_000}, ensure_ascii=False),
    ]
    new = [new_task(payload=payload) for payload in payloads]

    await submit.submit(db, new)

    found = [(await read.get(db, 1, task.id)).payload for task in new]
    assert payloads == found


async def test_a_submitted_task_waits_untouched(db: Database) -> None:
    """
    A submitted task is pending, without an attempt or a lease.
    """
    task = new_task()

    await submit.submit(db, [task])

    row = await row_of(db, task.id)
    assert (State.PENDING, 1, 0, 0) == (
        row["state"],
        row["generation"],
        row["attempt"],
        row["failures"],
    )
    assert {None} == {row[c] for c in ("lease_id", "worker_id", "queued_at", "finished_at")}


async def test_submitting_nothing_is_fine(db: Database) -> None:
    """
    An empty batch stores nothing and has an empty answer.
    """
    assert [] == await submit.submit(db, [])
