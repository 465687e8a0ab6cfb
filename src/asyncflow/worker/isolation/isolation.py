"""
Where the attempts of one worker run.

Whatever a handler does, a `Run` ends exactly once. What a call returned or raised is turned into
an outcome by `handlers/calls`; when a call has to stop, and what that means, is decided in `run`.
"""

from __future__ import annotations

from asyncflow.handlers.context import Context
from asyncflow.handlers.registry import Handler, IsolationKind
from asyncflow.worker.isolation.loop import LoopRun
from asyncflow.worker.isolation.means import Means
from asyncflow.worker.isolation.process import ChildRun
from asyncflow.worker.isolation.run import OnStuck, Run
from asyncflow.worker.isolation.thread import ThreadRun

RUNS: dict[IsolationKind, type[Run]] = {
    "loop": LoopRun,
    "thread": ThreadRun,
    "process": ChildRun,
}


class Isolation(Means):
    """
    Runs the attempts of one worker; see `Means` for its arguments.
    """

    def prepare(self, handler: Handler, payload: str, context: Context, on_stuck: OnStuck) -> Run:
        """
        Make the run of one attempt; awaiting its `outcome` begins it.

        Args:
            payload: JSON text.
            context: Made just now: the attempt's time runs from its making, or in a child
                process from when that is ready.
            on_stuck: Called in the loop's thread, at most once, with the outcome of the attempt,
                if what awaits `outcome` cannot go on with it: a handler on the loop does not stop,
                or code of a handler cancelled the attempt's task.
        """
        return RUNS[handler.isolation](self, handler, payload, context, on_stuck)

    async def close(self) -> None:
        """
        End every child process: idle ones get a second to leave, busy ones are killed.

        Threads that still run do not keep the worker's process from exiting.
        """
        self.threads.close()
        await self.children.close()
