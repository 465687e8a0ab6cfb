"""
Builders that put tasks and workers into any state.

A noun creates an object (`a_task` and `a_worker` in the database, `new_task` and `a_claim` only in
memory), a participle takes one step and returns its result (`submitted`, `claimed`, `settled`), and
`row_of` and `state_of` read. They use the product's own statements, so every row they create is one
that can exist; only `backdate` cheats, with timestamps. See also `tasks` (defaults for tests of
running workers), `running` (workers inside a test), `system` (whole processes) and `waiting`
(waits).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from asyncflow.domain.outcome import Failure, Settlement
from asyncflow.domain.states import Event, State
from asyncflow.domain.task import DEFAULT_TENANT_ID, Claim, NewTask, TaskIds
from asyncflow.store import claims, hints, settle, steer, submit, workers
from asyncflow.store.claims import Offer
from asyncflow.store.database import Executor
from asyncflow.store.due import Admitted
from asyncflow.store.settle import Settling
from asyncflow.store.workers import Registration

NAME = "greet"
QUEUE = "default"
PAYLOAD = '{"name": "Ada"}'
OFFERS = (Offer(NAME, max_attempts=5, timeout_seconds=900.0),)
FAILURE = Failure("ValueError", "It did not work.", "Traceback …")

SETTLEMENTS = {
    Event.COMPLETE: Settlement(Event.COMPLETE, result='"done"'),
    Event.FAIL: Settlement(Event.FAIL, failure=FAILURE),
    Event.RETRY: Settlement(Event.RETRY, failure=FAILURE),
    Event.RELEASE: Settlement(Event.RELEASE),
    Event.CANCEL: Settlement(Event.CANCEL, failure=Failure("Cancelled", "It was asked to stop.")),
}
"""One settlement for each way in which an attempt can end."""

_ENDS = {
    State.COMPLETED: Event.COMPLETE,
    State.FAILED: Event.FAIL,
    State.CANCELLED: Event.CANCEL,
}

_ids = TaskIds()


class ATask(NamedTuple):
    """
    A task in the database.

    Attributes:
        lease_id: The lease of its latest claim, even if it is no longer valid; None if the task was
            never claimed.
        worker_id: The worker that claimed it last; None if it was never claimed.
    """

    id: UUID
    lease_id: UUID | None
    worker_id: UUID | None


def new_task(**changes: Any) -> NewTask:
    """
    A task that is not stored yet.
    """
    values: dict[str, Any] = {
        "id": _ids.next(),
        "tenant_id": DEFAULT_TENANT_ID,
        "name": NAME,
        "queue": QUEUE,
        "priority": 4,
        "payload": PAYLOAD,
    }
    return NewTask(**{**values, **changes})


def a_claim(**changes: Any) -> Claim:
    """
    A claim that is not in any database.
    """
    values: dict[str, Any] = {
        "task_id": _ids.next(),
        "lease_id": uuid4(),
        "tenant_id": DEFAULT_TENANT_ID,
        "name": NAME,
        "queue": QUEUE,
        "attempt": 1,
        "failures": 0,
        "max_attempts": 5,
        "timeout_seconds": 900.0,
        "payload": PAYLOAD,
        "claimed_at": datetime.now(UTC),
    }
    return Claim(**{**values, **changes})


async def submitted(db: Executor, count: int, **changes: Any) -> list[UUID]:
    """
    Store `count` equal tasks; return their ids, oldest first.
    """
    new = [new_task(**changes) for _ in range(count)]
    await submit.submit(db, new)
    return [task.id for task in new]


async def a_task(
    db: Executor,
    *,
    state: State = State.PENDING,
    attempt: int | None = None,
    failures: int | None = None,
    due_in_seconds: float = 0.0,
    cancel_requested: bool = False,
    worker_id: UUID | None = None,
    **changes: Any,
) -> ATask:
    """
    Store a task and move it to `state`.

    Args:
        attempt: How often it was claimed; None means 1 for a state that needs a claim, otherwise 0.
        failures: How many of the earlier attempts failed and were retried; the others were
            released. None means all.
        due_in_seconds: For a pending task: when it is due. If it had earlier attempts, at least one
            of them must have been retried.
        cancel_requested: For a running task: whether its cancellation was requested.
        worker_id: The worker that claims it; None means an unregistered one.
        changes: Fields of `NewTask`.
    """
    waits = state in (State.PENDING, State.QUEUED)
    if attempt is None:
        attempt = 0 if waits else 1
    earlier = attempt if waits else max(0, attempt - 1)
    retried = earlier if failures is None else failures
    task = new_task(**changes)
    if not earlier and state is State.PENDING:
        task = new_task(**changes, id=task.id, delay_seconds=due_in_seconds)
    await submit.submit(db, [task])

    worker_id = worker_id or uuid4()
    lease_id = None
    for number in range(1, earlier + 1):
        lease_id = await _claim(db, task, worker_id)
        is_last = number == earlier and state is State.PENDING
        settlement = SETTLEMENTS[Event.RELEASE if number <= earlier - retried else Event.RETRY]
        if is_last and due_in_seconds:
            settlement = Settlement(Event.RETRY, delay_seconds=due_in_seconds, failure=FAILURE)
        await settled(db, task.id, lease_id, settlement)
    if attempt > earlier:
        lease_id = await _claim(db, task, worker_id)
        if state in _ENDS:
            await settled(db, task.id, lease_id, SETTLEMENTS[_ENDS[state]])
    elif state is State.QUEUED:
        await hints.mark_queued(db, await as_sent(db, [task.id]))
    elif state is State.CANCELLED:
        await steer.cancel(db, task.tenant_id, task.id)
    if cancel_requested:
        await steer.cancel(db, task.tenant_id, task.id)
    return ATask(task.id, lease_id, worker_id if lease_id else None)


async def as_sent(db: Executor, task_ids: Sequence[UUID]) -> list[Admitted]:
    """
    The tasks as a relay sees them when it sends their hints.
    """
    rows = await db.fetch(
        "SELECT id, attempt, priority FROM asyncflow.tasks WHERE id = ANY ($1)", list(task_ids)
    )
    return [Admitted._make(row) for row in rows]


async def a_worker(db: Executor, **changes: Any) -> Registration:
    """
    Register a live worker.
    """
    values: dict[str, Any] = {
        "id": uuid4(),
        "name": "host:1",
        "queues": (QUEUE,),
        "handlers": (NAME,),
        "slots": 10,
        "heartbeat_seconds": 1.0,
        "lease_seconds": 15.0,
    }
    worker = Registration(**{**values, **changes})
    await workers.register(db, worker)
    return worker


async def claimed(db: Executor, *task_ids: UUID, **changes: Any) -> list[Claim]:
    """
    Claim these tasks by their hints; the result omits those that may not run.
    """
    values: dict[str, Any] = {"lease_id": uuid4(), "worker_id": uuid4(), "offers": OFFERS}
    return await claims.claim_hinted(db, task_ids, **{**values, **changes})


async def claimed_due(db: Executor, limit: int = 1, **changes: Any) -> list[Claim]:
    """
    Claim due tasks.
    """
    values: dict[str, Any] = {
        "lease_id": uuid4(),
        "worker_id": uuid4(),
        "offers": OFFERS,
        "queues": (QUEUE,),
    }
    return await claims.claim_due(db, limit=limit, **{**values, **changes})


async def settled(db: Executor, task_id: UUID, lease_id: UUID, settlement: Settlement) -> bool:
    """
    Settle one attempt; False if the lease was not valid.
    """
    (written,) = await settle.settle(db, [Settling(task_id, lease_id, settlement)])
    return written


async def row_of(db: Executor, task_id: UUID) -> dict[str, Any]:
    """
    The complete row of a task, for comparisons.
    """
    rows = await db.fetch("SELECT * FROM asyncflow.tasks WHERE id = $1", task_id)
    (row,) = rows
    return dict(row)


async def state_of(db: Executor, task_id: UUID) -> State:
    """
    The state of a task.
    """
    return State((await row_of(db, task_id))["state"])


async def backdate(db: Executor, table: str, row_id: UUID, **seconds_ago: float) -> None:
    """
    Move timestamps of a row into the past by this many seconds, instead of waiting.
    """
    for column, seconds in seconds_ago.items():
        await db.execute(
            f"UPDATE asyncflow.{table} SET {column} = now() - $2 * interval '1 second' "
            "WHERE id = $1",
            row_id,
            seconds,
        )


async def _claim(db: Executor, task: NewTask, worker_id: UUID) -> UUID:
    offers = [Offer(task.name, max_attempts=5, timeout_seconds=900.0)]
    (claim,) = await claimed(db, task.id, worker_id=worker_id, offers=offers)
    return claim.lease_id
