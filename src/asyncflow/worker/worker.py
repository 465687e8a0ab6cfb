"""
The life of a worker: take, run, settle, until asked to stop; then drain.

`run` reads as its life: beat, take in, drain. The first request to stop lets attempts finish
within the grace period, the second gives them back at once. A worker that is given up for
lost ends its `run` with `WorkerLost`; whoever started it starts another, under a new id.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from asyncflow.domain.outcome import Failed, Failure, Settlement
from asyncflow.domain.states import Event
from asyncflow.domain.task import Claim
from asyncflow.errors import StoreError, WorkerExhausted, WorkerLost
from asyncflow.handlers import Progress, Registry
from asyncflow.store import claims, settle
from asyncflow.store.database import Database
from asyncflow.store.settle import Settling
from asyncflow.store.workers import Held, Published, Registration
from asyncflow.telemetry import events
from asyncflow.transport import Transport
from asyncflow.worker.attempt import Attempt, Tools
from asyncflow.worker.isolation import Isolation
from asyncflow.worker.lease import LeaseKeeper
from asyncflow.worker.pace import Pace
from asyncflow.worker.settler import make_settler
from asyncflow.worker.stall import Stall, look_at

TICK_SECONDS = 0.5
WAIT_SECONDS_MAX = 1.0
"""A claim that found no slot for so long goes back: another worker may have one."""

GIVE_BACK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Times:
    """
    How patient a worker is, in seconds.

    Attributes:
        shutdown_grace: How long attempts may take to finish once it stops.
        stall: How long the event loop may stand still, or stuck handlers may hold every
            slot, before the process ends itself.
    """

    shutdown_grace: float = 30.0
    stall: float = 60.0


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
        self._slots = registration.slots
        self._pace = Pace(self._slots)
        self._waiting: deque[Attempt] = deque()
        self._attempts: dict[tuple[UUID, UUID], Attempt] = {}
        self._running = 0
        self._progress: dict[tuple[UUID, UUID], Progress] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._orphans: set[tuple[UUID, UUID]] = set()
        self._leases_hold = False
        self._may_take_more = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._ending = asyncio.Event()
        self._hurried = asyncio.Event()
        self._lost = False
        self._exhausted = False
        self._useful_at = time.monotonic()
        self._tools = Tools(
            registry=registry,
            isolation=isolation,
            settler=make_settler(db),
            on_progress=self._note_progress,
            on_handler_end=self._free_slot,
            on_end=self._let_go,
        )

    @property
    def running(self) -> int:
        """
        How many attempts are under way.
        """
        return len(self._attempts)

    def stop(self) -> None:
        """
        Stop in good order; called again, give back at once what still runs.
        """
        if self._ending.is_set():
            self._hurried.set()
        self._end()

    async def run(self) -> None:
        """
        Work until stopped.

        Raises:
            WorkerLost: It must be replaced by a new worker.
            WorkerExhausted: It must be replaced by a new process.
        """
        self._loop, self._loop_thread_id = asyncio.get_running_loop(), threading.get_ident()
        keeper = self._keeper = LeaseKeeper(
            self._db,
            self._registration,
            _published(self._registry),
            holder=self,
            loop=self._loop,
            stall_seconds=self._times.stall,
        )
        keeper.start()
        ticking = asyncio.create_task(self._tick())
        intake = asyncio.create_task(self._take_in())
        ending = asyncio.create_task(self._ending.wait())
        try:
            # Neither intake nor tick ends by itself; should one fail, the worker ends with it.
            await asyncio.wait({intake, ticking, ending}, return_when=asyncio.FIRST_COMPLETED)
            self._end()
            idle = self._in_background(self._become_idle(intake))
            await self._drain(idle)
            for duty in (intake, ticking, idle):
                if duty.done():
                    duty.result()
        finally:
            self._make_void("its worker has ended")
            await _cancel(ticking, intake, ending, *self._background)
            await keeper.stop()
            await self._transport.close()
            await self._isolation.close()
        if self._lost:
            raise WorkerLost(self._registration.id)
        if self._exhausted:
            raise WorkerExhausted(self._registration.id)

    def _end(self) -> None:
        self._ending.set()
        self._may_take_more.set()

    # Intake

    async def _take_in(self) -> None:
        while not self._ending.is_set():
            room = self._room()
            if room <= 0 or not self._leases_hold:
                self._may_take_more.clear()
                await self._may_take_more.wait()
                continue
            taken = await self._transport.take(
                min(room, self._pace.batch), window=self._pace.window
            )
            for claim in taken:
                self._accept(claim)
            if not (self._leases_hold and self._keeper.holds()):
                # Fenced while the claim was under way. A process that stood still meanwhile has
                # not even heard of it yet, and the claim in its hand is worth nothing.
                self._make_void("its worker was fenced")
            if self._hurried.is_set():
                self._give_back_all()
            self._start_waiting()
        self._give_back_waiting(older_than_seconds=0)

    def _room(self) -> int:
        stuck = self._isolation.stuck
        if stuck >= self._slots or self._isolation.shortage.lasts:
            return 0
        return self._pace.window - len(self._attempts) - stuck

    def _accept(self, claim: Claim) -> None:
        if (claim.task_id, claim.lease_id) in self._orphans:
            # Its answer took so long that the lease was given back; others may run it by now.
            self._transport.finished(claim)
            return
        attempt = Attempt(claim, self._tools)
        self._attempts[claim.task_id, claim.lease_id] = attempt
        self._waiting.append(attempt)

    def _start_waiting(self) -> None:
        while self._waiting and self._running + self._isolation.stuck < self._slots:
            self._start(self._waiting.popleft())

    def _start(self, attempt: Attempt) -> None:
        self._running += 1
        attempt.start()

    def _free_slot(self, ran_seconds: float | None) -> None:
        # Before the settle: what waits for PostgreSQL needs no slot, only room in the window,
        # and attempts that settle together are written together.
        self._running -= 1
        if ran_seconds is not None:
            self._pace.observe(ran_seconds)
        self._start_waiting()

    def _let_go(self, attempt: Attempt) -> None:
        self._transport.finished(attempt.claim)
        del self._attempts[attempt.claim.task_id, attempt.claim.lease_id]
        self._may_take_more.set()
        if not self._attempts:
            self._is_idle.set()

    # Drain

    async def _drain(self, idle: asyncio.Task[None]) -> None:
        self._give_back_waiting(older_than_seconds=0)
        hurried = self._in_background(self._hurried.wait())
        if not self._lost:
            await asyncio.wait(
                {idle, hurried},
                timeout=self._times.shutdown_grace,
                return_when=asyncio.FIRST_COMPLETED,
            )
        self._hurried.set()
        self._give_back_all()
        await asyncio.wait({idle}, timeout=GIVE_BACK_SECONDS)

    async def _become_idle(self, intake: asyncio.Task[None]) -> None:
        # Beside the grace period, not before it: PostgreSQL may take long to answer a claim. And
        # not cancelled: a claim that is under way must come home.
        await self._transport.stop()
        await asyncio.wait({intake})
        while self._attempts:
            self._is_idle.clear()
            await self._is_idle.wait()

    def _give_back_all(self) -> None:
        for attempt in tuple(self._attempts.values()):
            attempt.release()

    def _give_back_waiting(self, *, older_than_seconds: float) -> int:
        count = 0
        horizon = time.monotonic() - older_than_seconds
        while self._waiting and self._waiting[0].taken_at <= horizon:
            attempt = self._waiting.popleft()
            attempt.release()
            # What was given back before it began is settled as a release.
            self._start(attempt)
            count += 1
        return count

    # Twice a second

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self._give_back_waiting(older_than_seconds=WAIT_SECONDS_MAX):
                # Or they would be claimed ahead again at once, and given back for ever.
                self._pace.forget()
            self._start_waiting()
            await self._flush_progress()
            self._isolation.garbage.look()  # Attempts that run for long leave some, too.
            self._may_take_more.set()  # A stuck handler may have ended.
            self._end_if_exhausted()

    def _end_if_exhausted(self) -> None:
        now = time.monotonic()
        if self._isolation.stuck < self._slots:
            self._useful_at = now
        elif now - self._useful_at > self._times.stall and not self._exhausted:
            events.worker_exhausted(worker_id=self._registration.id, slots=self._slots)
            self._exhausted = True
            self._end()

    def _note_progress(self, claim: Claim, progress: Progress) -> None:
        # From any thread: adding to a dictionary and taking from it are atomic each.
        self._progress[claim.task_id, claim.lease_id] = progress

    async def _flush_progress(self) -> None:
        rows = []
        while self._progress:
            (task_id, lease_id), p = self._progress.popitem()
            text = json.dumps({"fraction": p.fraction, "message": p.message})
            rows.append((task_id, lease_id, text))
        if not rows:
            return
        # Progress is news, not truth: if it cannot be written now, the next report can.
        with contextlib.suppress(StoreError):
            await claims.record_progress(self._db, rows)

    # What the keeper of the leases has to say

    def on_kept(self) -> None:
        """
        See `lease.Holder`.
        """
        self._leases_hold = True
        self._may_take_more.set()

    def on_held(self, held: Sequence[Held]) -> None:
        """
        See `lease.Holder`.
        """
        suspects = []
        for lease in held:
            attempt = self._attempts.get((lease.task_id, lease.lease_id))
            if attempt is None:
                suspects.append(Settling(lease.task_id, lease.lease_id, Settlement(Event.RELEASE)))
            elif lease.cancel_requested:
                attempt.cancel()
        if suspects:
            self._in_background(self._release_orphans(suspects))

    async def _release_orphans(self, suspects: Sequence[Settling]) -> None:
        # The answer to their claim may be on its way to a loop that was busy.
        await asyncio.sleep(self._registration.heartbeat_seconds)
        orphans = [s for s in suspects if (s.task_id, s.lease_id) not in self._attempts]
        if not orphans:
            return
        self._orphans.update((s.task_id, s.lease_id) for s in orphans)
        with contextlib.suppress(StoreError):
            written = await settle.settle(self._db, orphans)
            if any(written):
                events.orphans_released(count=sum(written))

    def on_fenced(self, reason: str) -> None:
        """
        See `lease.Holder`.
        """
        self._leases_hold = False
        events.worker_fenced(
            worker_id=self._registration.id, reason=reason, running=len(self._attempts)
        )
        self._make_void(reason)

    def on_lost(self) -> None:
        """
        See `lease.Holder`.
        """
        self._lost = True
        self.on_fenced("it was declared lost")
        self._end()

    def _make_void(self, reason: str) -> None:
        for attempt in tuple(self._attempts.values()):
            attempt.make_void(reason)

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def on_stalled(self, seconds: float) -> Callable[[Held], Settling]:
        """
        See `lease.Holder`.
        """
        stall = look_at(self._loop, self._loop_thread_id)
        attempts = dict(self._attempts)
        blamed = _blamed(stall, attempts)
        events.worker_stalled(
            seconds=seconds,
            blamed=[(attempt.claim.task_id, attempt.claim.name) for attempt in blamed.values()],
            running=len(attempts),
            stack=stall.stack,
        )
        for attempt in attempts.values():
            attempt.abandon()
        failure = Failure("LoopBlocked", _what_it_did(seconds, len(blamed)), stall.stack)

        def settling(lease: Held) -> Settling:
            key = (lease.task_id, lease.lease_id)
            if key in blamed:
                settlement = blamed[key].decide(Failed(failure))
            else:
                # It has ended, and only the answer of PostgreSQL was not read; or it is not to
                # blame. One that we do not know is a claim whose answer was not read.
                attempt = attempts.get(key)
                settlement = (attempt and attempt.settlement) or Settlement(Event.RELEASE)
            return Settling(lease.task_id, lease.lease_id, settlement)

        return settling


def _blamed(
    stall: Stall, attempts: Mapping[tuple[UUID, UUID], Attempt]
) -> dict[tuple[UUID, UUID], Attempt]:
    """
    The one whose code blocks the loop. If nobody can tell, everyone whose code might: unpunished,
    they might do so again, on one worker after another, for ever.
    """
    if stall.context is not None:
        key = (stall.context.task_id, stall.context.lease_id)
        return {key: attempts[key]} if key in attempts else {}
    return {key: attempt for key, attempt in attempts.items() if attempt.is_on_loop}


def _what_it_did(seconds: float, blamed: int) -> str:
    who = "The handler" if blamed == 1 else f"One of {blamed} handlers, this or another,"
    return (
        f"{who} blocked the event loop of its worker for {seconds:.0f} s; the worker had to end. "
        "Code that waits without `await`, or computes for long, belongs in a `def` handler or in "
        'one with isolation="process".'
    )


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _published(registry: Registry) -> list[Published]:
    return [
        Published(handler.name, handler.policy.queue, handler.payload_schema())
        for handler in sorted(registry, key=lambda handler: handler.name)
    ]
