"""
What a worker does while its machine has no process, thread or file descriptor left: it releases
tasks, uncharged, and takes fewer.

A shortage is never charged to a task. The pause lets other workers have the task, and keeps this
one from claiming and releasing in circles.
"""

from __future__ import annotations

import time

from asyncflow.telemetry import events

PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 1.0, 30.0


class Shortage:
    """
    Pauses that double while attempts cannot begin, and end with the first that can.
    """

    def __init__(self) -> None:
        self._pause_seconds = PAUSE_SECONDS_MIN
        self._ends_at = 0.0

    @property
    def lasts(self) -> bool:
        """
        Whether the worker should take no more tasks for now.
        """
        return time.monotonic() < self._ends_at

    def meet(self, reason: str) -> None:
        """
        An attempt could not begin.
        """
        if self.lasts:
            return  # one of many that were under way together
        events.worker_starved(reason=reason, pause_seconds=self._pause_seconds)
        self._ends_at = time.monotonic() + self._pause_seconds
        self._pause_seconds = min(PAUSE_SECONDS_MAX, 2 * self._pause_seconds)

    def pass_by(self) -> None:
        """
        An attempt could begin: the shortage is over.
        """
        self._pause_seconds = PAUSE_SECONDS_MIN
