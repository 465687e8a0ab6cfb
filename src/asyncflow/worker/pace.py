"""
How many tasks a worker claims ahead, and how many it holds.

Slow tasks are claimed one at a time and only into free slots, so that five workers share
them evenly. Tasks that take milliseconds would then spend more time in round trips than in
handlers; so a worker also holds, beyond its slots, what it will start within `HORIZON_SECONDS`.
"""

from __future__ import annotations

HORIZON_SECONDS = 0.05
WINDOW_MAX = 1_000
SMOOTHING = 0.05


class Pace:
    """
    Learns from the attempts that end how far ahead to claim.

    Args:
        slots: Attempts the worker runs at the same time, 1 or more.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._average_seconds: float | None = None

    def observe(self, run_seconds: float) -> None:
        """
        Learn how long an attempt ran.
        """
        if self._average_seconds is None:
            self._average_seconds = run_seconds
        else:
            self._average_seconds += SMOOTHING * (run_seconds - self._average_seconds)

    def forget(self) -> None:
        """
        Start again from the slots alone: what was claimed ahead found no slot.
        """
        self._average_seconds = None

    @property
    def batch(self) -> int:
        """
        How many tasks to claim in one go, from 1: what the slots start within the horizon.
        """
        if self._average_seconds is None:
            return 1
        if self._average_seconds * WINDOW_MAX <= self._slots * HORIZON_SECONDS:
            return WINDOW_MAX
        return max(1, int(self._slots * HORIZON_SECONDS / self._average_seconds))

    @property
    def window(self) -> int:
        """
        How many unfinished claims to hold at most, never fewer than the slots.
        """
        return max(self._slots, self.batch)
