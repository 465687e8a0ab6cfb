"""
What maintenance does to tasks: finds the leases of dead workers, expires, moves, prunes.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import NamedTuple
from uuid import UUID

from asyncflow.domain.retry import Backoff
from asyncflow.domain.states import State
from asyncflow.store.admission import IS_PENDING
from asyncflow.store.database import Executor
from asyncflow.store.endings import ending
from asyncflow.store.workers import HAS_NOT_ENDED


class LostLease(NamedTuple):
    """
    A task whose row says running although its worker is lost, stopped or unknown.

    Attributes:
        backoff: What its handler asks for, in that worker; the default if it is not known.
        worker_known: False if its worker has no row, and its fate is unknown: the database was
            restored from a backup, or is being restored.
    """

    task_id: UUID
    lease_id: UUID
    worker_id: UUID
    failures: int
    max_attempts: int
    cancel_requested: bool
    backoff: Backoff
    worker_known: bool


LOST_LEASES = """
    SELECT t.id AS task_id, t.lease_id, t.worker_id, t.failures, t.max_attempts,
           t.cancel_requested_at IS NOT NULL AS cancel_requested,
           w.backoffs -> t.name AS backoff,
           w.id IS NOT NULL AS worker_known
      FROM asyncflow.tasks_live t
      LEFT JOIN asyncflow.workers w ON w.id = t.worker_id
     WHERE t.worker_id IS NOT NULL                      -- running; index tasks_running
       AND (w.stopped_at IS NOT NULL OR w.lost_at IS NOT NULL OR (w.id IS NULL AND $2))
     LIMIT $1
"""


async def lost_leases(
    db: Executor, *, limit: int, of_unknown_workers: bool = True
) -> list[LostLease]:
    """
    Leases of workers that are gone, at most `limit`. Settle them under their `lease_id`.
    """
    rows = await db.fetch(LOST_LEASES, limit, of_unknown_workers)
    return [LostLease(**{**row, "backoff": _backoff(row["backoff"])}) for row in rows]


def _backoff(text: str | None) -> Backoff:
    if text is None:
        return Backoff()
    # A newer worker's may have fields that this version does not know, or values it refuses; one
    # row must not keep the reaper from all others.
    known = {field.name for field in fields(Backoff)}
    try:
        return Backoff(**{name: value for name, value in json.loads(text).items() if name in known})
    except (TypeError, ValueError):
        return Backoff()


EXPIRE = ending(
    State.CANCELLED,
    choosing="""WITH due AS MATERIALIZED (
        SELECT t.id
          FROM asyncflow.tasks_live t
         WHERE t.expires_at <= now()
           AND t.lease_id IS NULL                       -- waiting; index tasks_expiring
         ORDER BY t.expires_at
         LIMIT $1
           FOR UPDATE SKIP LOCKED)""",
    setting="""failure =
           '{"kind": "Expired", "message": "Its expires_at passed before it started."}'""",
    where="""t.id = ANY (ARRAY (SELECT id FROM due))
       AND t.state IN ('pending', 'queued')""",
)


async def expire(db: Executor, *, limit: int) -> int:
    """
    Cancel waiting tasks whose `expires_at` passed, at most `limit`; return how many.
    """
    return len(await db.fetch(EXPIRE, limit))


MOVE_TO_HANDLERS_QUEUE = f"""
    WITH misplaced AS MATERIALIZED (
        SELECT t.id, handler.queue
          FROM (SELECT DISTINCT ON (p.name) p.name, p.queue, p.published_at
                  FROM asyncflow.publications p
                 WHERE p.published_at > now() - $2 * interval '1 second'
                 ORDER BY p.name, p.updated_at DESC) AS handler
         CROSS JOIN LATERAL (
               SELECT t.id
                 FROM asyncflow.tasks_live t
                WHERE {IS_PENDING}                  -- index tasks_due
                  AND t.queue = $1
                  AND t.name = handler.name
                  -- Later submissions asked for $1 on purpose.
                  AND t.created_at < handler.published_at + $3 * interval '1 second'
                LIMIT $4
                  FOR UPDATE SKIP LOCKED) AS t
         WHERE handler.queue <> $1
           AND NOT EXISTS (SELECT FROM asyncflow.workers w
                            WHERE {HAS_NOT_ENDED}
                              AND handler.name = ANY (w.handlers)
                              AND $1 = ANY (w.queues))
         LIMIT $4)
    UPDATE asyncflow.tasks t
       SET queue = (SELECT m.queue FROM misplaced m WHERE m.id = t.id)
     WHERE t.id = ANY (ARRAY (SELECT id FROM misplaced))
       AND t.state = 'pending'
    RETURNING t.id
"""


async def move_to_handlers_queue(
    db: Executor, *, queue: str, since_seconds: float, late_seconds: float, limit: int
) -> int:
    """
    Move pending tasks from `queue` to the one that their handler asks for; return how many.

    Only those that were submitted before the handler was published, when their queue could not be
    known yet, and that no live worker takes from `queue`.

    Args:
        since_seconds: Leave out handlers that were published longer ago.
        late_seconds: How long after the publication an API process may not have known of it.
        limit: Maximum number of tasks.
    """
    rows = await db.fetch(MOVE_TO_HANDLERS_QUEUE, queue, since_seconds, late_seconds, limit)
    return len(rows)


PRUNE_FINISHED = """
    WITH old AS MATERIALIZED (
        SELECT t.id
          FROM asyncflow.tasks_finished t
         WHERE t.finished_at < now() - $1 * interval '1 day'
         ORDER BY t.finished_at
         LIMIT $2
           FOR UPDATE SKIP LOCKED),
    history AS (
        DELETE FROM asyncflow.attempts a
         WHERE a.task_id = ANY (ARRAY (SELECT id FROM old)))
    DELETE FROM asyncflow.tasks t
     WHERE t.id = ANY (ARRAY (SELECT id FROM old))
       AND t.state IN ('completed', 'failed', 'cancelled')
    RETURNING t.id
"""


async def prune_finished(db: Executor, *, older_than_days: float, limit: int) -> int:
    """
    Delete tasks that finished before the retention period, at most `limit`; return how many.
    """
    return len(await db.fetch(PRUNE_FINISHED, older_than_days, limit))


PROBE = """
    UPDATE asyncflow.probe
       SET written_at = now()
"""


async def probe(db: Executor) -> None:
    """
    Prove that the database takes writes, for the readiness check.

    Raises:
        StoreUnavailable: It does not.
    """
    await db.execute(PROBE)
