"""
Tasks and workers for tests of running parts: the relay, transports, workers and maintenance.

The same verbs as in `builders`, with other defaults: tasks are named `work`, workers have one slot
and fast heartbeats, and a submission wakes the listeners, as the API's does. `builders.a_task`
builds a task in a given state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

from asyncflow.domain.states import Event
from asyncflow.domain.task import Claim
from asyncflow.store import settle, workers
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.store.settle import Settling
from asyncflow.store.wakeups import send_wakeup
from asyncflow.store.workers import Registration
from tests.support import builders
from tests.support.builders import QUEUE as QUEUE
from tests.support.waiting import PATIENCE_SECONDS as PATIENCE_SECONDS
from tests.support.waiting import until as until

NAME = "work"


@asynccontextmanager
async def database(url: str) -> AsyncIterator[Database]:
    """
    Open a `Database` for one block.
    """
    async with Database(url, name="test") as db:
        yield db


async def submit(
    db: Database, count: int = 1, *, name: str = NAME, payload: str = "{}", **changes: Any
) -> list[UUID]:
    """
    Submit equal tasks and wake the listeners; return the ids, oldest first.
    """
    ids = await builders.submitted(db, count, name=name, payload=payload, **changes)
    await send_wakeup(db)
    return ids


def a_registration(
    *,
    queues: Sequence[str] = (QUEUE,),
    names: Sequence[str] = (NAME,),
    slots: int = 1,
    heartbeat_seconds: float = 0.2,
    lease_seconds: float = 5.0,
) -> Registration:
    """
    A worker's registration that is not stored yet.
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
    Register a worker that never sends a heartbeat.
    """
    registration = a_registration(**facts)
    await workers.register(db, registration)
    return registration


async def claim(db: Database, worker_id: UUID, limit: int = 1, *, name: str = NAME) -> list[Claim]:
    """
    Claim due tasks without a transport.
    """
    offers = [Offer(name, max_attempts=5, timeout_seconds=900.0)]
    return await builders.claimed_due(db, limit, worker_id=worker_id, offers=offers)


async def complete(db: Database, done: Sequence[Claim]) -> list[bool]:
    """
    Settle claims as completed.
    """
    completed = builders.SETTLEMENTS[Event.COMPLETE]
    return await settle.settle(db, [Settling(c.task_id, c.lease_id, completed) for c in done])


async def states(db: Database) -> Counter[str]:
    """
    The number of tasks in each state.
    """
    rows = await db.fetch("SELECT state, count(*) FROM asyncflow.tasks GROUP BY state")
    return Counter({row["state"]: row["count"] for row in rows})


async def state(db: Database, task_id: UUID) -> str:
    """
    The state of one task.
    """
    return str(await builders.state_of(db, task_id))


async def until_states(db: Database, **expected: int) -> None:
    """
    Wait until the number of tasks in each state is exactly this.
    """

    async def as_expected() -> bool:
        return await states(db) == Counter(expected)

    try:
        await until(as_expected)
    except TimeoutError:
        raise AssertionError(f"expected {expected}, found {dict(await states(db))}") from None


async def cut_every_connection(url: str) -> None:
    """
    Have PostgreSQL terminate every session of this database, and wait until they have ended.
    """
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    async with database(url) as db:
        await db.fetch(f"SELECT pg_terminate_backend(pid, 5000) {others}")
