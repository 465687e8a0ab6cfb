"""
Writing the outcomes of attempts, and asking which of them were written.

Every statement is fenced: it guards ``state = 'running' AND lease_id = …``, so a worker that lost
its lease updates zero rows. The reaper settles the attempts of dead workers by the same
statements.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from asyncflow.domain.outcome import OUTCOMES, Failure, Settlement
from asyncflow.domain.states import Event, State
from asyncflow.store.claims import LEASE, OWN
from asyncflow.store.database import Executor
from asyncflow.store.endings import ending

_JUST_CANCELLED = '{"kind": "Cancelled", "message": "Cancelled."}'

# The fence: a newer claim owns the row.
_HELD = f"""t.id = ANY ($1)
       AND t.state = 'running'
       AND t.lease_id = {LEASE}"""

SETTLE_COMPLETED = ending(
    State.COMPLETED,
    setting=f"result = ($3::text[]){OWN}::json",
    where=_HELD,
)

SETTLE_FAILED = ending(
    State.FAILED,
    setting=f"""failures = t.failures + 1,
           failure = ($3::text[]){OWN}::json""",
    where=_HELD,
)

SETTLE_CANCELLED = ending(
    State.CANCELLED,
    setting=f"failure = coalesce(($3::text[]){OWN}, '{_JUST_CANCELLED}')::json",
    where=_HELD,
)


def _back_to_pending(*, outcome: str, charge: str) -> str:
    """
    A retry and a release both put the task back to pending and archive the attempt, in one
    statement. They differ in what they charge.
    """
    return f"""
    WITH held AS MATERIALIZED (
        SELECT t.id, t.attempt, t.tenant_id, t.generation, t.started_at, t.worker_id,
               t.lease_id, ($3::text[]){OWN}::json AS failure
          FROM asyncflow.tasks t
         WHERE {_HELD}
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
           AND t.lease_id = {LEASE})
    INSERT INTO asyncflow.attempts
           (task_id, attempt, tenant_id, generation, outcome,
            started_at, finished_at, worker_id, lease_id, failure)
    SELECT id, attempt, tenant_id, generation, '{outcome}',
           started_at, now(), worker_id, lease_id, failure
      FROM held
    RETURNING task_id AS id, lease_id
"""


SETTLE_RETRIED = _back_to_pending(
    outcome=OUTCOMES[Event.RETRY],
    charge=f"""failures = t.failures + 1,
               failure = ($3::text[]){OWN}::json,
               run_at = now() + ($4::float8[]){OWN} * interval '1 second',""",
)

SETTLE_RELEASED = _back_to_pending(outcome=OUTCOMES[Event.RELEASE], charge="")

_SETTLES = {
    Event.COMPLETE: SETTLE_COMPLETED,
    Event.FAIL: SETTLE_FAILED,
    Event.CANCEL: SETTLE_CANCELLED,
    Event.RETRY: SETTLE_RETRIED,
    Event.RELEASE: SETTLE_RELEASED,
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
    Write the outcomes of attempts. Idempotent: repeat it if the outcome of a call is unknown.

    Returns:
        Per settling, in order: True if it was written now, False if its lease was no longer
        valid; then nothing changed, and the attempt's result is void. A repeated call answers
        False for what an earlier one has written; see `recorded`.
    """
    by_event: defaultdict[Event, list[Settling]] = defaultdict(list)
    for settling in settlings:
        by_event[settling.settlement.event].append(settling)
    written: set[tuple[UUID, UUID]] = set()
    for event, group in by_event.items():
        written |= await _settle(db, event, group)
        if event in (Event.RETRY, Event.RELEASE):
            # Not written: the lease is lost, or the task is to be cancelled and must not wait for
            # another attempt. The fence tells the two apart.
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
    Which of these settlements have been written, by any call.

    The reaper settles under the same lease, so the record must also match the settlement: its
    outcome and its failure.
    """
    ids, leases = [s.task_id for s in settlings], [s.lease_id for s in settlings]
    rows = await db.fetch(RECORDS, ids, leases)
    records = {(r["id"], r["lease_id"]): (r["outcome"], r["failure"]) for r in rows}
    return [records.get((s.task_id, s.lease_id)) in _as_recorded(s.settlement) for s in settlings]


def _as_recorded(settlement: Settlement) -> list[tuple[str, str | None]]:
    failure = _failure_json(settlement.failure)
    written = [(settlement.outcome, failure)]
    if settlement.event in (Event.RETRY, Event.RELEASE):
        written.append(
            (OUTCOMES[Event.CANCEL], failure or _JUST_CANCELLED)
        )  # as `settle` may have it
    return written


def _failure_json(failure: Failure | None) -> str | None:
    if failure is None:
        return None
    return json.dumps(
        {"kind": failure.kind, "message": failure.message, "traceback": failure.traceback}
    )
