"""
Pausing, resuming and listing queues. A paused queue accepts tasks and starts none.

Queues are not declared: a queue exists as long as a task waits or runs on it, a live worker
serves it, a handler names it, or it is paused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from asyncflow.errors import QueueNotFound
from asyncflow.store.admission import IS_DUE, IS_PENDING, IS_QUEUED
from asyncflow.store.database import Executor
from asyncflow.store.workers import IS_LIVE

PAUSE = """
    INSERT INTO asyncflow.queues (name, paused_at)
    VALUES ($1, now())
        ON CONFLICT (name) DO UPDATE
       SET paused_at = coalesce(asyncflow.queues.paused_at, now())
"""


async def pause(db: Executor, queue: str) -> None:
    """
    Stop starting tasks of `queue`, which need not exist yet. Running ones continue.
    """
    await db.execute(PAUSE, queue)


RESUME = """
    UPDATE asyncflow.queues
       SET paused_at = NULL
     WHERE name = $1
"""


async def resume(db: Executor, queue: str) -> None:
    """
    Start tasks of `queue` again.
    """
    await db.execute(RESUME, queue)


async def check_exists(db: Executor, queue: str) -> None:
    """
    Refuse a name that may be a typo.

    Raises:
        QueueNotFound: No queue has this name.
    """
    known = [found.name for found in await list_queues(db, count_max=0)]
    if queue not in known:
        raise QueueNotFound(queue, known=known)


@dataclass(frozen=True, slots=True)
class Queue:
    """
    A queue at one moment of the database's clock.

    Attributes:
        waiting: Pending and queued tasks, including those that are not due yet.
        oldest_due_at: When the task that has waited longest became due; None if none is due.
        workers, slots: Live worker processes that serve it, and how many tasks they can run at
            the same time, on all of their queues.
    """

    name: str
    paused_at: datetime | None
    waiting: int
    running: int
    oldest_due_at: datetime | None
    workers: int
    slots: int


# Names of queues, each found by one step through an index, however many tasks wait there.
_STEP = """
        (SELECT t.queue
           FROM asyncflow.tasks_live t
          WHERE {condition}
          ORDER BY t.queue
          LIMIT 1)
         UNION ALL
        SELECT (SELECT t.queue
                  FROM asyncflow.tasks_live t
                 WHERE {condition}
                   AND t.queue > {name}.queue
                 ORDER BY t.queue
                 LIMIT 1)
          FROM {name}
         WHERE {name}.queue IS NOT NULL"""

# $1 the most tasks to count per queue.
LIST_QUEUES = f"""
    WITH RECURSIVE
    pending (queue) AS ({_STEP.format(condition=IS_PENDING, name="pending")}),
    queued (queue) AS ({_STEP.format(condition=IS_QUEUED, name="queued")}),
    running AS MATERIALIZED (
        SELECT t.queue, count(*) AS tasks
          FROM asyncflow.tasks_live t
         WHERE t.worker_id IS NOT NULL                  -- index tasks_running
         GROUP BY t.queue),
    serving AS MATERIALIZED (
        SELECT queue, count(*) AS workers, sum(w.slots) AS slots
          FROM asyncflow.workers w, unnest(w.queues) AS queue
         WHERE {IS_LIVE}
         GROUP BY queue),
    known (name) AS (
        SELECT queue FROM pending WHERE queue IS NOT NULL
         UNION SELECT queue FROM queued WHERE queue IS NOT NULL
         UNION SELECT queue FROM running
         UNION SELECT queue FROM serving
         UNION SELECT queue FROM asyncflow.publications
         UNION SELECT name FROM asyncflow.queues WHERE paused_at IS NOT NULL)
    -- in the order of `Queue`
    SELECT k.name,
           (SELECT q.paused_at FROM asyncflow.queues q WHERE q.name = k.name) AS paused_at,
           (SELECT count(*)
              FROM (SELECT FROM asyncflow.tasks_live t
                     WHERE t.queue = k.name AND {IS_PENDING} LIMIT $1) AS counted)
         + (SELECT count(*)
              FROM (SELECT FROM asyncflow.tasks_live t
                     WHERE t.queue = k.name AND {IS_QUEUED} LIMIT $1) AS counted) AS waiting,
           coalesce((SELECT r.tasks FROM running r WHERE r.queue = k.name), 0) AS running,
           (SELECT min(oldest.run_at)
              FROM generate_series(0, 9) AS priority,
                   LATERAL (SELECT t.run_at
                              FROM asyncflow.tasks_live t
                             WHERE t.queue = k.name
                               AND t.priority = priority.priority
                               AND {IS_DUE}
                               AND {IS_PENDING}
                             ORDER BY t.run_at
                             LIMIT 1) AS oldest) AS oldest_due_at,
           coalesce(s.workers, 0) AS workers,
           coalesce(s.slots, 0) AS slots
      FROM known k
      LEFT JOIN serving s ON s.queue = k.name
     ORDER BY k.name
"""

COUNT_MAX = 100_000


async def list_queues(db: Executor, *, count_max: int = COUNT_MAX) -> Sequence[Queue]:
    """
    Every queue that exists, by name.

    Args:
        count_max: `Queue.waiting` counts at most this many pending and as many queued tasks.
    """
    return [Queue(*row) for row in await db.fetch(LIST_QUEUES, count_max)]
