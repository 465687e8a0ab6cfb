"""
Each transition of `domain.states` against PostgreSQL: every statement runs in every state.

The tests put a task into each state, run one statement of the store on it, and compare with the
table. A transition that the table does not allow must leave the row exactly as it was.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import product
from typing import NamedTuple
from uuid import uuid4

import pytest

from asyncflow.domain.states import TRANSITIONS, Event, State, sources
from asyncflow.errors import IllegalTransition
from asyncflow.store import hints, read, steer, upkeep
from asyncflow.store.database import Database
from tests.support.builders import (
    QUEUE,
    SETTLEMENTS,
    ATask,
    a_task,
    as_sent,
    backdate,
    claimed,
    claimed_due,
    row_of,
    settled,
)

Act = Callable[[Database, ATask], Awaitable[object]]


class Statement(NamedTuple):
    """
    A statement, the event it performs, and the states it is meant for.

    Attributes:
        puts_off: States in which it changes only `run_at`.
    """

    event: Event
    serves: tuple[State, ...]
    act: Act
    puts_off: tuple[State, ...] = ()


def _settle(event: Event) -> Statement:
    async def act(db: Database, task: ATask) -> None:
        await settled(db, task.id, task.lease_id or uuid4(), SETTLEMENTS[event])

    return Statement(event, (State.RUNNING,), act)


async def _unqueue_lost(db: Database, task: ATask) -> None:
    await hints.unqueue_lost(db, queue=QUEUE, older_than_seconds=0, ready=0, limit=10)


async def _cancel(db: Database, task: ATask) -> None:
    try:
        await steer.cancel(db, 1, task.id)
    except IllegalTransition:
        pass


async def _redrive(db: Database, task: ATask) -> None:
    try:
        await steer.redrive(db, 1, task.id)
    except IllegalTransition:
        pass


async def _expire(db: Database, task: ATask) -> None:
    await backdate(db, "tasks", task.id, expires_at=1)
    await upkeep.expire(db, limit=10)


async def _mark_queued(db: Database, task: ATask) -> None:
    await hints.mark_queued(db, await as_sent(db, [task.id]))


STATEMENTS = {
    "mark_queued": Statement(
        Event.QUEUE,
        (State.PENDING,),
        _mark_queued,
    ),
    "decline": Statement(
        Event.UNQUEUE,
        (State.QUEUED,),
        lambda db, task: hints.decline(db, [task.id], names=(), delay_seconds=0),
        puts_off=(State.PENDING,),
    ),
    "unqueue_lost": Statement(Event.UNQUEUE, (State.QUEUED,), _unqueue_lost),
    "claim_due": Statement(Event.CLAIM, (State.PENDING,), lambda db, task: claimed_due(db)),
    "claim_hinted": Statement(
        Event.CLAIM,
        (State.PENDING, State.QUEUED),
        lambda db, task: claimed(db, task.id),
    ),
    "settle completed": _settle(Event.COMPLETE),
    "settle failed": _settle(Event.FAIL),
    "settle retried": _settle(Event.RETRY),
    "settle released": _settle(Event.RELEASE),
    "settle cancelled": _settle(Event.CANCEL),
    "cancel": Statement(Event.CANCEL, (State.PENDING, State.QUEUED), _cancel),
    "expire": Statement(Event.EXPIRE, (State.PENDING, State.QUEUED), _expire),
    "redrive": Statement(Event.REDRIVE, (State.FAILED, State.CANCELLED), _redrive),
}

# What a statement's set-up, or a request without a transition, may touch.
NOT_COMPARED = {"expires_at", "cancel_requested_at"}


@pytest.mark.parametrize(("name", "state"), list(product(STATEMENTS, State)))
async def test_a_statement_moves_a_task_as_the_table_says_or_not_at_all(
    db: Database, name: str, state: State
) -> None:
    """
    In every state, each statement performs the transition in the table or changes nothing.
    """
    statement = STATEMENTS[name]
    task = await a_task(db, state=state)
    before = await row_of(db, task.id)
    moves = state in statement.serves

    await statement.act(db, task)

    after = await row_of(db, task.id)
    expected = TRANSITIONS[state][statement.event] if moves else state
    assert expected == after["state"]
    if state in statement.puts_off:
        assert before["run_at"] < after["run_at"]
        after["run_at"] = before["run_at"]
    if not moves:
        assert _compared(before) == _compared(after)


@pytest.mark.parametrize("event", Event)
def test_every_legal_transition_has_a_statement_that_performs_it(event: Event) -> None:
    """
    The table promises nothing that the store cannot do.
    """
    served = {state for s in STATEMENTS.values() if s.event is event for state in s.serves}

    assert set(sources(event)) == served


async def test_cancelling_a_running_task_only_asks_its_worker(db: Database) -> None:
    """
    The row stays running under its lease, and the request is recorded once.
    """
    task = await a_task(db, state=State.RUNNING)
    before = await row_of(db, task.id)

    asked = await steer.cancel(db, 1, task.id)
    again = await steer.cancel(db, 1, task.id)

    after = await row_of(db, task.id)
    assert State.RUNNING == asked.state
    assert asked.cancel_requested_at is not None
    assert asked.cancel_requested_at == again.cancel_requested_at
    assert before == after | {"cancel_requested_at": None}


@pytest.mark.parametrize("event", [Event.RETRY, Event.RELEASE])
async def test_a_task_whose_cancellation_was_asked_for_is_not_tried_again(
    db: Database, event: Event
) -> None:
    """
    A retry or release after the request ends the task as cancelled, under its lease.
    """
    task = await a_task(db, state=State.RUNNING, cancel_requested=True)
    assert task.lease_id

    written = await settled(db, task.id, task.lease_id, SETTLEMENTS[event])

    found = await read.get(db, 1, task.id)
    assert written
    assert State.CANCELLED == found.state
    assert ["cancelled"] == [attempt.outcome for attempt in found.attempts]


@pytest.mark.parametrize("event", [Event.COMPLETE, Event.FAIL])
async def test_a_finished_attempt_counts_although_its_cancellation_was_asked_for(
    db: Database, event: Event
) -> None:
    """
    If the handler finished first, its outcome is recorded.
    """
    task = await a_task(db, state=State.RUNNING, cancel_requested=True)
    assert task.lease_id

    written = await settled(db, task.id, task.lease_id, SETTLEMENTS[event])

    assert written
    assert TRANSITIONS[State.RUNNING][event] == (await row_of(db, task.id))["state"]


def _compared(row: dict[str, object]) -> dict[str, object]:
    return {column: value for column, value in row.items() if column not in NOT_COMPARED}
