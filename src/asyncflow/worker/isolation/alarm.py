"""
The deadlines of all runs of a worker, on one timer.

Most runs end long before their deadline; a timer for each would cost more than everything else
that watches over it.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Protocol


class Timed(Protocol):
    """
    What has a deadline; told apart by identity.
    """

    def on_deadline(self) -> None:
        """
        Called when it has come.
        """


class Alarm:
    """
    Calls each run at its deadline. Belongs to the loop's thread.
    """

    def __init__(self) -> None:
        self._deadlines: dict[Timed, float] = {}
        self._rings_at = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def set(self, run: Timed, at: float) -> None:
        """
        Call `run.on_deadline` at `at` by `time.monotonic`; replaces the run's former one.
        """
        self._deadlines[run] = at
        if at < self._rings_at:
            self._arm(at)

    def forget(self, run: Timed) -> None:
        """
        Do not call it any more.
        """
        self._deadlines.pop(run, None)

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = at
        delay = max(0.0, at - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._ring)

    def _ring(self) -> None:
        self._timer, self._rings_at = None, math.inf
        now = time.monotonic()
        try:
            for run in [run for run, at in self._deadlines.items() if at <= now]:
                if run in self._deadlines:  # what one does may end another
                    run.on_deadline()
        finally:
            if self._deadlines:
                self._arm(min(self._deadlines.values()))
