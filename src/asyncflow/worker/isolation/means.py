"""
What all runs of one worker share.
"""

from __future__ import annotations

from asyncflow.handlers.encoding import RESULT_BYTES_MAX
from asyncflow.worker.isolation.alarm import Alarm
from asyncflow.worker.isolation.garbage import Garbage
from asyncflow.worker.isolation.nursery import Nursery
from asyncflow.worker.isolation.pool import ChildPool
from asyncflow.worker.isolation.shortage import Shortage
from asyncflow.worker.isolation.threads import Threads


class Means:
    """
    The bounds of runs, what they run in, and those that are stuck.

    Args:
        slots: How many attempts the worker runs at the same time, 1 or more.
        cancel_grace_seconds: How long an attempt may take to stop when asked, 0 or more.
        result_bytes_max: Most bytes of a result as JSON.
        tasks_per_child_max: A child process is replaced after this many attempts, so that
            what leaks in it does not add up.
        nursery: Where child processes come from; None is one that has loaded no modules.
    """

    def __init__(
        self,
        *,
        slots: int,
        cancel_grace_seconds: float = 10.0,
        result_bytes_max: int = RESULT_BYTES_MAX,
        tasks_per_child_max: int = 1_000,
        nursery: Nursery | None = None,
    ) -> None:
        self.cancel_grace_seconds = cancel_grace_seconds
        self.result_bytes_max = result_bytes_max
        self.alarm = Alarm()
        self.garbage = Garbage()
        self.stuck_runs: set[object] = set()
        self.threads = Threads()
        self.shortage = Shortage()
        self.children = ChildPool(
            nursery or Nursery(()), idle_max=slots, tasks_max=tasks_per_child_max
        )

    @property
    def stuck(self) -> int:
        """
        How many handlers still run although their attempts have ended.

        Each holds a thread or disturbs the loop, so a worker counts them as taken slots.
        """
        return len(self.stuck_runs)
