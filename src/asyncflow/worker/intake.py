"""
How tasks get into a worker: claimed as there is room for them, started as slots are free.

A worker has `slots`, each with room for one handler that runs. Beyond them it holds some claims
that wait for a slot, and attempts that wait for their settle; all together at most the *window*.
How large that is, and how many tasks to claim in one go, is learned by `pace`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from uuid import UUID

from asyncflow.domain.task import Claim
from asyncflow.transport import Transport
from asyncflow.worker.attempt import Attempt
from asyncflow.worker.isolation.isolation import Isolation
from asyncflow.worker.pace import Pace

LeaseKey = tuple[UUID, UUID]
"""The ids of a task and of the lease it was claimed under."""


class Intake:
    """
    The claims of one worker, from `Transport.take` until their attempts end.

    Args:
        slots: How many handlers run at the same time, 1 or more.
        make_attempt: Makes an attempt that calls `free_slot` and `let_go` when it ends.

    Attributes:
        attempts: Those that have not ended, waiting ones included.
    """

    def __init__(
        self,
        transport: Transport,
        isolation: Isolation,
        make_attempt: Callable[[Claim], Attempt],
        *,
        slots: int,
    ) -> None:
        self.attempts: dict[LeaseKey, Attempt] = {}
        self._transport = transport
        self._isolation = isolation
        self._make_attempt = make_attempt
        self._slots = slots
        self._pace = Pace(slots)
        self._waiting: deque[Attempt] = deque()
        self._running = 0
        self._refused: set[LeaseKey] = set()
        self._is_closed = False
        self._releases_all = False
        self._may_have_room = asyncio.Event()
        self._is_idle = asyncio.Event()

    async def run(self, leases_hold: Callable[[], bool]) -> None:
        """
        Take tasks and start them until closed.
        """
        while not self._is_closed:
            room = self._room()
            if room <= 0 or not leases_hold():
                self._may_have_room.clear()
                await self._may_have_room.wait()
                continue
            for claim in await self._transport.take(
                min(room, self._pace.batch), window=self._pace.window
            ):
                self._accept(claim)
            if not leases_hold():
                # Fenced while the claim was under way. A process that stood still meanwhile may
                # not have heard of it yet, and the claim is worth nothing.
                self.make_void("its worker was fenced")
            self._start_waiting()
        self.release_waiting()

    def wake(self) -> None:
        """
        Check again whether there is room.
        """
        self._may_have_room.set()

    def review(self, *, wait_seconds_max: float) -> None:
        """
        Revive attempts whose tasks were cancelled, release claims that have waited for longer than
        this, and see whether a slot is free: a stuck handler may have ended.
        """
        for attempt in tuple(self.attempts.values()):
            attempt.revive()
        if self.release_waiting(older_than_seconds=wait_seconds_max):
            # Or they would be claimed ahead again immediately, and released without end.
            self._pace.forget()
        self._start_waiting()
        self.wake()

    def refuse(self, keys: Iterable[LeaseKey]) -> None:
        """
        Do not start these claims, should they still arrive: their leases are released.
        """
        self._refused.update(keys)

    # What an attempt reports

    def free_slot(self, ran_seconds: float | None) -> None:
        """
        A handler has ended; None if it did not run to its end.
        """
        # Before the settle: what waits for PostgreSQL needs no slot, only room in the window,
        # and attempts that settle together are written together.
        self._running -= 1
        if ran_seconds is not None:
            self._pace.observe(ran_seconds)
        self._start_waiting()

    def let_go(self, attempt: Attempt) -> None:
        """
        An attempt has ended: let go of its hint.
        """
        self._transport.let_go(attempt.claim)
        del self.attempts[attempt.claim.task_id, attempt.claim.lease_id]
        self.wake()
        if not self.attempts:
            self._is_idle.set()

    # The end

    def close(self) -> None:
        """
        Take no more, and release the claims that wait.
        """
        self._is_closed = True
        self.wake()
        self.release_waiting()

    def release_waiting(self, *, older_than_seconds: float = 0.0) -> int:
        """
        Release claims that wait for a slot; return how many.
        """
        count = 0
        horizon = time.monotonic() - older_than_seconds
        while self._waiting and self._waiting[0].taken_at <= horizon:
            attempt = self._waiting.popleft()
            attempt.release()
            self._start(attempt)  # which settles the release
            count += 1
        return count

    def release_all(self) -> None:
        """
        Release every attempt, and every claim that still arrives.
        """
        self._releases_all = True
        for attempt in tuple(self.attempts.values()):
            attempt.release()

    def make_void(self, reason: str) -> None:
        """
        End every attempt without a settle: their leases are lost.
        """
        for attempt in tuple(self.attempts.values()):
            attempt.make_void(reason)

    async def until_idle(self) -> None:
        """
        Wait until no attempt is left.
        """
        while self.attempts:
            self._is_idle.clear()
            await self._is_idle.wait()

    def _room(self) -> int:
        stuck = self._isolation.stuck
        if stuck >= self._slots or self._isolation.shortage.lasts:
            return 0
        return self._pace.window - len(self.attempts) - stuck

    def _accept(self, claim: Claim) -> None:
        key = (claim.task_id, claim.lease_id)
        if key in self._refused:
            # Its answer took so long that its lease was released; others may run it by now.
            self._transport.let_go(claim)
            return
        attempt = self.attempts[key] = self._make_attempt(claim)
        if self._releases_all:
            attempt.release()
        self._waiting.append(attempt)

    def _start_waiting(self) -> None:
        while self._waiting and self._running + self._isolation.stuck < self._slots:
            self._start(self._waiting.popleft())

    def _start(self, attempt: Attempt) -> None:
        self._running += 1
        attempt.start()
