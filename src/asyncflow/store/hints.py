"""
Hints that go through RabbitMQ, as the rows of their tasks tell: which queues the relay may send
for, which tasks are queued, which hints were lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from asyncflow.store.admission import IS_DUE, IS_QUEUED, is_offered, is_paused
from asyncflow.store.database import Executor
from asyncflow.store.due import Admitted
from asyncflow.store.workers import HAS_NOT_ENDED


class OpenQueue(NamedTuple):
    """
    A queue that live workers consume and nobody paused.

    Attributes:
        names: The handler names some live worker offers on it.
        slots: Attempts its live workers can run at once, together.
        queued: Tasks on it that are queued now.
        queued_since: From when on to count them next time: none that is queued was so before.
    """

    name: str
    names: list[str]
    slots: int
    queued: int
    queued_since: datetime


# $1 queues, $2 from when on to count: parallel arrays.
OPEN_QUEUES = f"""
    -- in the order of `OpenQueue`
    SELECT open.queue, open.names, open.slots, hinted.count, hinted.since
      FROM (SELECT queue, array_agg(DISTINCT handler) AS names,
                   sum(w.slots) FILTER (WHERE number = 1)::int AS slots
              FROM asyncflow.workers w,
                   unnest(w.queues) AS queue,
                   unnest(w.handlers) WITH ORDINALITY AS h (handler, number)
             WHERE {HAS_NOT_ENDED}
             GROUP BY queue) AS open
      LEFT JOIN unnest($1::text[], $2::timestamptz[]) AS counted (queue, since)
        ON counted.queue = open.queue
     CROSS JOIN LATERAL (
           SELECT count(*),
                  -- A note that is being written now is a little older when it is there to see.
                  least(min(t.queued_at), now()) - interval '15 seconds' AS since
             FROM asyncflow.tasks_live t
            WHERE {IS_QUEUED}                           -- index tasks_queued
              AND t.queue = open.queue
              AND t.queued_at >= coalesce(counted.since, '-infinity')) AS hinted
     WHERE NOT {is_paused("open.queue")}
     ORDER BY open.queue
"""


async def open_queues(
    db: Executor, *, queued_since: Mapping[str, datetime] | None = None
) -> list[OpenQueue]:
    """
    Every queue that tasks may be admitted to now.

    Args:
        queued_since: Per queue, count no task that was queued before. Beside an old transaction
            the index has an entry for every task that was ever queued since it began.
    """
    since = queued_since or {}
    rows = await db.fetch(OPEN_QUEUES, list(since.keys()), list(since.values()))
    return [OpenQueue._make(row) for row in rows]


MARK_QUEUED = f"""
    WITH sent AS MATERIALIZED (
        SELECT t.id
          FROM asyncflow.tasks t
         WHERE t.id = ANY ($1)
           AND t.state = 'pending'
           -- Not if it was claimed meanwhile and came back, or was declined: its hint is used up.
           AND t.attempt = ($2::int[])[array_position($1::uuid[], t.id)]
           AND {IS_DUE}
         ORDER BY t.id
           -- A row that is locked is being claimed, cancelled or expired: leave it.
           FOR UPDATE SKIP LOCKED)
    UPDATE asyncflow.tasks t
       SET state = 'queued',
           queued_at = now()
     WHERE t.id = ANY (ARRAY (SELECT id FROM sent))
       AND t.state = 'pending'
"""


async def mark_queued(db: Executor, sent: Sequence[Admitted]) -> None:
    """
    Note that hints for these tasks are in RabbitMQ; those that moved on meanwhile are left.
    """
    await db.execute(MARK_QUEUED, [task.task_id for task in sent], [task.attempt for task in sent])


UNQUEUE = f"""
    UPDATE asyncflow.tasks t
       SET state = 'pending',
           queued_at = NULL,
           run_at = now() + $2 * interval '1 second'
     WHERE t.id = ANY ($1)
       -- `pending` too: a hint may overtake the relay's note that it was sent.
       AND t.state IN ('pending', 'queued')
       AND {IS_DUE}
       AND NOT {is_offered("$3")}
"""


async def decline(
    db: Executor, task_ids: Sequence[UUID], *, names: Sequence[str], delay_seconds: float
) -> None:
    """
    Give back due tasks whose hints reached a worker which offers only `names`.

    They become due again after `delay_seconds`, so that a worker that cannot run them
    and the relay do not play ball with them.
    """
    await db.execute(UNQUEUE, list(task_ids), delay_seconds, list(names))


COUNT_UNKNOWN = """
    SELECT cardinality($1::uuid[]) - count(*)
      FROM asyncflow.tasks t
     WHERE t.id = ANY ($1)
"""


async def count_unknown(db: Executor, task_ids: Sequence[UUID]) -> int:
    """
    How many of these, all different, are no tasks of this database.
    """
    return int(await db.fetchval(COUNT_UNKNOWN, task_ids))


_UNQUEUE_CHOSEN = """
    UPDATE asyncflow.tasks t
       SET state = 'pending',
           queued_at = NULL
     WHERE t.id = ANY (ARRAY (SELECT id FROM chosen))
       AND t.state = 'queued'
    RETURNING t.id
"""

UNQUEUE_LOST = f"""
    WITH chosen AS MATERIALIZED (
        SELECT t.id
          FROM asyncflow.tasks_live t
         WHERE t.lease_id IS NULL                               -- index tasks_queued
           AND t.queue = $1
           AND t.queued_at >= coalesce($5::timestamptz, '-infinity')
           AND t.queued_at < now() - $2 * interval '1 second'
         ORDER BY t.queued_at
         LIMIT greatest(0, least($4::bigint, (
               SELECT count(*)
                 FROM asyncflow.tasks_live q
                WHERE q.lease_id IS NULL
                  AND q.queued_at >= coalesce($5::timestamptz, '-infinity')
                  AND q.queue = $1) - $3))
           FOR UPDATE SKIP LOCKED)
    {_UNQUEUE_CHOSEN}
"""


async def unqueue_lost(
    db: Executor,
    *,
    queue: str,
    older_than_seconds: float,
    ready: int,
    limit: int,
    since: datetime | None = None,
) -> int:
    """
    Put queued tasks whose hint must be lost back to pending, oldest first; return how many.

    Of all queued tasks, at most `ready` can still have a hint, the number of messages
    RabbitMQ held ready a moment ago; the surplus has none. Only tasks queued for longer than
    `older_than_seconds` are taken for it: a younger one's hint may be on its way to a
    worker. A wrong guess sends a second hint, which a claim ignores.

    Args:
        since: None of them was queued before; see `open_queues`.
    """
    rows = await db.fetch(UNQUEUE_LOST, queue, older_than_seconds, ready, limit, since)
    return len(rows)


UNQUEUE_DROPPED = f"""
    WITH chosen AS MATERIALIZED (
        SELECT t.id
          FROM asyncflow.tasks t
         WHERE t.id = ANY ($1)
           AND t.state = 'queued'
         ORDER BY t.id
           FOR UPDATE SKIP LOCKED)
    {_UNQUEUE_CHOSEN}
"""


async def unqueue_dropped(db: Executor, task_ids: Sequence[UUID]) -> int:
    """
    Put those of these tasks that are queued back to pending: their hints were dropped.
    """
    return len(await db.fetch(UNQUEUE_DROPPED, task_ids))


UNQUEUE_STRANDED = f"""
    WITH chosen AS MATERIALIZED (
        SELECT t.id
          FROM asyncflow.tasks_live t
         WHERE {IS_QUEUED}                              -- index tasks_queued
         LIMIT $1
           FOR UPDATE SKIP LOCKED)
    {_UNQUEUE_CHOSEN}
"""


async def unqueue_stranded(db: Executor, *, limit: int) -> int:
    """
    Put queued tasks back to pending where no broker is used any more; return how many.

    A worker that still uses one loses nothing by it: a hint may meet a pending task.
    """
    return len(await db.fetch(UNQUEUE_STRANDED, limit))
