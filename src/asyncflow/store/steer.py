"""
Steering tasks that are stored: cancel, run now, redrive.
"""

from __future__ import annotations

from uuid import UUID

from asyncflow.domain.states import Event, State, sources
from asyncflow.domain.task import Task
from asyncflow.errors import IllegalTransition
from asyncflow.store.admission import IS_DUE
from asyncflow.store.database import Executor
from asyncflow.store.endings import ending
from asyncflow.store.read import get

CANCEL_WAITING = ending(
    State.CANCELLED,
    setting="""cancel_requested_at = now(),
           failure = '{"kind": "Cancelled", "message": "Cancelled before it started."}'""",
    where="""t.id = $2
       AND t.tenant_id = $1
       AND t.state IN ('pending', 'queued')""",
)

REQUEST_CANCEL = """
    UPDATE asyncflow.tasks t
       SET cancel_requested_at = coalesce(t.cancel_requested_at, now())
     WHERE t.id = $2
       AND t.tenant_id = $1
       AND t.state = 'running'
    RETURNING t.id
"""

TRIES_MAX = 10
"""A task may move between two statements (claimed, retried), but not for long."""


async def cancel(db: Executor, tenant_id: int, task_id: UUID) -> Task:
    """
    Cancel a waiting task, or ask the worker of a running one to stop it.

    Returns:
        The task afterwards: CANCELLED, or RUNNING with `cancel_requested_at` set.

    Raises:
        TaskNotFound: This tenant has no such task.
        IllegalTransition: It is finished already.
    """
    for _ in range(TRIES_MAX):
        for statement in (CANCEL_WAITING, REQUEST_CANCEL):
            if await db.fetchval(statement, tenant_id, task_id) is not None:
                return await get(db, tenant_id, task_id)
        task = await get(db, tenant_id, task_id)
        if task.finished_at is not None:
            break
    raise IllegalTransition(
        task_id,
        verb="cancelled",
        state=task.state,
        allowed=(*sources(Event.CANCEL),),
    )


RUN_NOW = f"""
    UPDATE asyncflow.tasks t
       SET run_at = now()
     WHERE t.id = $2
       AND t.tenant_id = $1
       AND t.state = 'pending'
       AND NOT {IS_DUE}
    RETURNING t.id
"""


async def run_now(db: Executor, tenant_id: int, task_id: UUID) -> Task:
    """
    Make a scheduled or retrying task due now.

    A task that is due already is left as it is. Nothing else changes: neither its attempts so
    far nor its place in the queue.

    Raises:
        TaskNotFound: This tenant has no such task.
        IllegalTransition: It is running or finished.
    """
    for _ in range(TRIES_MAX):
        brought_forward = await db.fetchval(RUN_NOW, tenant_id, task_id)
        task = await get(db, tenant_id, task_id)
        if brought_forward is not None or task.status in ("PENDING", "QUEUED"):
            return task
        if task.state is not State.PENDING:
            break
    raise IllegalTransition(
        task_id,
        verb="run now",
        state=task.status.lower(),
        allowed=(State.PENDING, State.QUEUED),
    )


REDRIVE = """
    WITH latest AS (
        INSERT INTO asyncflow.attempts
               (task_id, attempt, tenant_id, generation, outcome,
                started_at, finished_at, worker_id, lease_id, failure)
        SELECT t.id, t.attempt, t.tenant_id, t.generation, t.state,
               t.started_at, t.finished_at, t.worker_id, t.lease_id, t.failure
          FROM asyncflow.tasks t
         WHERE t.id = $2
           AND t.tenant_id = $1
           AND t.state IN ('failed', 'cancelled')
           AND t.lease_id IS NOT NULL        -- it had an attempt that is not archived yet
            ON CONFLICT DO NOTHING)
    UPDATE asyncflow.tasks t
       SET state = 'pending',
           generation = t.generation + 1,
           failures = 0,
           run_at = now(),
           expires_at = NULL,
           queued_at = NULL,
           finished_at = NULL,
           cancel_requested_at = NULL,
           worker_id = NULL,
           lease_id = NULL,
           progress = NULL
     WHERE t.id = $2
       AND t.tenant_id = $1
       AND t.state IN ('failed', 'cancelled')
    RETURNING t.id
"""


async def redrive(db: Executor, tenant_id: int, task_id: UUID) -> Task:
    """
    Start a new generation of a failed or cancelled task: pending, due now, with all its attempts
    available again.

    Raises:
        TaskNotFound: This tenant has no such task.
        IllegalTransition: It is neither failed nor cancelled.
    """
    redriven = await db.fetchval(REDRIVE, tenant_id, task_id)
    task = await get(db, tenant_id, task_id)
    if redriven is None:
        raise IllegalTransition(
            task_id, verb="redriven", state=task.status.lower(), allowed=(*sources(Event.REDRIVE),)
        )
    return task
