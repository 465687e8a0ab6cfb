"""
Workers that run inside the test process, on the real store.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from asyncflow.domain.task import Task
from asyncflow.errors import WorkerExhausted, WorkerLost
from asyncflow.handlers import Registry, handler
from asyncflow.store import read as store
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.store.workers import Registration
from asyncflow.transport import Claimant, Transport, postgres
from asyncflow.transport.rabbitmq import transport as rabbitmq
from asyncflow.worker.isolation.isolation import Isolation
from asyncflow.worker.isolation.nursery import Nursery
from asyncflow.worker.times import Times
from asyncflow.worker.worker import Worker
from tests.support.tasks import NAME, PATIENCE_SECONDS, a_registration

TIMES = Times()


@dataclass
class Running:
    """
    A running worker.

    Attributes:
        ended: The task that runs `run`, with its exception if it failed.
    """

    worker: Worker
    registration: Registration
    transport: Transport
    ended: asyncio.Task[None]

    async def end(self) -> None:
        """
        Wait until `run` ends, which the test must cause.
        """
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.shield(self.ended)


@asynccontextmanager
async def a_running_worker(
    db: Database,
    *functions: Callable[..., Any],
    slots: int = 4,
    grace_seconds: float = 5.0,
    times: Times = TIMES,
    heartbeat_seconds: float = 0.1,
    lease_seconds: float = 10.0,
    cancel_grace_seconds: float = 0.5,
    registry: Registry | None = None,
    broker_url: str | None = None,
    postgres_times: postgres.Times = postgres.TIMES,
    rabbitmq_times: rabbitmq.Times = rabbitmq.TIMES,
    **policy: Any,
) -> AsyncIterator[Running]:
    """
    A worker that offers `functions`, the first under the name `work`, or the handlers of
    `registry`; it is force-quit at the end of the block. Without a `broker_url` it claims directly.
    """
    registry = registry or registry_of(*functions, **policy)
    registration = a_registration(
        names=registry.names,
        slots=slots,
        heartbeat_seconds=heartbeat_seconds,
        lease_seconds=lease_seconds,
    )
    offers = [Offer(h.name, h.policy.max_attempts, h.policy.timeout_seconds) for h in registry]
    claimant = Claimant(registration.id, registration.queues, offers)
    transport = (
        postgres.PostgresTransport(db, claimant, times=postgres_times)
        if broker_url is None
        else rabbitmq.RabbitTransport(db, claimant, broker_url=broker_url, times=rabbitmq_times)
    )
    await transport.open()
    in_children = [h for h in registry if h.isolation == "process"]
    nursery = Nursery(sorted({handler.function.__module__ for handler in in_children}))
    worker = Worker(
        db,
        transport,
        registration,
        registry=registry,
        isolation=Isolation(
            slots=slots, cancel_grace_seconds=cancel_grace_seconds, nursery=nursery
        ),
        times=replace(times, shutdown_grace=grace_seconds),
    )
    ended = asyncio.create_task(worker.run())
    try:
        yield Running(worker, registration, transport, ended)
    finally:
        worker.stop()
        worker.stop()
        with contextlib.suppress(WorkerLost, WorkerExhausted):
            await ended
        await nursery.close()


def registry_of(*functions: Callable[..., Any], **policy: Any) -> Registry:
    """
    A registry of these functions; the first is named `work`, the others keep their names.
    """
    registry = Registry()
    for number, function in enumerate(functions):
        name = function.__name__ if number else NAME
        handler(name, registry=registry, **policy)(function)
    return registry


async def read(db: Database, task_id: UUID) -> Task:
    """
    A task with its attempts.
    """
    return await store.get(db, 1, task_id)
