"""
Tasks as their submitters see them: submit, read, list, cancel, run now, redrive.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from asyncflow.domain.states import Event, State, display_status, sources
from asyncflow.domain.task import NewTask
from asyncflow.errors import Fault, IllegalTransition, InvalidTask, TaskNotFound
from asyncflow.store.database import Executor, Record
from asyncflow.store.presence import SILENT_SECONDS_MAX


class Submitted(NamedTuple):
    """
    What the database decided about a task it took.
    """

    status: str
    created_at: datetime
    run_at: datetime


@dataclass(frozen=True, slots=True)
class Attempt:
    """
    One execution of a task; the last one may still be running.

    Attributes:
        outcome: `running`, `completed`, `failed`, `cancelled`, `retried` or `released`.
        finished_at: None while it runs.
        failure: `{kind, message, traceback}` or None.
    """

    attempt: int
    generation: int
    outcome: str
    started_at: datetime
    finished_at: datetime | None
    worker_id: UUID | None
    failure: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Task:
    """
    A task's row, read at one moment of the database's clock.

    Attributes:
        payload: JSON text; None in lists.
        result: JSON text; None in lists and until completed.
        progress: `{fraction, message}` as the latest attempt reported it, complete once the task
            is; None if it reported none.
        waiting_for: Why a due task has not started, or a running one does not end, when there is a
            reason that will not pass by itself: no live worker offers its name on its queue, the
            queue is paused, no maintenance is running, RabbitMQ refuses us. None otherwise, and in
            lists.
        attempts: Oldest first; empty in lists.
    """

    id: UUID
    name: str
    queue: str
    status: str
    state: State
    priority: int
    generation: int
    attempt: int
    failures: int
    max_attempts: int | None
    timeout_seconds: float | None
    created_at: datetime
    run_at: datetime
    expires_at: datetime | None
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested_at: datetime | None
    worker_id: UUID | None
    failure: dict[str, Any] | None
    progress: dict[str, Any] | None
    payload: str | None = None
    result: str | None = None
    waiting_for: str | None = None
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """
    Part of a list, newest first; `next_cursor` is None on the last page.
    """

    tasks: tuple[Task, ...]
    next_cursor: str | None


SUBMIT = """
    WITH stored AS (
        INSERT INTO asyncflow.tasks
               (id, tenant_id, name, queue, priority, run_at, expires_at,
                max_attempts, timeout_seconds, payload)
        SELECT id, tenant_id, name, queue, priority,
               coalesce(run_at, now() + delay_microseconds * interval '1 microsecond', now()),
               expires_at, max_attempts, timeout_seconds, payload::json
          FROM unnest($1::uuid[], $2::int[], $3::text[], $4::text[], $5::smallint[],
                      $6::timestamptz[], $7::bigint[], $8::timestamptz[],
                      $9::int[], $10::float8[], $11::text[])
               AS new (id, tenant_id, name, queue, priority, run_at, delay_microseconds,
                       expires_at, max_attempts, timeout_seconds, payload))
    SELECT now()
"""

SUBMIT_PARAMETERS = 11


async def submit(db: Executor, tasks: Sequence[NewTask]) -> list[Submitted]:
    """
    Store new tasks, all or none; once this returns they survive any crash.

    Returns:
        In the order given.

    Raises:
        StoreUnavailable: None of them is stored, unless the connection was lost while
            PostgreSQL committed; then all may be.
    """
    if not tasks:
        return []
    column = dict(zip(NewTask._fields, zip(*tasks, strict=True), strict=True))
    # One row comes back, not one per task: all are created at the same moment, and with it
    # the rest of the answer is known.
    created_at = await db.fetchval(
        SUBMIT,
        column["id"],
        column["tenant_id"],
        column["name"],
        column["queue"],
        column["priority"],
        _unless_all_none(column["run_at"]),
        _unless_all_none([_microseconds(seconds) for seconds in column["delay_seconds"]]),
        _unless_all_none(column["expires_at"]),
        _unless_all_none(column["max_attempts"]),
        _unless_all_none(column["timeout_seconds"]),
        column["payload"],
    )
    due_at_once = _submitted(created_at, run_at=created_at)
    return [
        _submitted(created_at, run_at=_run_at(task, created_at))
        if task.run_at or task.delay_seconds
        else due_at_once
        for task in tasks
    ]


async def submit_nothing(db: Executor) -> None:
    """
    Prove that PostgreSQL would take a submission: it checks every right that one needs.

    Raises:
        StoreUnavailable: It would not.
    """
    await db.fetchval(SUBMIT, *[()] * SUBMIT_PARAMETERS)


def _unless_all_none(column: Sequence[Any]) -> Sequence[Any]:
    # `unnest` fills up the shorter of its arrays with NULL.
    return column if column.count(None) < len(column) else ()


def _microseconds(delay_seconds: float) -> int | None:
    # Whole ones, so that adding them here and in the database gives the same moment.
    return round(delay_seconds * 1_000_000) if delay_seconds else None


def _run_at(task: NewTask, created_at: datetime) -> datetime:
    delay = timedelta(microseconds=_microseconds(task.delay_seconds) or 0)
    return task.run_at or created_at + delay


def _submitted(created_at: datetime, *, run_at: datetime) -> Submitted:
    status = display_status(State.PENDING, run_at=run_at, failures=0, now=created_at)
    return Submitted(status, created_at, run_at)


LIST_COLUMNS = """
           t.id, t.name, t.queue, t.state, t.priority, t.generation, t.attempt, t.failures,
           t.max_attempts, t.timeout_seconds, t.created_at, t.run_at, t.expires_at,
           t.queued_at, t.started_at, t.finished_at, t.cancel_requested_at, t.worker_id,
           t.failure, t.progress, now() AS now
"""

# A worker whose heartbeat is overdue is as good as lost; only maintenance would say so.
IS_LIVE = """w.stopped_at IS NULL AND w.lost_at IS NULL
                                    AND w.heartbeat_at
                                        > now() - w.lease_seconds * interval '1 second'"""

GET = f"""
    SELECT {LIST_COLUMNS}, t.payload, t.result,
           (SELECT json_agg(a ORDER BY a.attempt)
              FROM asyncflow.attempts a
             WHERE a.task_id = t.id) AS attempts,
           CASE WHEN t.state = 'running'
                 AND m.is_here IS NOT TRUE
                 AND NOT EXISTS (SELECT FROM asyncflow.workers w
                                  WHERE w.id = t.worker_id AND {IS_LIVE})
                THEN 'unreaped'
                WHEN t.state NOT IN ('pending', 'queued') OR t.run_at > now() THEN NULL
                WHEN EXISTS (SELECT FROM asyncflow.queues q
                              WHERE q.name = t.queue AND q.paused_at IS NOT NULL)
                THEN 'paused'
                WHEN NOT EXISTS (SELECT FROM asyncflow.workers w
                                  WHERE {IS_LIVE}
                                    AND t.name = ANY (w.handlers)
                                    AND t.queue = ANY (w.queues))
                THEN 'unoffered'
                WHEN NOT $3 OR t.state = 'queued' THEN NULL
                WHEN m.is_here IS NOT TRUE THEN 'unrelayed'
                WHEN m.relay_trouble IS NOT NULL THEN 'troubled'
           END AS waiting_for,
           m.relay_trouble
      FROM asyncflow.tasks t
      LEFT JOIN (SELECT relay_trouble,
                        seen_at > now() - interval '{SILENT_SECONDS_MAX} seconds' AS is_here
                   FROM asyncflow.maintenance) AS m ON true
     WHERE t.id = $2
       -- Means `=`, but no index serves it: the one on tenant and name would be read whole.
       AND t.tenant_id IS NOT DISTINCT FROM $1
"""


async def get(db: Executor, tenant_id: int, task_id: UUID, *, through_relay: bool = False) -> Task:
    """
    Read one task with its payload, result and every attempt.

    Args:
        through_relay: Whether RabbitMQ carries hints, so that it takes maintenance to start a task.

    Raises:
        TaskNotFound: This tenant has no such task.
    """
    row = await db.fetchrow(GET, tenant_id, task_id, through_relay)
    if row is None:
        raise TaskNotFound(task_id)
    return _task(
        row,
        payload=row["payload"],
        result=row["result"],
        waiting_for=_waiting_for(row),
        attempts=_attempts(row),
    )


LIST = f"""
    SELECT {LIST_COLUMNS}
      FROM asyncflow.tasks t
     WHERE t.tenant_id = $1
       AND {{filters}}
     ORDER BY t.id DESC
     LIMIT $2
"""

STATUS_FILTERS = {
    "PENDING": "t.state = 'pending' AND t.run_at <= now()",
    "SCHEDULED": "t.state = 'pending' AND t.run_at > now() AND t.failures = 0",
    "RETRYING": "t.state = 'pending' AND t.run_at > now() AND t.failures > 0",
    "QUEUED": "t.state = 'queued'",
    "RUNNING": "t.state = 'running'",
    "COMPLETED": "t.state = 'completed'",
    "FAILED": "t.state = 'failed'",
    "CANCELLED": "t.state = 'cancelled'",
}
"""Each status people see, as SQL; agrees with `domain.states.display_status`."""


async def list_tasks(
    db: Executor,
    tenant_id: int,
    *,
    statuses: Collection[str] = (),
    name: str | None = None,
    queue: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page:
    """
    One page of this tenant's tasks, newest first.

    Args:
        statuses: Any of these, of `STATUS_FILTERS`; none lists every status.
        cursor: The `next_cursor` of the page before; None starts at the newest.
        limit: 1 to 500 tasks.

    Raises:
        InvalidTask: The cursor is not one of ours.
    """
    filters = [status_filter(statuses)]
    values: list[Any] = [tenant_id, limit + 1]
    # Only the filters in use are part of the statement: each combination gets its own plan.
    for condition, value in (
        ("t.name = $", name),
        ("t.queue = $", queue),
        ("t.id < $", _read_cursor(cursor)),
    ):
        if value is not None:
            values.append(value)
            filters.append(f"{condition}{len(values)}")
    statement = LIST.format(filters=" AND ".join(filters))
    rows = await db.fetch(statement, *values)
    more = len(rows) > limit
    rows = rows[:limit]
    return Page(
        tasks=tuple(_task(row) for row in rows),
        next_cursor=_write_cursor(rows[-1]["id"]) if more else None,
    )


def status_filter(statuses: Collection[str]) -> str:
    """
    The condition of having any of these statuses, or of any task if there are none.
    """
    # Always in the same order: each statement has its own plan.
    conditions = [f"({STATUS_FILTERS[status]})" for status in STATUS_FILTERS if status in statuses]
    return f"({' OR '.join(conditions)})" if conditions else "true"


CANCEL_WAITING = """
    UPDATE asyncflow.tasks t
       SET state = 'cancelled',
           finished_at = now(),
           cancel_requested_at = now(),
           failure = '{"kind": "Cancelled", "message": "Cancelled before it started."}'
     WHERE t.id = $2
       AND t.tenant_id = $1
       AND t.state IN ('pending', 'queued')
    RETURNING t.id
"""

REQUEST_CANCEL = """
    UPDATE asyncflow.tasks t
       SET cancel_requested_at = coalesce(t.cancel_requested_at, now())
     WHERE t.id = $2
       AND t.tenant_id = $1
       AND t.state = 'running'
    RETURNING t.id
"""

TRIES_MAX = 10
"""A task may move between two looks at it (claimed, retried); it moves on in the end."""


async def cancel(db: Executor, tenant_id: int, task_id: UUID) -> Task:
    """
    Cancel a waiting task, or ask the worker of a running one to stop it.

    Returns:
        The task afterwards: CANCELLED, or RUNNING with `cancel_requested_at` set.

    Raises:
        TaskNotFound: This tenant has no such task.
        IllegalTransition: It is finished already.
    """
    for _ in range(TRIES_MAX):
        for statement in (CANCEL_WAITING, REQUEST_CANCEL):
            if await db.fetchval(statement, tenant_id, task_id) is not None:
                return await get(db, tenant_id, task_id)
        task = await get(db, tenant_id, task_id)
        if task.finished_at is not None:
            break
    raise IllegalTransition(
        task_id,
        verb="cancelled",
        state=task.state,
        allowed=(*sources(Event.CANCEL),),
    )


RUN_NOW = """
    UPDATE asyncflow.tasks t
       SET run_at = now()
     WHERE t.id = $2
       AND t.tenant_id = $1
       AND t.state = 'pending'
       AND t.run_at > now()
    RETURNING t.id
"""


async def run_now(db: Executor, tenant_id: int, task_id: UUID) -> Task:
    """
    Let a task that waits for its time, or for its next attempt, be due now.

    One that is due already is left as it is. Nothing else changes: neither the attempts before
    it nor its place behind others.

    Raises:
        TaskNotFound: This tenant has no such task.
        IllegalTransition: It runs or is finished.
    """
    for _ in range(TRIES_MAX):
        brought_forward = await db.fetchval(RUN_NOW, tenant_id, task_id)
        task = await get(db, tenant_id, task_id)
        if brought_forward is not None or task.status in ("PENDING", "QUEUED"):
            return task
        if task.state is not State.PENDING:
            break
    raise IllegalTransition(
        task_id,
        verb="run now",
        state=task.status.lower(),
        allowed=(State.PENDING, State.QUEUED),
    )


REDRIVE = """
    WITH latest AS (
        INSERT INTO asyncflow.attempts
               (task_id, attempt, tenant_id, generation, outcome,
                started_at, finished_at, worker_id, lease_id, failure)
        SELECT t.id, t.attempt, t.tenant_id, t.generation, t.state,
               t.started_at, t.finished_at, t.worker_id, t.lease_id, t.failure
          FROM asyncflow.tasks t
         WHERE t.id = $2
           AND t.tenant_id = $1
           AND t.state IN ('failed', 'cancelled')
           AND t.lease_id IS NOT NULL        -- it had an attempt that is not archived yet
            ON CONFLICT DO NOTHING)
    UPDATE asyncflow.tasks t
       SET state = 'pending',
           generation = t.generation + 1,
           failures = 0,
           run_at = now(),
           expires_at = NULL,
           queued_at = NULL,
           finished_at = NULL,
           cancel_requested_at = NULL,
           worker_id = NULL,
           lease_id = NULL,
           progress = NULL
     WHERE t.id = $2
       AND t.tenant_id = $1
       AND t.state IN ('failed', 'cancelled')
    RETURNING t.id
"""


async def redrive(db: Executor, tenant_id: int, task_id: UUID) -> Task:
    """
    Give a dead letter a new generation: pending now, with all its attempts before it again.

    Raises:
        TaskNotFound: This tenant has no such task.
        IllegalTransition: It is neither failed nor cancelled.
    """
    redriven = await db.fetchval(REDRIVE, tenant_id, task_id)
    task = await get(db, tenant_id, task_id)
    if redriven is None:
        raise IllegalTransition(
            task_id, verb="redriven", state=task.status.lower(), allowed=(*sources(Event.REDRIVE),)
        )
    return task


def _task(row: Record, **details: Any) -> Task:
    state = State(row["state"])
    status = display_status(state, run_at=row["run_at"], failures=row["failures"], now=row["now"])
    return Task(
        id=row["id"],
        name=row["name"],
        queue=row["queue"],
        status=status,
        state=state,
        priority=row["priority"],
        generation=row["generation"],
        attempt=row["attempt"],
        failures=row["failures"],
        max_attempts=row["max_attempts"],
        timeout_seconds=row["timeout_seconds"],
        created_at=row["created_at"],
        run_at=row["run_at"],
        expires_at=row["expires_at"],
        queued_at=row["queued_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        cancel_requested_at=row["cancel_requested_at"],
        worker_id=row["worker_id"],
        failure=_json(row["failure"]),
        progress=_progress(row),
        **details,
    )


def _progress(row: Record) -> dict[str, Any] | None:
    progress: dict[str, Any] | None = _json(row["progress"])
    if progress is not None and row["state"] == State.COMPLETED:
        # The handler's last report came before its end, and is a moment old by then.
        return {"fraction": 1.0, "message": None}
    return progress


def _attempts(row: Record) -> tuple[Attempt, ...]:
    earlier = [
        Attempt(
            attempt=a["attempt"],
            generation=a["generation"],
            outcome=a["outcome"],
            started_at=datetime.fromisoformat(a["started_at"]),
            finished_at=datetime.fromisoformat(a["finished_at"]),
            worker_id=UUID(a["worker_id"]) if a["worker_id"] else None,
            failure=a["failure"],
        )
        for a in _json(row["attempts"]) or ()
    ]
    # The row itself records the latest attempt until that is archived.
    if row["attempt"] and (not earlier or earlier[-1].attempt < row["attempt"]):
        earlier.append(
            Attempt(
                attempt=row["attempt"],
                generation=row["generation"],
                outcome=row["state"],
                started_at=row["started_at"],
                finished_at=row["finished_at"],
                worker_id=row["worker_id"],
                failure=_json(row["failure"]),
            )
        )
    return tuple(earlier)


def _waiting_for(row: Record) -> str | None:
    match row["waiting_for"]:
        case "paused":
            return f"Queue {row['queue']!r} is paused; it runs when the queue is resumed."
        case "unoffered":
            return (
                f"No live worker offers {row['name']!r} on queue {row['queue']!r}; "
                "it runs when one starts."
            )
        case "unreaped":
            return (
                "Its worker is gone, and no maintenance process is running to give it to another; "
                "start `asyncflow maintenance`."
            )
        case "unrelayed":
            return (
                "No maintenance process is running to send it through RabbitMQ; "
                "start `asyncflow maintenance`."
            )
        case "troubled":
            return f"It cannot be sent through RabbitMQ: {row['relay_trouble']}"
        case _:
            return None


def _json(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _write_cursor(task_id: UUID) -> str:
    return base64.urlsafe_b64encode(task_id.bytes).decode().rstrip("=")


def _read_cursor(cursor: str | None) -> UUID | None:
    if cursor is None:
        return None
    try:
        return UUID(bytes=base64.b64decode(cursor + "==", altchars=b"-_", validate=True))
    except (ValueError, binascii.Error):
        raise InvalidTask(
            [Fault("/cursor", "is not a cursor; pass the `next_cursor` of the page before")]
        ) from None
