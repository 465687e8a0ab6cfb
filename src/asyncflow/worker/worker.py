"""
The life of a worker: take tasks, run them, settle, until it has to end; then drain.

A worker moves through these phases, in this order; it may skip some and never goes back:

| phase    | begins                                    | new tasks | attempts                      |
|----------|-------------------------------------------|-----------|-------------------------------|
| STARTING | when it is made                           | none      | none                          |
| WORKING  | when its first heartbeat is written       | taken     | run                           |
| DRAINING | when it is asked to stop, or is exhausted | none      | may finish in a grace period  |
| FORCED   | after that period, when asked again, or   | none      | are released; void if their   |
|          | when it is declared dead                  |           | leases are lost               |
| ENDED    | when no attempt is left, or soon after    | none      | void                          |

While it cannot trust its leases, it is *fenced*: it takes nothing and what it held is void. That
may pass, in any phase. A worker that was declared dead may not go on under its id, and one whose
slots are all stuck is of no use; `run` then raises why it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from asyncflow.aio.background import cancel, start_task
from asyncflow.domain.outcome import Settlement
from asyncflow.domain.states import Event
from asyncflow.errors import StoreError, WorkerExhausted, WorkerLost
from asyncflow.handlers import Registry
from asyncflow.store import settle
from asyncflow.store.database import Database
from asyncflow.store.settle import Settling
from asyncflow.store.workers import Held, Published, Registration
from asyncflow.telemetry import events
from asyncflow.transport import Transport
from asyncflow.worker.attempt import Attempt, Tools
from asyncflow.worker.intake import Intake
from asyncflow.worker.isolation.isolation import Isolation
from asyncflow.worker.lease import LeaseKeeper
from asyncflow.worker.progress import ProgressReports
from asyncflow.worker.settler import make_settler
from asyncflow.worker.stall import end_of_stalled, look_at
from asyncflow.worker.times import Times


class Phase(IntEnum):
    """
    Where a worker is in its life; see this file's docstring.
    """

    STARTING = 0
    WORKING = 1
    DRAINING = 2
    FORCED = 3
    ENDED = 4


class Cause(IntEnum):
    """
    Why a worker ends; of several, the last of these counts.
    """

    ASKED = 0
    EXHAUSTED = 1
    LOST = 2


class Worker:
    """
    One worker process's work. Made by `processes`, run once.
    """

    _keeper: LeaseKeeper
    _loop: asyncio.AbstractEventLoop
    _loop_thread_id: int

    def __init__(
        self,
        db: Database,
        transport: Transport,
        registration: Registration,
        *,
        registry: Registry,
        isolation: Isolation,
        times: Times,
    ) -> None:
        self._db = db
        self._transport = transport
        self._registration = registration
        self._registry = registry
        self._isolation = isolation
        self._times = times
        self._progress = ProgressReports(db)
        self._intake = Intake(
            transport,
            isolation,
            lambda claim: Attempt(claim, self._tools),
            slots=registration.slots,
        )
        self._tools = Tools(
            registry=registry,
            isolation=isolation,
            settler=make_settler(db),
            on_progress=self._progress.note,
            on_handler_end=self._intake.free_slot,
            on_end=self._intake.let_go,
            settle_retry_seconds=times.settle_retry,
        )
        self._phase = Phase.STARTING
        self._reached = {phase: asyncio.Event() for phase in Phase}
        self._cause = Cause.ASKED
        self._useless_since: float | None = None
        self._background: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> int:
        """
        How many attempts are under way.
        """
        return len(self._intake.attempts)

    def stop(self) -> None:
        """
        Drain; called again, release immediately what still runs.
        """
        is_again = self._phase >= Phase.DRAINING
        self._move_to(Phase.FORCED if is_again else Phase.DRAINING)

    async def run(self) -> None:
        """
        Work until stopped.

        Raises:
            WorkerLost: A new worker must replace it.
            WorkerExhausted: A new process must replace it.
        """
        self._loop, self._loop_thread_id = asyncio.get_running_loop(), threading.get_ident()
        self._keeper = LeaseKeeper(
            self._db,
            self._registration,
            _published(self._registry),
            holder=self,
            loop=self._loop,
            times=self._times,
        )
        self._keeper.start()
        intake = self._in_background(self._intake.run(self._keeper.holds))
        ticking = self._in_background(self._tick())
        try:
            # Neither duty ends by itself; should one fail, the worker ends with it.
            await self._until(Phase.DRAINING, intake, ticking)
            await self._drain(intake)
            for duty in (intake, ticking):
                if duty.done():
                    duty.result()
        finally:
            self._move_to(Phase.ENDED)
            self._intake.make_void("its worker has ended")
            await cancel(*self._background)
            await self._keeper.stop()
            await self._transport.close()
            await self._isolation.close()
        if self._cause is Cause.LOST:
            raise WorkerLost(self._registration.id)
        if self._cause is Cause.EXHAUSTED:
            raise WorkerExhausted(self._registration.id)

    async def _drain(self, intake: asyncio.Task[None]) -> None:
        self._move_to(Phase.DRAINING)
        self._intake.close()
        idle = self._in_background(self._until_idle(intake))
        await self._until(Phase.FORCED, idle, seconds=self._times.shutdown_grace)
        self._move_to(Phase.FORCED)
        self._intake.release_all()
        await asyncio.wait({idle}, timeout=self._times.release)
        if idle.done():
            idle.result()

    async def _until_idle(self, intake: asyncio.Task[None]) -> None:
        # During the grace period, not before it: PostgreSQL may take long to answer a claim. And
        # the intake is not cancelled: a claim that is under way must come home.
        await self._transport.stop()
        await asyncio.wait({intake})
        await self._intake.until_idle()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._times.tick)
            self._intake.review(wait_seconds_max=self._times.claim_wait_max)
            await self._progress.flush()
            self._isolation.garbage.check()  # Attempts that run for long leave some, too.
            self._end_if_exhausted()

    def _end_if_exhausted(self) -> None:
        slots, now = self._registration.slots, self._loop.time()
        if self._isolation.stuck < slots:
            self._useless_since = None
        elif self._useless_since is None:
            self._useless_since = now
        elif now - self._useless_since > self._times.stall and self._cause is Cause.ASKED:
            events.worker_exhausted(worker_id=self._registration.id, slots=slots)
            self._move_to(Phase.DRAINING, Cause.EXHAUSTED)

    # Phases

    def _move_to(self, phase: Phase, cause: Cause = Cause.ASKED) -> None:
        self._cause = max(self._cause, cause)
        self._phase = max(self._phase, phase)
        for reached in Phase:
            if reached <= self._phase:
                self._reached[reached].set()

    async def _until(
        self, phase: Phase, *duties: asyncio.Task[Any], seconds: float | None = None
    ) -> None:
        """
        Wait for a phase, the end of a duty, or that the time is up.
        """
        reached = self._in_background(self._reached[phase].wait())
        await asyncio.wait({reached, *duties}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        await cancel(reached)

    def _in_background(self, work: Any) -> asyncio.Task[Any]:
        task = start_task(work, name=f"worker: {work.__qualname__}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # What the lease keeper says; see `lease.LeaseHolder`

    def on_kept(self) -> None:
        """
        Take tasks, for the first time or again.
        """
        self._move_to(Phase.WORKING)
        self._intake.wake()

    def on_held(self, held: Sequence[Held]) -> None:
        """
        Cancel what was cancelled, and release leases without an attempt.
        """
        suspects = []
        for lease in held:
            attempt = self._intake.attempts.get((lease.task_id, lease.lease_id))
            if attempt is None:
                suspects.append(Settling(lease.task_id, lease.lease_id, Settlement(Event.RELEASE)))
            elif lease.cancel_requested:
                attempt.cancel()
        if suspects:
            self._in_background(self._release_orphans(suspects))

    def on_fenced(self, reason: str) -> None:
        """
        Stop everything, and write nothing of it.
        """
        events.worker_fenced(worker_id=self._registration.id, reason=reason, running=self.running)
        self._intake.make_void(reason)

    def on_lost(self) -> None:
        """
        End: this worker was declared dead.
        """
        self._move_to(Phase.FORCED, Cause.LOST)
        self._intake.close()
        self.on_fenced("it was declared dead")

    def on_stalled(self, seconds: float) -> Callable[[Held], Settling]:
        """
        Say how each lease is to be settled; see `stall`.
        """
        stall = look_at(self._loop, self._loop_thread_id)
        return end_of_stalled(stall, seconds, dict(self._intake.attempts))

    async def _release_orphans(self, suspects: Sequence[Settling]) -> None:
        # The answer to their claim may be on its way to a loop that was busy.
        await asyncio.sleep(self._registration.heartbeat_seconds)
        attempts = self._intake.attempts
        orphans = [s for s in suspects if (s.task_id, s.lease_id) not in attempts]
        if not orphans:
            return
        self._intake.refuse((s.task_id, s.lease_id) for s in orphans)
        with contextlib.suppress(StoreError):
            written = await settle.settle(self._db, orphans)
            if any(written):
                events.orphans_released(count=sum(written))


def _published(registry: Registry) -> list[Published]:
    return [
        Published(handler.name, handler.policy.queue, handler.payload_schema())
        for handler in sorted(registry, key=lambda handler: handler.name)
    ]
