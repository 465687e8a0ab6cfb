"""
The only place that assembles pieces: one function per kind of process, each a straight line
from settings to a clean exit.

Every process does the same at the edges: it waits for a reachable database, refuses a wrong
schema, stops on SIGINT or SIGTERM in good order, hurries on the second signal, leaves nothing
open, and ends, see `stopping`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

import uvloop

from asyncflow import forking
from asyncflow.domain.policy import DEFAULT_POLICY
from asyncflow.errors import AsyncFlowError, StoreUnavailable
from asyncflow.settings import Settings, required_database_url
from asyncflow.stopping import end, end_on_signals, signals
from asyncflow.store.database import Database
from asyncflow.store.schema import check_schema
from asyncflow.telemetry import events

if TYPE_CHECKING:
    # Each process imports only what it runs: a worker starts without the web framework.
    from uvicorn import Config, Server

    from asyncflow.handlers import Registry
    from asyncflow.transport import Transport
    from asyncflow.worker.worker import Worker

DATABASE_RETRY_SECONDS = 1.0
LEFT_SECONDS = 0.1
"""How long what handlers left in the event loop may take to be cancelled."""

EXHAUSTED_EXIT_STATUS = 70
THREADS_MIN, THREADS_PER_SLOT = 64, 4
BACKLOG = 2_048
"""Connections that may wait for the API to accept them."""


class AddressTaken(AsyncFlowError):
    """
    Another program listens where the API wants to.
    """

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(
            f"The API cannot listen on {host}:{port} ({reason}); stop what uses it, "
            "or choose another port with --port or ASYNCFLOW_API_PORT."
        )


def run(process: Coroutine[Any, Any, int | None]) -> NoReturn:
    """
    Run a process to its end on uvloop, and end with the exit status that it returns, or 0.

    Also in one whose handlers left something behind: threads, executors, tasks that take no
    cancellation. Whatever `process` raises is raised, for the caller to say and to `end`.
    """
    # What was imported is here to stay. Beyond it, many short-lived objects are alive at any
    # time, and looking for cycles after every 700 new ones, Python's default, costs a worker
    # that runs short tasks a fifth of its time and finds nothing.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    forking.free_children()
    end_on_signals()
    loop = _new_loop()
    status = _run_on(loop, process)
    end(status, lambda: loop.run_until_complete(_cancel_what_is_left()))


def _new_loop() -> asyncio.AbstractEventLoop:
    others = forking.open_descriptors()
    loop = uvloop.new_event_loop()
    forking.withhold(loop, *(forking.open_descriptors() - others))
    return loop


def _run_on(loop: asyncio.AbstractEventLoop, process: Coroutine[Any, Any, int | None]) -> int:
    """
    Run to the end of `process`, whatever else tries to stop the loop.

    `sys.exit()` in an asyncio task or a callback that a handler started, or `loop.stop()`, stops
    the loop, but is no reason for the process to end: the exception is that task's, and whoever
    awaits it gets it.
    """
    main = loop.create_task(process)
    while not main.done():
        try:
            loop.run_until_complete(main)
        except (SystemExit, KeyboardInterrupt, RuntimeError) as error:
            if main.done() or loop.is_closed():
                raise
            events.loop_interrupted(reason=repr(error))
    return main.result() or 0


async def _cancel_what_is_left() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=LEFT_SECONDS)


async def serve_api(settings: Settings) -> None:
    """
    The HTTP API, until a signal.

    Raises:
        AddressTaken: Its port is in use.
        SchemaMismatch: The database needs a migration.
    """
    from importlib.metadata import version

    import uvicorn

    from asyncflow.api.app import create_app
    from asyncflow.api.catalogue import Catalogue
    from asyncflow.api.protocol import BoundedProtocol
    from asyncflow.store.wakeups import Waker
    from asyncflow.transport.watch import BrokerWatch

    listening = listen(settings.api_host, settings.api_port)
    async with _database(settings, "asyncflow api") as db, _signals(settings) as stop:
        await _until_schema_fits(db, stop)
        async with Catalogue(db) as catalogue, BrokerWatch(settings.broker_url) as broker:
            waker = Waker(db)
            app = create_app(
                db=db,
                settings=settings,
                catalogue=catalogue,
                waker=waker,
                broker_state=lambda: broker.state,
                version=version("asyncflow"),
            )
            config = uvicorn.Config(
                app,
                loop="none",
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=30,
                backlog=BACKLOG,
                timeout_graceful_shutdown=int(settings.shutdown_grace_seconds),
            )
            server = _server(config)
            stop.on_first = lambda: setattr(server, "should_exit", True)
            stop.on_second = lambda: setattr(server, "force_exit", True)
            if not stop.asked:
                listening.listen(BACKLOG)  # Before the log says so.
                events.process_started(url=f"http://{settings.api_host}:{settings.api_port}")
                # What is loaded by now stays to the end. Left to the garbage collector, it is
                # looked through again every few seconds, and 20 ms long everybody waits.
                gc.freeze()
                await server.serve(sockets=[listening])
            await waker.close()
    events.process_stopped()


async def work(settings: Settings) -> int:
    """
    One worker, until a signal; declared lost, it starts again under a new id.

    Returns:
        The exit status: 0, or 70 if stuck handlers hold all its slots; then whoever supervises
        it starts another.

    Raises:
        HandlerError: A module of handlers cannot be loaded.
        SchemaMismatch: The database needs a migration.
    """
    from asyncflow.handlers import load_handlers
    from asyncflow.worker.worker import WorkerExhausted, WorkerLost

    registry = load_handlers(settings.worker_handlers)
    asyncio.get_running_loop().set_default_executor(_executor(settings.worker_concurrency))
    async with _database(settings, "asyncflow worker") as db, _signals(settings) as stop:
        await _until_schema_fits(db, stop)
        while not stop.asked:
            worker = await _make_worker(db, settings, registry)
            stop.on_first = worker.stop
            stop.on_second = worker.stop
            stop.running = partial(getattr, worker, "running")
            try:
                await worker.run()
            except WorkerLost:
                continue
            except WorkerExhausted:
                return EXHAUSTED_EXIT_STATUS
    events.process_stopped()
    return 0


def _executor(slots: int) -> ThreadPoolExecutor:
    # For `asyncio.to_thread` and the like, which only handlers use. Python's default, four more
    # than there are processors, is less than the slots of a worker: handlers would wait for one
    # another, and time out without having begun. Threads are started when they are needed.
    return ThreadPoolExecutor(max(THREADS_MIN, THREADS_PER_SLOT * slots), "asyncio")


async def _make_worker(db: Database, settings: Settings, registry: Registry) -> Worker:
    from asyncflow.store.claims import Offer
    from asyncflow.store.workers import Registration
    from asyncflow.transport import Claimant
    from asyncflow.transport.postgres import PostgresTransport
    from asyncflow.worker.isolation import Isolation
    from asyncflow.worker.worker import Times, Worker

    registration = Registration(
        id=uuid4(),
        name=f"{socket.gethostname()}:{os.getpid()}",
        queues=settings.worker_queues or tuple(sorted({*registry.queues, DEFAULT_POLICY.queue})),
        handlers=registry.names,
        concurrency=settings.worker_concurrency,
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
        from asyncflow.transport.rabbitmq import RabbitTransport

        transport = RabbitTransport(db, claimant, broker_url=settings.broker_url)
    await transport.open()
    events.process_started(
        worker_id=str(registration.id),
        queues=",".join(registration.queues),
        handlers=len(registration.handlers),
        slots=registration.concurrency,
        broker="rabbitmq" if settings.broker_url else "none",
    )
    return Worker(
        db,
        transport,
        registration,
        registry=registry,
        isolation=Isolation(
            slots=settings.worker_concurrency,
            cancel_grace_seconds=settings.cancel_grace_seconds,
            result_bytes_max=settings.result_bytes_max,
            log_level=settings.log_level,
            log_format=settings.log_format,
        ),
        times=Times(shutdown_grace=settings.shutdown_grace_seconds, stall=settings.stall_seconds),
    )


async def maintain(settings: Settings) -> None:
    """
    The chores and, with a broker, the relay, until a signal.

    Raises:
        SchemaMismatch: The database needs a migration.
    """
    from asyncflow.maintenance.chores import chores, run_chore
    from asyncflow.store.wakeups import Waker

    async with _database(settings, "asyncflow maintenance") as db, _signals(settings) as stop:
        await _until_schema_fits(db, stop)
        waker = Waker(db)
        listed = chores(
            retention_days=settings.retention_days, has_broker=settings.broker_url is not None
        )
        duties = [run_chore(chore, db, waker) for chore in listed]
        if settings.broker_url is not None:
            from asyncflow.maintenance.relay import Relay

            duties.append(Relay(db, settings.broker_url).run())
        events.process_started(broker="rabbitmq" if settings.broker_url else "none")
        await _until_stopped(duties, stop)
        await waker.close()
    events.process_stopped()


async def _until_stopped(duties: Sequence[Coroutine[Any, Any, None]], stop: Stop) -> None:
    """
    Run endless duties side by side until a signal, or until one of them fails.
    """
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(duty) for duty in duties]
    stopping = loop.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (*tasks, stopping):
            task.cancel()
        await asyncio.gather(*tasks, stopping, return_exceptions=True)


class Stop:
    """
    The wish to stop, as signals bring it.

    Attributes:
        on_first, on_second: What the first signal asks for, and what every later one does.
        running: How many attempts are under way, for the log.
    """

    def __init__(self) -> None:
        self.on_first: Callable[[], object] = lambda: None
        self.on_second: Callable[[], object] = lambda: None
        self.running: Callable[[], int | None] = lambda: None
        self._asked = asyncio.Event()

    @property
    def asked(self) -> bool:
        """
        Whether a signal came.
        """
        return self._asked.is_set()

    async def wait(self) -> None:
        """
        Wait for the first signal.
        """
        await self._asked.wait()

    def receive(self, received: signal.Signals) -> None:
        """
        Act on one signal.
        """
        if self.asked:
            events.process_hurried(signal=received.name)
            self.on_second()
        else:
            events.process_stopping(signal=received.name, running=self.running())
            self._asked.set()
            self.on_first()


@asynccontextmanager
async def _signals(settings: Settings) -> AsyncIterator[Stop]:
    stop = Stop()
    with signals(stop.receive, grace_seconds=settings.shutdown_grace_seconds):
        yield stop


@asynccontextmanager
async def _database(settings: Settings, name: str) -> AsyncIterator[Database]:
    if settings.broker_url is not None:
        from asyncflow.transport.amqp.url import parse_url

        parse_url(settings.broker_url)  # A malformed one would be tried for ever.
    async with Database(
        required_database_url(settings),
        size=settings.database_pool_size,
        timeout_seconds=settings.database_timeout_seconds,
        pooler=settings.database_pooler,
        name=name,
    ) as db:
        yield db


async def _until_schema_fits(db: Database, stop: Stop) -> None:
    """
    Check the schema as soon as the database can be reached, or a signal comes.
    """
    while not stop.asked:
        try:
            return await check_schema(db)
        except StoreUnavailable as error:
            events.database_unavailable(where="start", reason=str(error))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DATABASE_RETRY_SECONDS):
                await stop.wait()


def _server(config: Config) -> Server:
    from uvicorn import Server

    class OurServer(Server):
        # Uvicorn would catch the signals itself and, once done, let them kill the process;
        # ours ends with exit status 0.
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return OurServer(config)


def listen(host: str, port: int) -> socket.socket:
    """
    Bind the API's address, before the server does, so that a taken port is one sentence.

    Raises:
        AddressTaken: It cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise AddressTaken(host, port, error.strerror or str(error)) from error
    return listening
