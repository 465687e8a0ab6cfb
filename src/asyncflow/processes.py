"""
The only place that assembles pieces: one function per kind of process, each a straight line
from settings to a clean exit.

Every process does the same at the edges: it waits for a reachable database, refuses one that
cannot work, stops on SIGINT or SIGTERM in good order, hurries on the second signal, leaves
nothing open, and ends, see `stopping`.
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
from asyncflow.errors import AsyncFlowError
from asyncflow.findings import refuse_unfit
from asyncflow.settings import Settings, required_database_url
from asyncflow.stopping import end, end_on_signals, signals
from asyncflow.store.database import Database
from asyncflow.store.inspection import inspect
from asyncflow.telemetry import events
from asyncflow.urls import address

if TYPE_CHECKING:
    # Each process imports only what it runs: a worker starts without the web framework.
    from uvicorn import Config, Server

    from asyncflow.handlers import Registry
    from asyncflow.transport import Transport
    from asyncflow.worker.children import Nursery
    from asyncflow.worker.worker import Worker

DATABASE_RETRY_SECONDS = 1.0
OTHER_CONNECTIONS = 2
"""Connections outside the pool, at most: one for the lease or the relay, one for wake-ups."""
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
            f"The API cannot listen on {address(host, port)} ({reason}); stop what uses it, "
            "or choose another port with --port or ASYNCFLOW_API_PORT."
        )


def run(begin: Callable[[], Coroutine[Any, Any, int | None]]) -> NoReturn:
    """
    Run a process to its end on uvloop, and end with the exit status that it returns, or 0.

    Also in one whose handlers left something behind: threads, executors, tasks that take no
    cancellation. Whatever the process raises is raised, for the caller to say and to `end`.

    Args:
        begin: Does what comes before there is an event loop, and returns the process.
    """
    # What was imported is here to stay. Beyond it, many short-lived objects are alive at any
    # time, and looking for cycles after every 700 new ones, Python's default, costs a worker
    # that runs short tasks a fifth of its time and finds nothing.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    forking.free_children()
    end_on_signals()
    process = begin()
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
        ServerUnfit: The database needs a migration, or another setting.
    """
    from importlib.metadata import version
    from ipaddress import ip_address

    import uvicorn

    from asyncflow.api.app import create_app
    from asyncflow.api.catalogue import Catalogue
    from asyncflow.api.cors import with_cors
    from asyncflow.api.protocol import BoundedProtocol
    from asyncflow.maintenance.watch import MaintenanceWatch
    from asyncflow.store.wakeups import Waker
    from asyncflow.transport.watch import BrokerWatch

    async with (
        _bound(settings) as listening,
        _database(settings, "asyncflow api") as db,
        _signals(settings) as stop,
    ):
        await _until_fit(db, settings, stop)
        async with (
            Catalogue(db) as catalogue,
            BrokerWatch(settings.broker_url) as broker,
            MaintenanceWatch(db),
        ):
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
                with_cors(app, settings.api_cors_origins),
                loop="none",
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # Nobody asks where a request comes from.
                server_header=False,
                date_header=False,
                timeout_keep_alive=settings.api_keep_alive_seconds,  # type: ignore[arg-type]
                backlog=BACKLOG,
                timeout_graceful_shutdown=int(settings.shutdown_grace_seconds),
            )
            server = _server(config)
            stop.on_first = lambda: setattr(server, "should_exit", True)
            stop.on_second = lambda: setattr(server, "force_exit", True)
            if not stop.asked:
                # Before the log says so. Until somebody listens, several may be bound to one port.
                with _address_free(settings.api_host, settings.api_port):
                    listening.listen(BACKLOG)
                url = f"http://{address(settings.api_host, settings.api_port)}"
                events.process_started(url=url)
                if not ip_address(listening.getsockname()[0]).is_loopback:
                    events.api_unprotected(host=settings.api_host)
                # What is loaded by now stays to the end. Left to the garbage collector, it is
                # looked through again every few seconds, and 20 ms long everybody waits.
                gc.freeze()
                await server.serve(sockets=[listening])
            await waker.close()
    events.process_stopped()


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
    One worker, until a signal; declared lost, it starts again under a new id.

    Returns:
        The exit status: 0, or 70 if stuck handlers hold all its slots; then whoever supervises
        it starts another.

    Raises:
        HandlerError: A module cannot be loaded for child processes.
        ServerUnfit: The database needs a migration, or another setting.
    """
    from asyncflow.maintenance.watch import MaintenanceWatch
    from asyncflow.worker.worker import WorkerExhausted, WorkerLost

    asyncio.get_running_loop().set_default_executor(_executor(settings.worker_concurrency))
    async with (
        _database(settings, "asyncflow worker") as db,
        _signals(settings) as stop,
        _make_nursery(settings, registry) as nursery,
        MaintenanceWatch(db),
    ):
        if any(handler.isolation == "process" for handler in registry):
            # Now, so that child processes run what was loaded with the rest.
            try:
                await _until_stopped([nursery.start()], stop)
            except OSError as error:
                # The first attempt that needs a child tries again.
                events.worker_starved(reason=str(error), pause_seconds=0.0)
        await _until_fit(db, settings, stop)
        while not stop.asked:
            worker = await _make_worker(db, settings, registry, nursery)
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


def _make_nursery(settings: Settings, registry: Registry) -> Nursery:
    from asyncflow.worker.children import Nursery

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
    from asyncflow.worker.isolation import Isolation
    from asyncflow.worker.worker import Times, Worker

    registration = Registration(
        id=uuid4(),
        name=f"{socket.gethostname()}:{os.getpid()}",
        queues=settings.worker_queues or tuple(sorted({*registry.queues, DEFAULT_POLICY.queue})),
        handlers=tuple(handler.name for handler in registry),
        handler_queues=tuple(handler.policy.queue for handler in registry),
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
        slots=registration.concurrency,
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
            slots=settings.worker_concurrency,
            cancel_grace_seconds=settings.cancel_grace_seconds,
            result_bytes_max=settings.result_bytes_max,
            nursery=nursery,
        ),
        times=Times(shutdown_grace=settings.shutdown_grace_seconds, stall=settings.stall_seconds),
    )


async def maintain(settings: Settings) -> None:
    """
    The chores and, with a broker, the relay, until a signal.

    Raises:
        ServerUnfit: The database needs a migration, or another setting.
    """
    from asyncflow.maintenance.chores import chores, run_chore
    from asyncflow.store.wakeups import Waker

    async with _database(settings, "asyncflow maintenance") as db, _signals(settings) as stop:
        await _until_fit(db, settings, stop)
        waker = Waker(db)
        duties: list[Coroutine[Any, Any, None]] = []
        if settings.broker_url is None:
            listed = chores(retention_days=settings.retention_days, has_broker=False)
        else:
            from asyncflow.maintenance.relay import Relay

            relay = Relay(db, settings.broker_url, prefix=settings.broker_prefix)
            duties.append(relay.run())
            listed = chores(
                retention_days=settings.retention_days,
                has_broker=True,
                relay_trouble=lambda: relay.trouble,
            )
        duties += [run_chore(chore, db, waker) for chore in listed]
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


async def _until_fit(db: Database, settings: Settings, stop: Stop) -> None:
    """
    Return once the database is fit for us, or a signal comes.

    What may pass by itself is waited for, and what works less well than it could is logged.

    Raises:
        ServerUnfit: Something is wrong that will not pass.
    """
    while not stop.asked:
        findings = await inspect(
            db,
            timeout_seconds=settings.database_timeout_seconds,
            connections=settings.database_pool_size + OTHER_CONNECTIONS,
        )
        refuse_unfit(findings)
        wrong = [finding for finding in findings if finding.is_wrong]
        if not wrong:
            for finding in (finding for finding in findings if finding.is_doubtful):
                events.server_doubtful(what=finding.what, reason=str(finding))
            return
        for finding in wrong:
            events.database_unavailable(where="start", reason=str(finding))
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


@asynccontextmanager
async def _bound(settings: Settings) -> AsyncIterator[socket.socket]:
    with listen(settings.api_host, settings.api_port) as listening:
        yield listening


def listen(host: str, port: int) -> socket.socket:
    """
    Bind the API's address, before the server does, so that a taken port is one sentence.

    Raises:
        AddressTaken: It cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with _address_free(host, port):
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
        except OSError:
            listening.close()
            raise
    return listening


@contextmanager
def _address_free(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AddressTaken(host, port, error.strerror or str(error)) from error
