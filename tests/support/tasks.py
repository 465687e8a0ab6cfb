"""
Tasks and workers for tests: made in the real store, looked up there, waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

from asyncflow.domain.outcome import Settlement
from asyncflow.domain.states import Event
from asyncflow.domain.task import DEFAULT_TENANT_ID, Claim, NewTask, TaskIds
from asyncflow.errors import StoreUnavailable
from asyncflow.store import claims, settle, workers
from asyncflow.store import submit as store
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.store.settle import Settling
from asyncflow.store.wakeups import send_wakeup
from asyncflow.store.workers import Registration

NAME = "work"
QUEUE = "default"
PATIENCE_SECONDS = 30.0

task_ids = TaskIds()


@asynccontextmanager
async def database(url: str) -> AsyncIterator[Database]:
    """
    A `Database` for one block.
    """
    async with Database(url, name="test") as db:
        yield db


async def submit(
    db: Database,
    count: int = 1,
    *,
    name: str = NAME,
    queue: str = QUEUE,
    priority: int = 4,
    payload: str = "{}",
    **more: Any,
) -> list[UUID]:
    """
    Submit tasks as the API does, wake-up included; return their ids.
    """
    new = [
        NewTask(task_ids.next(), DEFAULT_TENANT_ID, name, queue, priority, payload, **more)
        for _ in range(count)
    ]
    await store.submit(db, new)
    await send_wakeup(db)
    return [task.id for task in new]


def a_registration(
    *,
    queues: Sequence[str] = (QUEUE,),
    names: Sequence[str] = (NAME,),
    slots: int = 1,
    heartbeat_seconds: float = 0.2,
    lease_seconds: float = 5.0,
) -> Registration:
    """
    What a worker says of itself; not yet in the store.
    """
    return Registration(
        id=uuid4(),
        name="test",
        queues=tuple(queues),
        handlers=tuple(names),
        slots=slots,
        heartbeat_seconds=heartbeat_seconds,
        lease_seconds=lease_seconds,
    )


async def a_worker(db: Database, **facts: Any) -> Registration:
    """
    A worker that is registered and never beats.
    """
    registration = a_registration(**facts)
    await workers.register(db, registration)
    return registration


async def claim(db: Database, worker_id: UUID, limit: int = 1, *, name: str = NAME) -> list[Claim]:
    """
    Claim due tasks behind every transport's back.
    """
    return await claims.claim_due(
        db,
        lease_id=uuid4(),
        worker_id=worker_id,
        offers=[Offer(name, 5, 900.0)],
        queues=[QUEUE],
        limit=limit,
    )


async def complete(db: Database, done: Sequence[Claim]) -> list[bool]:
    """
    Settle claims as completed.
    """
    completed = Settlement(Event.COMPLETE, result="null")
    return await settle.settle(db, [Settling(c.task_id, c.lease_id, completed) for c in done])


async def states(db: Database) -> Counter[str]:
    """
    How many tasks are in which state.
    """
    rows = await db.fetch("SELECT state, count(*) FROM asyncflow.tasks GROUP BY state")
    return Counter({row["state"]: row["count"] for row in rows})


async def state(db: Database, task_id: UUID) -> str:
    """
    The state of one task.
    """
    found = await db.fetchval("SELECT state FROM asyncflow.tasks WHERE id = $1", task_id)
    return str(found)


async def until(
    condition: Callable[[], Awaitable[Any]], *, seconds: float = PATIENCE_SECONDS
) -> None:
    """
    Ask the store or a server again until `condition` holds; they cannot call us.

    That the store cannot serve just now is a no.
    """
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(StoreUnavailable):
                if await condition():
                    return
            await asyncio.sleep(0.01)


async def until_states(db: Database, **expected: int) -> None:
    """
    Wait until exactly these numbers of tasks are in these states.
    """

    async def as_expected() -> bool:
        return await states(db) == Counter(expected)

    try:
        await until(as_expected)
    except TimeoutError:
        raise AssertionError(f"expected {expected}, found {dict(await states(db))}") from None


async def cut_every_connection(url: str) -> None:
    """
    Have PostgreSQL end every session of this database; return when all are gone.
    """
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    async with database(url) as db:
        await db.fetch(f"SELECT pg_terminate_backend(pid, 5000) {others}")
