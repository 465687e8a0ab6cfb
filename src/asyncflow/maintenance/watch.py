"""
Notices that no maintenance process is running, for the processes that depend on one: API and
workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from asyncflow.aio.background import Background
from asyncflow.store.database import Executor
from asyncflow.store.presence import SILENT_SECONDS_MAX, presence
from asyncflow.telemetry import events

CHECK_SECONDS = 10.0
REPEAT_SECONDS = 600.0


class MaintenanceWatch:
    """
    Logs when maintenance is gone, again every ten minutes, and when it is back.

    A process may start before maintenance does, so nothing is logged in its first seconds.
    """

    def __init__(self, db: Executor) -> None:
        self._db = db
        self._began_at = time.monotonic()
        self._logged_at: float | None = None
        self._background = Background(self._watch)

    async def __aenter__(self) -> MaintenanceWatch:
        self._background.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._background.stop()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            # What keeps it from checking is logged by those that need the database.
            with contextlib.suppress(Exception):
                await self.check(now=time.monotonic())

    async def check(self, *, now: float) -> None:
        """
        Check once, and log a change or a reminder.

        Args:
            now: In seconds of the monotonic clock.
        """
        found = await presence(self._db)
        if not found.is_gone:
            if self._logged_at is not None:
                self._logged_at = None
                events.maintenance_back()
            return
        is_too_early = now < self._began_at + SILENT_SECONDS_MAX
        is_logged = self._logged_at is not None and now < self._logged_at + REPEAT_SECONDS
        if not is_too_early and not is_logged:
            self._logged_at = now
            events.maintenance_gone(silent_seconds=found.silent_seconds)
