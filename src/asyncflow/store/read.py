"""
Reading tasks: one with everything about it, or a page of many.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from asyncflow.domain.states import State, display_status
from asyncflow.domain.task import AttemptRecord, Task
from asyncflow.errors import FieldError, InvalidTask, TaskNotFound
from asyncflow.store.admission import IS_DUE, is_offered, is_paused
from asyncflow.store.columns import DETAILED, LISTED, of_task
from asyncflow.store.database import Executor, Record
from asyncflow.store.presence import SILENT_SECONDS_MAX
from asyncflow.store.workers import IS_LIVE


@dataclass(frozen=True, slots=True)
class Page:
    """
    One page of a list, newest first; `next_cursor` is None on the last page.
    """

    tasks: tuple[Task, ...]
    next_cursor: str | None


GET = f"""
    SELECT {of_task(LISTED + DETAILED)}, now() AS now,
           (SELECT json_agg(a ORDER BY a.attempt)
              FROM asyncflow.attempts a
             WHERE a.task_id = t.id) AS attempts,
           CASE WHEN t.state = 'running'
                 AND m.is_here IS NOT TRUE
                 AND NOT EXISTS (SELECT FROM asyncflow.workers w
                                  WHERE w.id = t.worker_id AND {IS_LIVE})
                THEN 'unreaped'
                WHEN t.state NOT IN ('pending', 'queued') OR NOT {IS_DUE} THEN NULL
                WHEN {is_paused("t.queue")}
                THEN 'paused'
                WHEN NOT EXISTS (SELECT FROM asyncflow.workers w
                                  WHERE {IS_LIVE}
                                    AND {is_offered("w.handlers")}
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
    Read one task with its payload, result and attempts.

    Args:
        through_relay: Whether RabbitMQ carries hints, so that tasks start only while maintenance
            runs.

    Raises:
        TaskNotFound: This tenant has no task with this id.
    """
    row = await db.fetchrow(GET, tenant_id, task_id, through_relay)
    if row is None:
        raise TaskNotFound(task_id)
    return _task(row, LISTED + DETAILED, waiting_for=_waiting_for(row), attempts=_attempts(row))


LIST = f"""
    SELECT {of_task(LISTED)}, now() AS now
      FROM asyncflow.tasks t
     WHERE t.tenant_id = $1
       AND {{filters}}
     ORDER BY t.id DESC
     LIMIT $2
"""

STATUS_FILTERS = {
    "PENDING": f"t.state = 'pending' AND {IS_DUE}",
    "SCHEDULED": f"t.state = 'pending' AND NOT {IS_DUE} AND t.failures = 0",
    "RETRYING": f"t.state = 'pending' AND NOT {IS_DUE} AND t.failures > 0",
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
        statuses: Any of `STATUS_FILTERS`; none means every status.
        cursor: The `next_cursor` of the previous page; None starts at the newest task.
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
        tasks=tuple(_task(row, LISTED) for row in rows),
        next_cursor=_write_cursor(rows[-1]["id"]) if more else None,
    )


def status_filter(statuses: Collection[str]) -> str:
    """
    The condition that selects tasks with any of these statuses; all tasks if there are none.
    """
    # Always in the same order: each statement has its own plan.
    conditions = [f"({STATUS_FILTERS[status]})" for status in STATUS_FILTERS if status in statuses]
    return f"({' OR '.join(conditions)})" if conditions else "true"


def _task(row: Record, columns: Sequence[str], **computed: Any) -> Task:
    values = {column: row[column] for column in columns}
    values["state"] = state = State(row["state"])
    values["failure"] = _json(row["failure"])
    values["progress"] = _progress(row)
    status = display_status(state, run_at=row["run_at"], failures=row["failures"], now=row["now"])
    return Task(**values, **computed, status=status)


def _progress(row: Record) -> dict[str, Any] | None:
    progress: dict[str, Any] | None = _json(row["progress"])
    if progress is not None and row["state"] == State.COMPLETED:
        # The handler's last report came before its end.
        return {"fraction": 1.0, "message": None}
    return progress


def _attempts(row: Record) -> tuple[AttemptRecord, ...]:
    earlier = [
        AttemptRecord(
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
    # The row itself is the record of the latest attempt until that is archived.
    if row["attempt"] and (not earlier or earlier[-1].attempt < row["attempt"]):
        earlier.append(
            AttemptRecord(
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
            [FieldError("/cursor", "is not a cursor; pass the `next_cursor` of the page before")]
        ) from None
