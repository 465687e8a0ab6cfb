"""
Claiming tasks, and reporting their progress under the claim.

A claim moves a task to `running` and stamps it with a `lease_id`, one fresh UUID per claim
statement. Every later write of the attempt guards ``state = 'running' AND lease_id = …``. A
worker that lost its lease, because it died, hung or was cut off, therefore updates zero rows and
learns that its result is void.

The lease has no expiry of its own. It lives as long as its worker is alive, which is one
heartbeat row per worker (`store.workers`); `store.upkeep` finds the leases of dead workers,
and `store.settle` ends their attempts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from asyncflow.domain.task import Claim
from asyncflow.store import admission, columns
from asyncflow.store.database import Executor


class Offer(NamedTuple):
    """
    A handler name that a worker can run, with its policy for tasks that leave it open.
    """

    name: str
    max_attempts: int
    timeout_seconds: float


# $1 lease_id, $2 worker_id, $3 names, $4 max_attempts, $5 timeouts: parallel arrays of offers.
_TAKE_CHOSEN = f"""
    UPDATE asyncflow.tasks t
       SET state = 'running',
           lease_id = $1,
           worker_id = $2,
           attempt = t.attempt + 1,
           max_attempts = coalesce(t.max_attempts, offer.max_attempts),
           timeout_seconds = coalesce(t.timeout_seconds, offer.timeout_seconds),
           started_at = now(),
           failure = NULL,
           progress = NULL
      FROM unnest($3::text[], $4::int[], $5::float8[])
           AS offer (name, max_attempts, timeout_seconds)
     WHERE t.id = ANY (ARRAY (SELECT id FROM chosen))
       AND t.state IN ('pending', 'queued')
       AND offer.name = t.name
    RETURNING {columns.of_task(columns.CLAIMED)}
"""


def _claim_due(*, since: str = "") -> str:
    found = admission.first_of(
        queue="open.queue",
        priority="open.priority",
        condition=f"{admission.may_start(names='$3')} {since}",
        limit="$7",
        lock="FOR UPDATE SKIP LOCKED",
    )
    return f"""
    WITH chosen AS MATERIALIZED (
        SELECT found.id
          FROM (SELECT level.priority, queue.name AS queue, queue.turn
                  FROM generate_series(9, 0, -1) AS level (priority)
                 CROSS JOIN unnest($6::text[]) WITH ORDINALITY AS queue (name, turn)
                 WHERE NOT {admission.is_paused("queue.name")}
                 ORDER BY level.priority DESC, queue.turn) AS open
         CROSS JOIN LATERAL ({found}) AS found
         LIMIT $7)
    {_TAKE_CHOSEN}
"""


CLAIM_DUE = _claim_due()

# $8 marks of one queue after the other
CLAIM_DUE_SINCE = _claim_due(
    since="AND t.run_at >= ($8::timestamptz[])[10 * open.turn + open.priority - 9]"
)


async def claim_due(
    db: Executor,
    *,
    lease_id: UUID,
    worker_id: UUID,
    offers: Sequence[Offer],
    queues: Sequence[str],
    limit: int,
    since: Mapping[str, Sequence[datetime]] | None = None,
) -> list[Claim]:
    """
    Take up to `limit` due tasks, highest priority first, without any broker.

    Args:
        lease_id: Fresh for this call.
        queues: Taken from in this order within one priority; callers rotate it so that no
            queue waits for another's backlog.
        since: Per queue, leave out what was due before these marks; see `due`.
    """
    arguments = (lease_id, worker_id, *_columns(offers), list(queues), limit)
    if since:
        marks = [mark for queue in queues for mark in since[queue]]
        rows = await db.fetch(CLAIM_DUE_SINCE, *arguments, marks)
    else:
        rows = await db.fetch(CLAIM_DUE, *arguments)
    return [Claim._make(row) for row in rows]


CLAIM_HINTED = f"""
    WITH chosen AS MATERIALIZED (
        SELECT t.id
          FROM asyncflow.tasks t
         WHERE t.id = ANY ($6)
           -- `pending` too: a hint may arrive before the relay marks its task.
           AND t.state IN ('pending', 'queued')
           AND {admission.may_start(names="$3")}
           AND NOT {admission.is_paused("t.queue")}
         ORDER BY t.id
           -- Waits for locked rows: the relay may be marking this task just now.
           FOR UPDATE OF t)
    {_TAKE_CHOSEN}
"""


async def claim_hinted(
    db: Executor,
    task_ids: Sequence[UUID],
    *,
    lease_id: UUID,
    worker_id: UUID,
    offers: Sequence[Offer],
) -> list[Claim]:
    """
    Take the tasks among `task_ids` that may start now; their hints came through RabbitMQ.

    Safe for any id at any time: only one caller wins, and a task that may not start is left alone.

    Args:
        lease_id: Fresh for this call.
    """
    rows = await db.fetch(CLAIM_HINTED, lease_id, worker_id, *_columns(offers), list(task_ids))
    return [Claim._make(row) for row in rows]


# What parallel arrays say about a task: $1 are ids, each of them once. A join with `unnest`
# would read better, but its plan compares every row with every entry (measured: a quarter of
# the rate at 500 rows), and it leaves the order in which rows are locked to the planner.
OWN = "[array_position($1::uuid[], t.id)]"
LEASE = f"($2::uuid[]){OWN}"

RECORD_PROGRESS = f"""
    UPDATE asyncflow.tasks t
       SET progress = ($3::text[]){OWN}::json
     WHERE t.id = ANY ($1)
       AND t.state = 'running'
       AND t.lease_id = {LEASE}
"""


async def record_progress(db: Executor, progress: Sequence[tuple[UUID, UUID, str]]) -> None:
    """
    Write the progress of running attempts: (task id, lease id, JSON text), once per task.
    """
    ids, leases, texts = zip(*progress, strict=True)
    await db.execute(RECORD_PROGRESS, ids, leases, texts)


def _columns(offers: Sequence[Offer]) -> tuple[list[str], list[int], list[float]]:
    return (
        [o.name for o in offers],
        [o.max_attempts for o in offers],
        [o.timeout_seconds for o in offers],
    )
