"""
Where the attempts of one worker run.

Whatever a handler does, a `Run` ends exactly once. What a call returned or raised is turned into
an outcome by `handlers/calls`; when a call has to stop, and what that means, is decided in `run`.
"""

from __future__ import annotations

from asyncflow.handlers.context import Context
from asyncflow.handlers.encoding import RESULT_BYTES_MAX
from asyncflow.handlers.registry import Handler, IsolationKind
from asyncflow.worker.isolation.alarm import Alarm
from asyncflow.worker.isolation.garbage import Garbage
from asyncflow.worker.isolation.loop import LoopRun
from asyncflow.worker.isolation.nursery import Nursery
from asyncflow.worker.isolation.pool import ChildPool
from asyncflow.worker.isolation.process import ChildRun
from asyncflow.worker.isolation.run import OnStuck, Run
from asyncflow.worker.isolation.shortage import Shortage
from asyncflow.worker.isolation.thread import ThreadRun, Threads

RUNS: dict[IsolationKind, type[Run]] = {
    "loop": LoopRun,
    "thread": ThreadRun,
    "process": ChildRun,
}


class Isolation:
    """
    Runs the attempts of one worker.

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
        self.stuck_runs: set[Run] = set()
        self.threads = Threads()
        self.shortage = Shortage()
        self.children = ChildPool(
            nursery or Nursery(()), idle_max=slots, tasks_max=tasks_per_child_max
        )

    def prepare(self, handler: Handler, payload: str, context: Context, on_stuck: OnStuck) -> Run:
        """
        Make the run of one attempt; awaiting its `outcome` begins it.

        Args:
            payload: JSON text.
            context: Made just now: the attempt's time runs from its making, or in a child
                process from when that is ready.
            on_stuck: Called in the loop's thread, at most once, if a handler on the loop does not
                stop: with the outcome of its attempt. What awaits `outcome` waits on.
        """
        return RUNS[handler.isolation](self, handler, payload, context, on_stuck)

    @property
    def stuck(self) -> int:
        """
        How many handlers still run although their attempts have ended.

        Each holds a thread or disturbs the loop, so a worker counts them as taken slots.
        """
        return len(self.stuck_runs)

    async def close(self) -> None:
        """
        End every child process: idle ones get a second to leave, busy ones are killed.

        Threads that still run do not keep the worker's process from exiting.
        """
        self.threads.close()
        await self.children.close()
