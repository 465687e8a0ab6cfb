"""
What `asyncflow bench` asks the database: who would run its tasks, how many are unfinished, and
when each was submitted, started and finished by the database's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from asyncflow.store.admission import is_paused
from asyncflow.store.database import Executor
from asyncflow.store.workers import IS_LIVE


class Capacity(NamedTuple):
    """
    Who runs tasks of one name on one queue, and what competes with them.

    Attributes:
        workers: Live worker processes that offer the name on the queue.
        slots: How many tasks they can run at the same time, together.
        unfinished: Other tasks that wait or run anywhere, at most `UNFINISHED_MAX`.
    """

    workers: int
    slots: int
    is_paused: bool
    unfinished: int


UNFINISHED_MAX = 100_000

RUNNERS = f"""
    SELECT count(w.id) AS workers,
           coalesce(sum(w.slots), 0) AS slots,
           {is_paused("$2")} AS is_paused,
           (SELECT count(*)
              FROM (SELECT FROM asyncflow.tasks_live LIMIT $3) AS live) AS unfinished
      FROM asyncflow.workers w
     WHERE {IS_LIVE}
       AND $1 = ANY (w.handlers)
       AND $2 = ANY (w.queues)
"""


async def capacity(db: Executor, name: str, queue: str) -> Capacity:
    """
    Who would run a task of this name on this queue now.
    """
    row = await db.fetchrow(RUNNERS, name, queue, UNFINISHED_MAX)
    assert row is not None
    return Capacity(row["workers"], row["slots"], row["is_paused"], row["unfinished"])


UNFINISHED = """
    SELECT t.id
      FROM asyncflow.tasks_live t
     WHERE t.id = ANY ($1)
"""


async def unfinished(db: Executor, task_ids: Sequence[UUID]) -> list[UUID]:
    """
    The tasks among these that still wait or run.
    """
    return [row["id"] for row in await db.fetch(UNFINISHED, task_ids)]


class Course(NamedTuple):
    """
    How some tasks went, all of them finished.

    Attributes:
        completed: How many, without failed and cancelled ones.
        seconds: From the first one's submission to the last one's end.
        start_seconds, finish_seconds: From a task's submission to its start, and to its end:
            the 50th, 95th and 99th percentile.
    """

    completed: int
    seconds: float
    start_seconds: tuple[float, ...]
    finish_seconds: tuple[float, ...]


COURSE = """
    SELECT count(*) FILTER (WHERE state = 'completed') AS completed,
           extract(epoch FROM max(finished_at) - min(created_at))::float8 AS seconds,
           percentile_cont(ARRAY [0.5, 0.95, 0.99]) WITHIN GROUP
               (ORDER BY extract(epoch FROM started_at - created_at)::float8) AS start_seconds,
           percentile_cont(ARRAY [0.5, 0.95, 0.99]) WITHIN GROUP
               (ORDER BY extract(epoch FROM finished_at - created_at)::float8) AS finish_seconds
      FROM asyncflow.tasks_finished t
     WHERE t.id = ANY ($1)
"""


async def course(db: Executor, task_ids: Sequence[UUID]) -> Course:
    """
    How these tasks went. Ask once all of them are finished.
    """
    row = await db.fetchrow(COURSE, task_ids)
    assert row is not None
    return Course(
        row["completed"],
        row["seconds"] or 0.0,
        tuple(row["start_seconds"] or ()),
        tuple(row["finish_seconds"] or ()),
    )


REMOVE = """
    WITH history AS (
        DELETE FROM asyncflow.attempts a
         WHERE a.task_id = ANY ($1))
    DELETE FROM asyncflow.tasks t
     WHERE t.id = ANY ($1)
       -- A running one belongs to its worker.
       AND t.state IN ('pending', 'queued', 'completed', 'failed', 'cancelled')
    RETURNING t.id
"""


async def remove(db: Executor, task_ids: Sequence[UUID]) -> int:
    """
    Delete these tasks, finished or waiting, except running ones; return how many.

    For a measurement's own tasks only. A hint that is still on its way finds nothing and is
    dropped.
    """
    return len(await db.fetch(REMOVE, task_ids))
