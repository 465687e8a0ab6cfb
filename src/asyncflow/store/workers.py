"""
Worker processes as the database knows them: alive, stopped or lost.

A worker is a fresh UUID per start, never a host name: a restarted pod must not heartbeat for
its dead predecessor. One heartbeat row keeps all its leases. The worker also holds a session
advisory lock, so that a killed worker is known to be dead within seconds: the kernel closes its
connection and PostgreSQL frees the lock. Where a lock proves nothing, behind a pooler or across a
partition, the age of the heartbeat alone decides.

Once the reaper has declared a worker lost, no heartbeat revives it; it must come back as a new
worker. Its leases were given away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from asyncflow.domain.retry import Backoff
from asyncflow.store.database import Executor

HAS_NOT_ENDED = "w.stopped_at IS NULL AND w.lost_at IS NULL"
"""A worker `w` has neither stopped nor been declared dead."""

# Only maintenance declares workers lost, and it may not be running.
IS_LIVE = f"""{HAS_NOT_ENDED}
           AND w.heartbeat_at > now() - w.lease_seconds * interval '1 second'"""
"""Its leases hold, too."""


@dataclass(frozen=True, slots=True)
class Registration:
    """
    What a worker registers when it starts.

    Attributes:
        name: For people: host and process id.
        handlers: Names it can run.
        handler_queues: The queue that each of them asks for, in the same order.
        backoffs: The backoff that each of them asks for, by name. Stored if it differs from the
            default and is all data, so that the reaper can follow it.
        holds_lock: Whether it will hold the lock of its id; False behind a pooler, where its
            heartbeat is the only sign of life.
    """

    id: UUID
    name: str
    queues: tuple[str, ...]
    handlers: tuple[str, ...]
    slots: int
    heartbeat_seconds: float
    lease_seconds: float
    holds_lock: bool = True
    handler_queues: tuple[str, ...] = ()
    backoffs: Mapping[str, Backoff] = field(default_factory=dict)


def lock_key(worker_id: UUID) -> int:
    """
    The advisory lock that stands for this worker's life: the 62 random bits at the end of its id.
    """
    return worker_id.int & 0x3FFF_FFFF_FFFF_FFFF


REGISTER = """
    INSERT INTO asyncflow.workers
           (id, name, queues, handlers, slots, lock_key, heartbeat_seconds, lease_seconds,
            handler_queues, backoffs)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::json)
        ON CONFLICT (id) DO UPDATE
       SET heartbeat_at = now()
     WHERE asyncflow.workers.lost_at IS NULL
"""


async def register(db: Executor, worker: Registration) -> None:
    """
    Register a worker as alive.
    """
    await db.execute(
        REGISTER,
        worker.id,
        worker.name,
        list(worker.queues),
        list(worker.handlers),
        worker.slots,
        lock_key(worker.id) if worker.holds_lock else None,
        worker.heartbeat_seconds,
        worker.lease_seconds,
        list(worker.handler_queues),
        _backoffs_json(worker.backoffs),
    )


def _backoffs_json(backoffs: Mapping[str, Backoff]) -> str | None:
    stored = {
        name: asdict(backoff)
        for name, backoff in backoffs.items()
        if backoff.is_data and backoff != Backoff()
    }
    # Fractions and the like are numbers to a handler, but not to JSON.
    return json.dumps(stored, default=float) if stored else None


HOLD_LOCK = """
    SELECT pg_try_advisory_lock($1)
"""


async def hold_lock(connection: Executor, worker_id: UUID) -> bool:
    """
    Take the lock that proves this worker alive, for as long as this connection lives.
    """
    return bool(await connection.fetchval(HOLD_LOCK, lock_key(worker_id)))


HEARTBEAT = """
    UPDATE asyncflow.workers
       SET heartbeat_at = now()
     WHERE id = $1
       AND stopped_at IS NULL
       AND lost_at IS NULL
    RETURNING id
"""


async def heartbeat(db: Executor, worker_id: UUID) -> bool:
    """
    Keep every lease of this worker; False if it was declared dead and must start again as another
    worker, or if there is no row of it.
    """
    return await db.fetchval(HEARTBEAT, worker_id) is not None


IS_OVER = """
    SELECT EXISTS (SELECT
                     FROM asyncflow.workers
                    WHERE id = $1
                      AND (stopped_at IS NOT NULL OR lost_at IS NOT NULL))
"""


async def is_over(db: Executor, worker_id: UUID) -> bool:
    """
    Whether this worker was declared dead or has stopped. A worker without a row is not over: the
    database may be being restored.
    """
    return bool(await db.fetchval(IS_OVER, worker_id))


class Held(NamedTuple):
    """
    A lease the database thinks a worker holds.
    """

    task_id: UUID
    lease_id: UUID
    cancel_requested: bool


HELD = """
    SELECT id, lease_id, cancel_requested_at IS NOT NULL AS cancel_requested
      FROM asyncflow.tasks_live
     WHERE worker_id = $1                               -- running; index tasks_running
       AND (started_at < now() - $2 * interval '1 second' OR cancel_requested_at IS NOT NULL)
"""


async def held(db: Executor, worker_id: UUID, *, older_than_seconds: float) -> list[Held]:
    """
    This worker's leases older than this, and all of those whose task is to be cancelled.

    A worker compares them with what it is running: one that it does not know is a claim whose
    answer never arrived.
    """
    rows = await db.fetch(HELD, worker_id, older_than_seconds)
    return [Held(r["id"], r["lease_id"], r["cancel_requested"]) for r in rows]


STOP = """
    UPDATE asyncflow.workers
       SET stopped_at = now()
     WHERE id = $1
       AND stopped_at IS NULL
"""


async def stop(db: Executor, worker_id: UUID) -> None:
    """
    Sign this worker off; the next reap settles any lease it still holds.
    """
    await db.execute(STOP, worker_id)


MARK_LOST = f"""
    UPDATE asyncflow.workers w
       SET lost_at = now()
      FROM (SELECT greatest(pg_postmaster_start_time(), now() - $2 * interval '1 second') AS ended)
           AS outage
     WHERE {HAS_NOT_ENDED}
       -- While PostgreSQL was away no worker could beat, and every lock was freed. Workers that
       -- have beaten since are judged as usual; the others get time to come back.
       AND (w.heartbeat_at > outage.ended
            OR outage.ended < now() - $1 * interval '1 second')
       AND (w.heartbeat_at < now() - w.lease_seconds * interval '1 second'
            -- A free lock is proof of death only if the heartbeat is overdue as well.
            OR (w.heartbeat_at < now() - (2 * w.heartbeat_seconds + 0.5) * interval '1 second'
                AND w.lock_key IS NOT NULL
                AND NOT EXISTS (
                    SELECT
                      FROM pg_locks l
                     WHERE l.locktype = 'advisory'
                       AND l.granted
                       AND l.objsubid = 1
                       AND l.database = (SELECT oid FROM pg_database
                                          WHERE datname = current_database())
                       AND (l.classid::bigint << 32 | l.objid::bigint) = w.lock_key)))
    RETURNING w.id, w.name
"""

OUTAGE_SECONDS_MAX = 1e9


async def mark_lost(
    db: Executor, *, grace_seconds: float, outage_seconds_ago: float = OUTAGE_SECONDS_MAX
) -> list[tuple[UUID, str]]:
    """
    Declare workers lost that are dead or cut off; return the id and name of each.

    From here on they hold no lease: `upkeep.lost_leases` lists what they were running.

    Args:
        grace_seconds: How long after an outage neither silence nor a free lock counts against a
            worker that has not been back.
        outage_seconds_ago: When the caller last could not reach PostgreSQL. The start of the
            server always counts as an outage.
    """
    ago = min(outage_seconds_ago, OUTAGE_SECONDS_MAX)
    rows = await db.fetch(MARK_LOST, grace_seconds, ago)
    return [(row["id"], row["name"]) for row in rows]


@dataclass(frozen=True, slots=True)
class Living:
    """
    A worker that has neither stopped nor been declared dead.

    Attributes:
        running: Tasks it holds a lease on.
        silent_seconds: Since its latest heartbeat, by the database's clock.
        is_overdue: Its leases have run out: it is dead or cut off, and maintenance has not
            declared it lost yet.
    """

    id: UUID
    name: str
    queues: Sequence[str]
    running: int
    slots: int
    started_at: datetime
    silent_seconds: float
    is_overdue: bool


LIST_WORKERS = f"""
    WITH running AS MATERIALIZED (
        SELECT t.worker_id, count(*) AS tasks
          FROM asyncflow.tasks_live t
         WHERE t.worker_id IS NOT NULL                  -- index tasks_running
         GROUP BY t.worker_id)
    -- in the order of `Living`
    SELECT w.id, w.name, w.queues, coalesce(r.tasks, 0) AS running, w.slots, w.started_at,
           extract(epoch FROM now() - w.heartbeat_at)::float8 AS silent_seconds,
           w.heartbeat_at < now() - w.lease_seconds * interval '1 second' AS is_overdue
      FROM asyncflow.workers w
      LEFT JOIN running r ON r.worker_id = w.id
     WHERE {HAS_NOT_ENDED}
     ORDER BY w.started_at
"""


async def list_workers(db: Executor) -> Sequence[Living]:
    """
    Workers that are considered alive, oldest first.
    """
    return [Living(*row) for row in await db.fetch(LIST_WORKERS)]


PRUNE = """
    DELETE FROM asyncflow.workers
     WHERE coalesce(stopped_at, lost_at) < now() - interval '1 day'
"""


PRUNE_PUBLICATIONS = f"""
    DELETE FROM asyncflow.publications p
     WHERE p.updated_at < now() - interval '1 day'
       AND EXISTS (SELECT FROM asyncflow.publications newer
                    WHERE newer.name = p.name AND newer.updated_at > p.updated_at)
       AND NOT EXISTS (SELECT FROM asyncflow.workers w,
                              unnest(w.handlers, w.handler_queues) AS h (name, queue)
                        WHERE {HAS_NOT_ENDED}
                          AND (h.name, h.queue) = (p.name, p.queue))
"""


async def prune(db: Executor) -> None:
    """
    Delete workers that ended more than a day ago, and publications that handlers have left.
    """
    await db.execute(PRUNE)
    await db.execute(PRUNE_PUBLICATIONS)


PUBLISH_HANDLERS = """
    INSERT INTO asyncflow.publications AS p (name, queue, payload_schema)
    SELECT name, queue, payload_schema::json
      FROM unnest($1::text[], $2::text[], $3::text[]) AS new (name, queue, payload_schema)
     ORDER BY name
        ON CONFLICT (name, queue) DO UPDATE
       SET payload_schema = excluded.payload_schema,
           updated_at = now()
"""


class Published(NamedTuple):
    """
    What the API knows of a handler.

    Attributes:
        queue: The queue of its tasks, unless the submission names another.
        payload_schema: The JSON Schema of its payload.
        is_live: Whether a live worker declares it on this queue.
    """

    name: str
    queue: str
    payload_schema: Mapping[str, Any]
    is_live: bool = False


async def publish_handlers(db: Executor, handlers: Sequence[Published]) -> None:
    """
    Publish handlers to the API; per name and queue, the latest publication counts.
    """
    await db.execute(
        PUBLISH_HANDLERS,
        [h.name for h in handlers],
        [h.queue for h in handlers],
        [json.dumps(h.payload_schema) for h in handlers],
    )


PUBLISHED_HANDLERS = f"""
    WITH live AS MATERIALIZED (
        SELECT DISTINCT h.name, h.queue
          FROM asyncflow.workers w,
               unnest(w.handlers, w.handler_queues) AS h (name, queue)
         WHERE {HAS_NOT_ENDED})
    SELECT p.name, p.queue, p.payload_schema,
           coalesce((p.name, p.queue) IN (SELECT name, queue FROM live), false) AS is_live
      FROM asyncflow.publications p
     ORDER BY p.updated_at DESC, p.name
"""


async def published_handlers(db: Executor) -> list[Published]:
    """
    Every handler that was ever published, newest first.
    """
    rows = await db.fetch(PUBLISHED_HANDLERS)
    return [
        Published(r["name"], r["queue"], json.loads(r["payload_schema"]), r["is_live"])
        for r in rows
    ]
