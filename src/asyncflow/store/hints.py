"""
Hints in RabbitMQ, from the side of the rows: which queues the relay may send hints for, which
tasks are queued, and which hints were lost.
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
    A queue that live workers consume and that is not paused.

    Attributes:
        names: The handler names that its live workers offer.
        slots: How many attempts its live workers can run at the same time, together.
        queued: Its tasks that are queued now.
        queued_since: Where to begin counting them next time: none of them was queued earlier.
    """

    name: str
    names: list[str]
    slots: int
    queued: int
    queued_since: datetime


# $1 queues, $2 where to begin counting: parallel arrays.
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
                  -- A mark that is being written now becomes visible a little later.
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
    Every queue that hints may be sent for now.

    Args:
        queued_since: Per queue, count no task that was queued earlier. While an old transaction is
            open, the index keeps an entry for every task that was queued since it began.
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
           -- Not if it was claimed meanwhile and put back, or was declined: its hint is used up.
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
    Mark tasks as queued: their hints are in RabbitMQ. Tasks that moved on meanwhile stay as they
    are.
    """
    await db.execute(MARK_QUEUED, [task.task_id for task in sent], [task.attempt for task in sent])


UNQUEUE = f"""
    UPDATE asyncflow.tasks t
       SET state = 'pending',
           queued_at = NULL,
           run_at = now() + $2 * interval '1 second'
     WHERE t.id = ANY ($1)
       -- `pending` too: a hint may arrive before the relay marks its task.
       AND t.state IN ('pending', 'queued')
       AND {IS_DUE}
       AND NOT {is_offered("$3")}
"""


async def decline(
    db: Executor, task_ids: Sequence[UUID], *, names: Sequence[str], delay_seconds: float
) -> None:
    """
    Put due tasks back whose hints reached a worker that offers only `names`.

    They are due again after `delay_seconds`, so that their hints do not bounce between the relay
    and a worker that cannot run them.
    """
    await db.execute(UNQUEUE, list(task_ids), delay_seconds, list(names))


COUNT_UNKNOWN = """
    SELECT cardinality($1::uuid[]) - count(*)
      FROM asyncflow.tasks t
     WHERE t.id = ANY ($1)
"""


async def count_unknown(db: Executor, task_ids: Sequence[UUID]) -> int:
    """
    How many of these ids, all different, belong to no task of this database.
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
    Put queued tasks back to pending whose hints must be lost, oldest first; return how many.

    RabbitMQ held at most `ready` hints a moment ago, so of all queued tasks only as many can still
    have one; the surplus has none. It is taken from tasks that have been queued for longer than
    `older_than_seconds`: the hint of a younger one may be on its way to a worker. A wrong guess
    sends a second hint, which a claim ignores.

    Args:
        since: None of them was queued earlier; see `open_queues`.
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
    Put the queued tasks among these back to pending: their hints were dropped.
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
    Put queued tasks back to pending in a system that no longer uses a broker; return how many.

    A worker that still uses one loses nothing: a hint may meet a pending task.
    """
    return len(await db.fetch(UNQUEUE_STRANDED, limit))
