"""
What a worker does under a lease: claim tasks, report progress, settle them.

A claim moves a task to `running` and stamps it with a `lease_id`, one fresh UUID per claim
statement. Every later write of the attempt guards ``state = 'running' AND lease_id = …``. A
worker whose lease was taken away, because it died, hung or was cut off, therefore updates
zero rows: its result is void, and it learns so.

The lease has no expiry of its own. It lives as long as its worker is alive, which is one
heartbeat row per worker (`store.workers`); `store.upkeep` finds the leases of dead workers
and settles them through this same file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from asyncflow.domain.outcome import Failure, Settlement
from asyncflow.domain.states import Event
from asyncflow.store.database import Executor
from asyncflow.store.lookback import Moments


class Offer(NamedTuple):
    """
    A handler name a worker can run, with what its policy says if the task does not.
    """

    name: str
    max_attempts: int
    timeout_seconds: float


class Claim(NamedTuple):
    """
    One task, leased to one worker for one attempt.

    Attributes:
        attempt: 1 for the first claim of the task, over all generations.
        failures: Punished attempts before this one, in this generation.
        payload: JSON text.
        claimed_at: By the database's clock.
    """

    task_id: UUID
    lease_id: UUID
    tenant_id: int
    name: str
    queue: str
    attempt: int
    failures: int
    max_attempts: int
    timeout_seconds: float
    payload: str
    claimed_at: datetime


# $1 lease_id, $2 worker_id, $3 names, $4 max_attempts, $5 timeouts: parallel arrays of offers.
_TAKE_CHOSEN = """
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
    -- in the order of `Claim`
    RETURNING t.id, t.lease_id, t.tenant_id, t.name, t.queue, t.attempt, t.failures,
              t.max_attempts, t.timeout_seconds, t.payload, t.started_at
"""


def _claim_due(*, since: str = "") -> str:
    return f"""
    WITH chosen AS MATERIALIZED (
        SELECT found.id
          FROM (SELECT level.priority, open.queue, open.turn
                  FROM generate_series(9, 0, -1) AS level (priority)
                 CROSS JOIN unnest($6::text[]) WITH ORDINALITY AS open (queue, turn)
                 WHERE NOT EXISTS (SELECT FROM asyncflow.queues q
                                    WHERE q.name = open.queue AND q.paused_at IS NOT NULL)
                 ORDER BY level.priority DESC, open.turn) AS look
         CROSS JOIN LATERAL (
               -- One index range per priority and queue: tasks that are not due yet are
               -- never stepped over, however many there are.
               SELECT t.id
                 FROM asyncflow.tasks_live t
                WHERE t.queued_at IS NULL AND t.lease_id IS NULL   -- pending; index tasks_due
                  AND t.queue = look.queue
                  AND t.priority = look.priority
                  AND t.run_at <= now()
                  {since}
                  AND (t.expires_at IS NULL OR t.expires_at > now())
                  AND t.name = ANY ($3)
                ORDER BY t.run_at, t.id
                LIMIT $7
                  FOR UPDATE SKIP LOCKED) AS found
         LIMIT $7)
    {_TAKE_CHOSEN}
"""


CLAIM_DUE = _claim_due()

# $8: per queue of $6 and priority, from when on; see `lookback`.
CLAIM_DUE_SINCE = _claim_due(
    since="AND t.run_at >= ($8::timestamptz[])[10 * look.turn + look.priority - 9]"
)


async def claim_due(
    db: Executor,
    *,
    lease_id: UUID,
    worker_id: UUID,
    offers: Sequence[Offer],
    queues: Sequence[str],
    limit: int,
    since: Mapping[str, Moments] | None = None,
) -> list[Claim]:
    """
    Take up to `limit` due tasks, highest priority first, without any broker.

    Args:
        lease_id: Fresh for this call.
        queues: Looked into in this order within one priority; callers rotate it so that
            no queue waits for another's backlog.
        since: Per queue and priority, leave out what was due before; see `lookback`.
    """
    arguments = (lease_id, worker_id, *_columns(offers), list(queues), limit)
    if since:
        moments = [moment for queue in queues for moment in since[queue]]
        rows = await db.fetch(CLAIM_DUE_SINCE, *arguments, moments)
    else:
        rows = await db.fetch(CLAIM_DUE, *arguments)
    return [Claim._make(row) for row in rows]


CLAIM_HINTED = f"""
    WITH chosen AS MATERIALIZED (
        SELECT t.id
          FROM asyncflow.tasks t
         WHERE t.id = ANY ($6)
           -- `pending` too: a hint may overtake the relay's note that it was sent.
           AND t.state IN ('pending', 'queued')
           AND t.run_at <= now()
           AND (t.expires_at IS NULL OR t.expires_at > now())
           AND t.name = ANY ($3)
           AND NOT EXISTS (SELECT FROM asyncflow.queues q
                            WHERE q.name = t.queue AND q.paused_at IS NOT NULL)
         ORDER BY t.id
           -- Waits for locked rows: the relay may be noting just now that it sent this hint.
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
    Take those of `task_ids` that may run now; the hints came through RabbitMQ.

    Safe for any id at any time: only one caller wins, and a task that is running,
    finished, paused, not due, or of a name not offered is left alone.

    Args:
        lease_id: Fresh for this call.
    """
    rows = await db.fetch(CLAIM_HINTED, lease_id, worker_id, *_columns(offers), list(task_ids))
    return [Claim._make(row) for row in rows]


# What parallel arrays say about a task: $1 are ids, each of them once. A join with `unnest`
# would read better, but its plan compares every row with every entry (measured: a quarter of
# the rate at 500 rows), and it leaves the order in which rows are locked to the planner.
_OWN = "[array_position($1::uuid[], t.id)]"
_LEASE = f"($2::uuid[]){_OWN}"

_JUST_CANCELLED = '{"kind": "Cancelled", "message": "Cancelled."}'

SETTLE_COMPLETED = f"""
    UPDATE asyncflow.tasks t
       SET state = 'completed',
           result = ($3::text[]){_OWN}::json,
           finished_at = now()
     WHERE t.id = ANY ($1)
       AND t.state = 'running'
       AND t.lease_id = {_LEASE}      -- fence: a newer claim owns the row
    RETURNING t.id, t.lease_id
"""

SETTLE_FAILED = f"""
    UPDATE asyncflow.tasks t
       SET state = 'failed',
           failures = t.failures + 1,
           failure = ($3::text[]){_OWN}::json,
           finished_at = now()
     WHERE t.id = ANY ($1)
       AND t.state = 'running'
       AND t.lease_id = {_LEASE}
    RETURNING t.id, t.lease_id
"""

SETTLE_CANCELLED = f"""
    UPDATE asyncflow.tasks t
       SET state = 'cancelled',
           failure = coalesce(($3::text[]){_OWN}, '{_JUST_CANCELLED}')::json,
           finished_at = now()
     WHERE t.id = ANY ($1)
       AND t.state = 'running'
       AND t.lease_id = {_LEASE}
    RETURNING t.id, t.lease_id
"""


def _back_to_pending(*, outcome: str, charge: str) -> str:
    """
    A retry and a release both put the task back to pending, and keep the attempt's record
    beside it, in one statement. They differ in what they charge.
    """
    return f"""
    WITH held AS MATERIALIZED (
        SELECT t.id, t.attempt, t.tenant_id, t.generation, t.started_at, t.worker_id,
               t.lease_id, ($3::text[]){_OWN}::json AS failure
          FROM asyncflow.tasks t
         WHERE t.id = ANY ($1)
           AND t.state = 'running'
           AND t.lease_id = {_LEASE}
           AND t.cancel_requested_at IS NULL
         ORDER BY t.id
           FOR UPDATE),
    back AS (
        UPDATE asyncflow.tasks t
           SET state = 'pending',
               {charge}
               queued_at = NULL,
               worker_id = NULL,
               lease_id = NULL,
               progress = NULL
         WHERE t.id = ANY (ARRAY (SELECT id FROM held))
           AND t.state = 'running'
           AND t.lease_id = {_LEASE})
    INSERT INTO asyncflow.attempts
           (task_id, attempt, tenant_id, generation, outcome,
            started_at, finished_at, worker_id, lease_id, failure)
    SELECT id, attempt, tenant_id, generation, '{outcome}',
           started_at, now(), worker_id, lease_id, failure
      FROM held
    RETURNING task_id AS id, lease_id
"""


SETTLE_RETRIED = _back_to_pending(
    outcome="retried",
    charge=f"""failures = t.failures + 1,
               failure = ($3::text[]){_OWN}::json,
               run_at = now() + ($4::float8[]){_OWN} * interval '1 second',""",
)

SETTLE_RELEASED = _back_to_pending(outcome="released", charge="")

_SETTLES = {
    Event.COMPLETE: SETTLE_COMPLETED,
    Event.FAIL: SETTLE_FAILED,
    Event.CANCEL: SETTLE_CANCELLED,
    Event.RETRY: SETTLE_RETRIED,
    Event.RELEASE: SETTLE_RELEASED,
}

# What a record says of an attempt that was settled so.
_OUTCOMES = {
    Event.COMPLETE: "completed",
    Event.FAIL: "failed",
    Event.CANCEL: "cancelled",
    Event.RETRY: "retried",
    Event.RELEASE: "released",
}


class Settling(NamedTuple):
    """
    A settlement and the lease it is written under.
    """

    task_id: UUID
    lease_id: UUID
    settlement: Settlement


async def settle(db: Executor, settlings: Sequence[Settling]) -> list[bool]:
    """
    Write how attempts ended; safe to repeat when the outcome of a call is unknown.

    Returns:
        Per settling, in order: True if it was written now, False if its lease was no
        longer valid; then nothing changed, and the attempt's result is void. A repeated
        call answers False for what an earlier one had written; see `recorded`.
    """
    by_event: defaultdict[Event, list[Settling]] = defaultdict(list)
    for settling in settlings:
        by_event[settling.settlement.event].append(settling)
    written: set[tuple[UUID, UUID]] = set()
    for event, group in by_event.items():
        written |= await _settle(db, event, group)
        if event in (Event.RETRY, Event.RELEASE):
            # Not written: the lease is gone, or a cancellation was asked for meanwhile and
            # the task must not wait for another attempt. The fence tells them apart.
            rest = [s for s in group if (s.task_id, s.lease_id) not in written]
            if rest:
                written |= await _settle(db, Event.CANCEL, rest)
    return [(s.task_id, s.lease_id) in written for s in settlings]


async def _settle(db: Executor, event: Event, group: Sequence[Settling]) -> set[tuple[UUID, UUID]]:
    written: set[tuple[UUID, UUID]] = set()
    rest = group
    while rest:
        # One worker may settle a task twice in one call, under an old lease and a new one.
        once = {settling.task_id: settling for settling in rest}
        rows = await db.fetch(_SETTLES[event], *_settle_arguments(event, [*once.values()]))
        written |= {(row["id"], row["lease_id"]) for row in rows}
        rest = [settling for settling in rest if settling is not once[settling.task_id]]
    return written


def _settle_arguments(event: Event, group: Sequence[Settling]) -> tuple[list[Any], ...]:
    ids = [s.task_id for s in group]
    leases = [s.lease_id for s in group]
    if event is Event.COMPLETE:
        return ids, leases, [s.settlement.result for s in group]
    failures = [_failure_json(s.settlement.failure) for s in group]
    if event is Event.RETRY:
        return ids, leases, failures, [s.settlement.delay_seconds for s in group]
    return ids, leases, failures


RECORDS = """
    SELECT t.id, t.lease_id, t.state AS outcome, t.failure
      FROM asyncflow.tasks t
     WHERE t.id = ANY ($1)
       AND t.lease_id = ANY ($2)
       AND t.state IN ('completed', 'failed', 'cancelled')
     UNION ALL
    SELECT a.task_id, a.lease_id, a.outcome, a.failure
      FROM asyncflow.attempts a
     WHERE a.task_id = ANY ($1)
       AND a.lease_id = ANY ($2)
"""


async def recorded(db: Executor, settlings: Sequence[Settling]) -> list[bool]:
    """
    Which of these settlements have been written, by whatever call.

    The reaper settles under the same lease, so the record must also say what the settlement
    says: how the attempt ended, and of what it failed.
    """
    ids, leases = [s.task_id for s in settlings], [s.lease_id for s in settlings]
    rows = await db.fetch(RECORDS, ids, leases)
    records = {(r["id"], r["lease_id"]): (r["outcome"], r["failure"]) for r in rows}
    return [records.get((s.task_id, s.lease_id)) in _as_recorded(s.settlement) for s in settlings]


def _as_recorded(settlement: Settlement) -> list[tuple[str, str | None]]:
    failure = _failure_json(settlement.failure)
    written = [(_OUTCOMES[settlement.event], failure)]
    if settlement.event in (Event.RETRY, Event.RELEASE):
        written.append(("cancelled", failure or _JUST_CANCELLED))  # as `settle` may have it
    return written


RECORD_PROGRESS = f"""
    UPDATE asyncflow.tasks t
       SET progress = ($3::text[]){_OWN}::json
     WHERE t.id = ANY ($1)
       AND t.state = 'running'
       AND t.lease_id = {_LEASE}
"""


async def record_progress(db: Executor, progress: Sequence[tuple[UUID, UUID, str]]) -> None:
    """
    Show how far running attempts are: (task id, lease id, JSON text), once per task.
    """
    ids, leases, texts = zip(*progress, strict=True)
    await db.execute(RECORD_PROGRESS, ids, leases, texts)


def _columns(offers: Sequence[Offer]) -> tuple[list[str], list[int], list[float]]:
    return (
        [o.name for o in offers],
        [o.max_attempts for o in offers],
        [o.timeout_seconds for o in offers],
    )


def _failure_json(failure: Failure | None) -> str | None:
    if failure is None:
        return None
    return json.dumps(
        {"kind": failure.kind, "message": failure.message, "traceback": failure.traceback}
    )
