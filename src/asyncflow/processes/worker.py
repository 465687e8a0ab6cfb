"""
The process that runs handlers, from settings to a clean exit.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from asyncflow.domain.policy import DEFAULT_POLICY
from asyncflow.errors import WorkerExhausted, WorkerLost
from asyncflow.settings import Settings
from asyncflow.store.database import Database
from asyncflow.telemetry import events

if TYPE_CHECKING:
    # Each process imports only what it runs: a worker starts without the web framework.

    from asyncflow.handlers import Registry
    from asyncflow.transport import Transport
    from asyncflow.worker.isolation.nursery import Nursery
    from asyncflow.worker.worker import Worker

from asyncflow.processes.process import database, stop_signals, until_fit, until_stopped

THREADS_MIN, THREADS_PER_SLOT = 64, 4


def work(settings: Settings) -> Coroutine[Any, Any, int]:
    """
    Load the handlers, before there is an event loop, and return the work of a worker.

    A module may run a loop of its own while it is imported.

    Raises:
        HandlerError: A module of handlers cannot be loaded.
    """
    from asyncflow.handlers import load_handlers

    registry = load_handlers(settings.worker_handlers)
    gc.freeze()  # Modules stay, and a full collection need not go through them.
    return _work(settings, registry)


async def _work(settings: Settings, registry: Registry) -> int:
    """
    One worker, until a signal; declared dead, it starts again under a new id.

    Returns:
        The exit status: 0, or 70 if stuck handlers hold all its slots; then its
        supervisor starts another.

    Raises:
        HandlerError: A module cannot be loaded for child processes.
        ServerUnfit: The database needs a migration, or another setting.
    """
    from asyncflow.maintenance.watch import MaintenanceWatch

    asyncio.get_running_loop().set_default_executor(_executor(settings.worker_slots))
    async with (
        database(settings, "asyncflow worker") as db,
        stop_signals(settings) as stop,
        _make_nursery(settings, registry) as nursery,
        MaintenanceWatch(db),
    ):
        if any(handler.isolation == "process" for handler in registry):
            # Now, so that child processes run what was loaded with the rest.
            try:
                await until_stopped([nursery.start()], stop)
            except OSError as error:
                # The first attempt that needs a child tries again.
                events.worker_starved(reason=str(error), pause_seconds=0.0)
        await until_fit(db, settings, stop)
        while not stop.asked:
            worker = await _make_worker(db, settings, registry, nursery)
            stop.on_first = worker.stop
            stop.on_second = worker.stop
            stop.running = partial(getattr, worker, "running")
            try:
                await worker.run()
            except WorkerLost:
                continue
            except WorkerExhausted as error:
                return error.exit_status
    events.process_stopped()
    return 0


def _executor(slots: int) -> ThreadPoolExecutor:
    # For `asyncio.to_thread` and the like, which only handlers use. Python's default, four more
    # than there are processors, is less than the slots of a worker: handlers would wait for one
    # another, and time out without having begun. Threads are started when they are needed.
    return ThreadPoolExecutor(max(THREADS_MIN, THREADS_PER_SLOT * slots), "asyncio")


def _make_nursery(settings: Settings, registry: Registry) -> Nursery:
    from asyncflow.worker.isolation.nursery import Nursery

    return Nursery(
        settings.worker_handlers,
        handlers=[handler.name for handler in registry if handler.isolation == "process"],
        logs={"level": settings.log_level, "log_format": settings.log_format},
    )


async def _make_worker(
    db: Database, settings: Settings, registry: Registry, nursery: Nursery
) -> Worker:
    from asyncflow.handlers.builtin import BUILTIN_NAMES
    from asyncflow.store.claims import Offer
    from asyncflow.store.workers import Registration
    from asyncflow.transport import Claimant
    from asyncflow.transport.postgres import PostgresTransport
    from asyncflow.worker.isolation.isolation import Isolation
    from asyncflow.worker.times import Times
    from asyncflow.worker.worker import Worker

    registration = Registration(
        id=uuid4(),
        name=f"{socket.gethostname()}:{os.getpid()}",
        queues=settings.worker_queues or tuple(sorted({*registry.queues, DEFAULT_POLICY.queue})),
        handlers=tuple(handler.name for handler in registry),
        handler_queues=tuple(handler.policy.queue for handler in registry),
        backoffs={handler.name: handler.policy.backoff for handler in registry},
        slots=settings.worker_slots,
        heartbeat_seconds=settings.heartbeat_seconds,
        lease_seconds=settings.lease_seconds,
        holds_lock=not settings.database_pooler,
    )
    offers = [Offer(h.name, h.policy.max_attempts, h.policy.timeout_seconds) for h in registry]
    claimant = Claimant(registration.id, registration.queues, offers)
    transport: Transport
    if settings.broker_url is None:
        transport = PostgresTransport(db, claimant)
    else:
        from asyncflow.transport.rabbitmq.transport import RabbitTransport

        transport = RabbitTransport(
            db,
            claimant,
            broker_url=settings.broker_url,
            prefix=settings.broker_prefix,
        )
    await transport.open()
    events.process_started(
        worker_id=str(registration.id),
        queues=",".join(registration.queues),
        handlers=len(registration.handlers),
        slots=registration.slots,
        broker="rabbitmq" if settings.broker_url else "none",
    )
    for handler in registry:
        queue = handler.policy.queue
        if queue not in registration.queues and handler.name not in BUILTIN_NAMES:
            events.handler_not_taken(name=handler.name, queue=queue, queues=registration.queues)
    return Worker(
        db,
        transport,
        registration,
        registry=registry,
        isolation=Isolation(
            slots=settings.worker_slots,
            cancel_grace_seconds=settings.cancel_grace_seconds,
            result_bytes_max=settings.result_bytes_max,
            nursery=nursery,
        ),
        times=Times(shutdown_grace=settings.shutdown_grace_seconds, stall=settings.stall_seconds),
    )
