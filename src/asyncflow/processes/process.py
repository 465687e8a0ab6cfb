"""
What every process does at its start and end.

It waits for a reachable database, refuses one that cannot work, stops on SIGINT or SIGTERM, quits
immediately on the second signal, leaves nothing open, and ends; see `stopping`.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import uvloop

from asyncflow import forking
from asyncflow.aio.background import cancel
from asyncflow.aio.waiting import set_within
from asyncflow.findings import refuse_unfit
from asyncflow.settings import Settings, required_database_url
from asyncflow.stopping import end, end_on_signals, signals
from asyncflow.store.database import Database
from asyncflow.store.inspection import inspect
from asyncflow.telemetry import events

DATABASE_RETRY_SECONDS = 1.0
OTHER_CONNECTIONS = 2
"""Maximum connections outside the pool: one for leases or the relay, one for wake-ups."""

LEFT_SECONDS = 0.1
"""How long asyncio tasks that handlers left behind may take to be cancelled."""


def run(begin: Callable[[], Coroutine[Any, Any, int | None]]) -> NoReturn:
    """
    Run a process to its end on uvloop, and exit with the status that it returns, or 0.

    Threads, executors and uncancellable tasks that handlers left behind do not prevent that.
    What the process raises is raised here, for the caller to report and to `end`.

    Args:
        begin: Does what must precede the event loop, and returns the process's coroutine.
    """
    # What has been imported stays. Besides that, many short-lived objects are alive at any time,
    # and Python's default, a collection after every 700 new ones, costs a worker that runs short
    # tasks a fifth of its time and finds nothing.
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
    Run to the end of `process`, even if something else stops the loop.

    `loop.stop()`, or `sys.exit()` in an asyncio task or callback that a handler started, stops the
    loop but must not end the process: the exception belongs to that task and its awaiter.
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


async def until_stopped(duties: Sequence[Coroutine[Any, Any, None]], stop: Stop) -> None:
    """
    Run endless duties side by side until a signal, or until one of them fails.
    """
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(duty) for duty in (*duties, stop.wait())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await cancel(*tasks)


class Stop:
    """
    A request to stop, made by signals.

    Attributes:
        on_first, on_second: Called for the first signal, and for every later one.
        running: The number of attempts that are running, for the log.
    """

    def __init__(self) -> None:
        self.on_first: Callable[[], object] = lambda: None
        self.on_second: Callable[[], object] = lambda: None
        self.running: Callable[[], int | None] = lambda: None
        self._asked = asyncio.Event()

    @property
    def asked(self) -> bool:
        """
        Whether a signal has come.
        """
        return self._asked.is_set()

    async def wait(self, *, seconds: float | None = None) -> None:
        """
        Wait for the first signal, for at most `seconds`; None waits without a limit.
        """
        if seconds is None:
            await self._asked.wait()
        else:
            await set_within(self._asked, seconds)

    def receive(self, received: signal.Signals) -> None:
        """
        Handle one signal.
        """
        if self.asked:
            events.process_force_quit(signal=received.name)
            self.on_second()
        else:
            events.process_stopping(signal=received.name, running=self.running())
            self._asked.set()
            self.on_first()


@asynccontextmanager
async def stop_signals(settings: Settings) -> AsyncIterator[Stop]:
    stop = Stop()
    with signals(stop.receive, grace_seconds=settings.shutdown_grace_seconds):
        yield stop


@asynccontextmanager
async def database(settings: Settings, name: str) -> AsyncIterator[Database]:
    if settings.broker_url is not None:
        from asyncflow.transport.amqp.url import parse_url

        parse_url(settings.broker_url)  # A malformed one would be retried endlessly.
    async with Database(
        required_database_url(settings),
        size=settings.database_pool_size,
        timeout_seconds=settings.database_timeout_seconds,
        pooler=settings.database_pooler,
        name=name,
    ) as db:
        yield db


async def until_fit(db: Database, settings: Settings, stop: Stop) -> None:
    """
    Wait until the database is fit for AsyncFlow, or a signal comes.

    Findings that are doubtful are logged.

    Raises:
        ServerUnfit: Something is wrong that will not pass by itself.
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
        await stop.wait(seconds=DATABASE_RETRY_SECONDS)
