"""
Notices that no maintenance process is at work, for those that depend on one: API and workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from asyncflow.store.database import Executor
from asyncflow.store.presence import SILENT_SECONDS_MAX, presence
from asyncflow.telemetry import events

LOOK_SECONDS = 10.0
REPEAT_SECONDS = 600.0


class MaintenanceWatch:
    """
    Says so in the log when maintenance is gone, again every ten minutes, and when it is back.

    A process may start before maintenance does, so it waits for as long as a silence may last.
    """

    def __init__(self, db: Executor) -> None:
        self._db = db
        self._began_at = time.monotonic()
        self._said_at: float | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> MaintenanceWatch:
        self._task = asyncio.get_running_loop().create_task(self._watch())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            # Whatever keeps it from looking is said by those that need the database.
            with contextlib.suppress(Exception):
                await self.look(now=time.monotonic())

    async def look(self, *, now: float) -> None:
        """
        Look once, and say what there is to say.

        Args:
            now: In seconds of the monotonic clock.
        """
        found = await presence(self._db)
        if not found.is_gone:
            if self._said_at is not None:
                self._said_at = None
                events.maintenance_back()
            return
        is_too_early = now < self._began_at + SILENT_SECONDS_MAX
        is_said = self._said_at is not None and now < self._said_at + REPEAT_SECONDS
        if not is_too_early and not is_said:
            self._said_at = now
            events.maintenance_gone(silent_seconds=found.silent_seconds)
