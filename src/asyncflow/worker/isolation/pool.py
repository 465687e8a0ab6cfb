"""
The child processes of one worker: started on demand, lent, and kept warm.
"""

from __future__ import annotations

import asyncio
import time

from asyncflow.worker.isolation.child import Child
from asyncflow.worker.isolation.nursery import Nursery

MEMORY_CHECK_SECONDS = 0.1
CLOSE_SECONDS = 5.0
"""How long a worker that ends waits to hear that its children have died."""

IDLE_SECONDS = 60.0
"""An idle child leaves after this long without an attempt."""


class ChildPool:
    """
    The children of one worker, started on demand and kept warm.

    Args:
        idle_max: How many idle ones are kept, 0 or more.
        tasks_max: After how many attempts a child is replaced, 1 or more.
        idle_seconds: How long one is kept without an attempt.
    """

    def __init__(
        self,
        nursery: Nursery,
        *,
        idle_max: int,
        tasks_max: int,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._nursery = nursery
        self._idle_seconds = idle_seconds
        self._sweep: asyncio.TimerHandle | None = None
        self._idle_max = idle_max
        self._tasks_max = tasks_max
        self._idle: list[Child] = []
        self._lent: set[Child] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._memory_watch: asyncio.Task[None] | None = None

    async def lend(self) -> Child:
        """
        An idle child, or a new one; give it back with `take_back`.

        Raises:
            ChildNotStarted: None can be started.
        """
        while self._idle:
            child = self._idle.pop()
            if child.is_idle:
                break
        else:
            child = await self._nursery.child()
        self._lent.add(child)
        if self._memory_watch is None:
            self._memory_watch = asyncio.get_running_loop().create_task(self._watch_memory())
        return child

    def take_back(self, child: Child) -> None:
        """
        Keep `child` for the next attempt, or let it leave if it is used up, busy or dead.
        """
        self._lent.discard(child)
        is_fit = child.is_idle and child.tasks < self._tasks_max
        if is_fit and len(self._idle) < self._idle_max:
            child.idle_since = time.monotonic()
            self._idle.append(child)
            self._sweep_later()
        elif not child.reaper.done():
            self._dismiss(child)

    async def close(self) -> None:
        """
        End all of them and wait until they are gone.
        """
        if self._sweep is not None:
            self._sweep.cancel()
        for child in self._lent:
            child.kill()
        while self._idle:
            self._dismiss(self._idle.pop())
        remaining = {child.reaper for child in self._lent} | self._leaving
        if remaining:
            # A nursery that tells of no death any more is closed next, and they with it.
            await asyncio.wait(remaining, timeout=CLOSE_SECONDS)

    def _sweep_later(self) -> None:
        if self._sweep is None and self._idle:
            seconds = self._idle[0].idle_since + self._idle_seconds - time.monotonic()
            self._sweep = asyncio.get_running_loop().call_later(seconds, self._dismiss_idle)

    def _dismiss_idle(self) -> None:
        # The first is idle for longest: what is lent is the last one that came back.
        self._sweep = None
        while self._idle and self._idle[0].idle_since + self._idle_seconds <= time.monotonic():
            self._dismiss(self._idle.pop(0))
        self._sweep_later()

    def _dismiss(self, child: Child) -> None:
        leaving = asyncio.get_running_loop().create_task(child.leave())
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _watch_memory(self) -> None:
        while self._lent:
            for child in self._lent:
                child.check_memory()
            await asyncio.sleep(MEMORY_CHECK_SECONDS)
        self._memory_watch = None
