"""
Heartbeats: what keeps a worker's leases.

They run on a thread with an event loop and a connection of their own, so that no handler,
however badly it behaves, can delay them. Each beat also reads back what the database thinks
this worker holds, which brings cancellations and shows claims whose answer got lost.

Five things can happen to a lease, and each has one answer:

- A beat fails, for whatever reason. The leases may still hold, or not, so at `FENCE_SHARE` of their
  length the worker stops what it runs (it *fences* itself) before another worker may start the
  same tasks. If PostgreSQL answered and merely refused, because a right or a table is missing, the
  connection is kept, and with it the lock that shows that this worker lives. If it does not know
  the worker at all, the database is being restored, and the row may come back.
- The reaper declares this worker dead. It ends and comes back under a new id.
- The whole process stands still past the fence: it was frozen, or a handler held the interpreter's
  lock. It then ends as if declared dead, and the reaper charges its attempts as crashes. Released
  unpunished, such a handler would do the same again, without end.
- The event loop that runs the handlers stands still. Beats would keep its leases as long as it
  does, so after `Times.stall` the process ends itself. The attempt that blocks the loop has failed;
  the others are released.
- The process dies. The advisory lock on this connection falls with it, and the reaper knows within
  a few beats.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from asyncflow.aio.waiting import set_within
from asyncflow.errors import StoreError, StoreUnavailable
from asyncflow.store import settle, workers
from asyncflow.store.database import Database, Executor, translated_errors
from asyncflow.store.settle import Settling
from asyncflow.store.wakeups import send_wakeup
from asyncflow.store.workers import Held, Published, Registration
from asyncflow.telemetry import events
from asyncflow.worker.times import Times

FENCE_SHARE = 0.6
WATCH_SECONDS = 0.1

STALLED_EXIT_STATUS = 70


class LeaseHolder(Protocol):
    """
    The worker, as the keeper of its leases sees it. Called on the worker's own loop.
    """

    def on_kept(self) -> None:
        """
        The leases hold, for the first time or again.
        """

    def on_held(self, held: Sequence[Held]) -> None:
        """
        Leases that are old enough to compare, and those with a cancellation.
        """

    def on_fenced(self, reason: str) -> None:
        """
        The leases can no longer be trusted: stop everything.
        """

    def on_lost(self) -> None:
        """
        This worker was declared dead; it must not go on under this id.
        """

    def on_stalled(self, seconds: float) -> Callable[[Held], Settling]:
        """
        The loop has stood still for this long, and the process is about to end: say how each lease
        is to be settled. Called from the keeper's thread.
        """
        ...


class LeaseKeeper:
    """
    Registers a worker and beats for it until stopped.

    Args:
        loop: The worker's event loop, on which `holder` is called.
        times: `stall`, `heartbeat_retry` and `goodbye` of them.
    """

    def __init__(
        self,
        db: Database,
        registration: Registration,
        published: Sequence[Published],
        *,
        holder: LeaseHolder,
        loop: asyncio.AbstractEventLoop,
        times: Times,
    ) -> None:
        self._db = db
        self._registration = registration
        self._published: Sequence[Published] | None = published
        self._holder = holder
        self._worker_loop = loop
        self._times = times
        self._kept_at = time.monotonic()
        self._fence_seconds = FENCE_SHARE * registration.lease_seconds
        self._fenced = True  # Until the first beat there is no lease to trust.
        self._lost = False
        self._said_goodbye = False
        self._is_registered = False
        self._is_locked = False
        self._unanswered = 0
        self._ends_stalled = False
        self._ending: asyncio.Task[None]
        self._stopping = threading.Event()
        self._ended = asyncio.Event()  # The worker's loop's: its executor is for handlers.
        self._wake: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        """
        Begin to beat; the holder hears `on_kept` when the worker is registered.
        """
        self._thread.start()

    def holds(self) -> bool:
        """
        Whether the leases can be trusted at this moment. From any thread.
        """
        if self._fenced or self._lost or self._ends_stalled:
            return False
        return time.monotonic() - self._kept_at <= self._fence_seconds

    async def stop(self) -> None:
        """
        Say goodbye to the database, if it can be reached, and end the thread.
        """
        self._stopping.set()
        with contextlib.suppress(RuntimeError):
            self._wake()  # Its loop is closed if the thread has ended by itself: worker lost.
        await self._ended.wait()

    def _run(self) -> None:
        try:
            asyncio.run(self._keep())
        finally:
            with contextlib.suppress(RuntimeError):  # the worker's loop is closed
                self._worker_loop.call_soon_threadsafe(self._ended.set)

    async def _keep(self) -> None:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(woken.set)
        # In parallel with the beats, not between them: a statement that hangs must not delay it.
        watching = loop.create_task(self._watch())
        keeping = loop.create_task(self._keep_until_stopped(woken))
        stopping = loop.create_task(woken.wait())
        await asyncio.wait({keeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        # Nor may it keep the worker from ending; the end of this loop cancels it.
        await asyncio.wait({keeping}, timeout=self._times.goodbye)
        watching.cancel()

    async def _keep_until_stopped(self, woken: asyncio.Event) -> None:
        while not (self._stopping.is_set() or self._lost):
            try:
                await self._keep_on_one_connection(woken)
            except Exception as error:
                # Not only outages: a thread that ends here would leave a worker that runs on
                # while its leases run out.
                if not self._stopping.is_set():
                    events.heartbeat_failed(reason=str(error))
            await set_within(woken, self._times.heartbeat_retry)
        if not (self._lost or self._said_goodbye):
            # Its connection broke, and the reaper would declare a healthy worker dead. Tried once:
            # PostgreSQL may be down, and a worker that stops does not wait for it.
            with contextlib.suppress(StoreError):
                async with self._connection() as connection:
                    await self._say_goodbye(connection)

    async def _keep_on_one_connection(self, woken: asyncio.Event) -> None:
        async with self._connection() as connection:
            if not self._is_registered:
                await workers.register(connection, self._registration)
                self._is_registered = True
            self._is_locked = not self._registration.holds_lock
            if self._published is not None:
                await workers.publish_handlers(connection, self._published)
                self._published = None
            # Only now will the relay send tasks that this worker alone can run.
            await send_wakeup(connection)
            while not (self._stopping.is_set() or self._lost):
                await self._beat_unless_refused(connection)
                await set_within(woken, self._registration.heartbeat_seconds)
            if not self._lost:
                await self._say_goodbye(connection)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Executor]:
        timeout_seconds = max(0.5, self._registration.lease_seconds / 6)
        connection = await self._db.connect("leases", timeout_seconds=timeout_seconds)
        try:
            with translated_errors():
                yield connection
        finally:
            connection.terminate()

    async def _say_goodbye(self, connection: Executor) -> None:
        await workers.stop(connection, self._registration.id)
        self._said_goodbye = True

    async def _beat_unless_refused(self, connection: Executor) -> None:
        try:
            with translated_errors():
                await self._beat(connection)
        except StoreError as error:
            if isinstance(error, StoreUnavailable) and not error.session_lives:
                raise
            # A new connection would be refused the same, and this one has the lock.
            events.heartbeat_failed(reason=str(error))

    async def _beat(self, connection: Executor) -> None:
        began = time.monotonic()
        if not await workers.heartbeat(connection, self._registration.id):
            await self._find_out_why_not(connection)
            return
        self._kept_at = began
        if not self._is_locked:
            # A session of ours that PostgreSQL still thinks alive may hold it for a while.
            self._is_locked = await workers.hold_lock(connection, self._registration.id)
        if self._fenced:
            self._fenced = False
            self._tell(self._holder.on_kept)
        await self._read_back(connection)

    async def _find_out_why_not(self, connection: Executor) -> None:
        if not (self._fenced or await workers.is_over(connection, self._registration.id)):
            events.heartbeat_failed(reason="the database does not know this worker")
            return
        self._lost = True
        self._tell(self._holder.on_lost)

    async def _read_back(self, connection: Executor) -> None:
        try:
            held = await workers.held(
                connection,
                self._registration.id,
                older_than_seconds=2 * self._registration.heartbeat_seconds,
            )
        except TimeoutError:
            # Behind a migration that locks the tasks, or dead rows that cannot be removed yet. It
            # only delays cancellations. Without this connection the lock would fall, and this
            # worker would be declared dead.
            return
        if held:
            self._tell(self._holder.on_held, held)

    async def _watch(self) -> None:
        ticked_at = time.monotonic()
        while True:
            before, ticked_at = ticked_at, time.monotonic()
            self._end_if_frozen(ticked_at - before)
            self._fence_if_overdue()
            self._check_stall()
            await asyncio.sleep(WATCH_SECONDS)

    def _end_if_frozen(self, stood_still_seconds: float) -> None:
        if stood_still_seconds > self._fence_seconds and not self._lost:
            self._lost = True
            self._tell(self._holder.on_lost)

    def _fence_if_overdue(self) -> None:
        overdue = time.monotonic() - self._kept_at
        if not self._fenced and overdue > self._fence_seconds:
            self._fenced = True
            self._tell(self._holder.on_fenced, f"no heartbeat for {overdue:.1f} s")

    def _check_stall(self) -> None:
        # Counted, not measured: if the whole process stood still, its loop is not to blame.
        stalled = self._unanswered * WATCH_SECONDS
        if stalled > self._times.stall and not self._ends_stalled:
            self._ends_stalled = True
            self._ending = asyncio.get_running_loop().create_task(self._end_stalled(stalled))
        self._unanswered += 1
        self._tell(self._answer)

    async def _end_stalled(self, seconds: float) -> None:
        try:
            settling = self._holder.on_stalled(seconds)
            async with asyncio.timeout(self._times.goodbye), self._connection() as connection:
                held = await workers.held(connection, self._registration.id, older_than_seconds=0)
                await settle.settle(connection, [settling(lease) for lease in held])
                await self._say_goodbye(connection)
                await send_wakeup(connection)
        except Exception as error:
            # The reaper finds the leases, and charges them all.
            events.heartbeat_failed(reason=str(error))
        finally:
            # The loop cannot be asked to stop, and finally-blocks would wait for it.
            os._exit(STALLED_EXIT_STATUS)

    def _answer(self) -> None:
        self._unanswered = 0

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            self._worker_loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            # The worker's loop is closed: nothing is left to tell.
            self._stopping.set()
