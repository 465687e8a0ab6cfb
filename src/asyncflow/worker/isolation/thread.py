"""
Handlers in threads of the worker's process.
"""

from __future__ import annotations

import asyncio

from asyncflow.domain.outcome import Outcome
from asyncflow.forking import end_copy
from asyncflow.handlers.calls import call_blocking
from asyncflow.worker.isolation.run import OutsideRun


class ThreadRun(OutsideRun):
    """
    A `def` handler, in one of the worker's threads.
    """

    def enter(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self.means.threads.run(lambda: self._call(loop))
        except RuntimeError as error:
            self.conclude(self.not_entered(f"No thread could be started: {error}."))
        else:
            self.means.shortage.pass_by()
            self.start_clock()

    def _call(self, loop: asyncio.AbstractEventLoop) -> None:
        # In the handler's thread.
        outcome = call_blocking(
            self.handler,
            self.payload,
            self.context,
            result_bytes_max=self.means.result_bytes_max,
        )
        end_copy()
        try:
            loop.call_soon_threadsafe(self._returned, outcome)
        except RuntimeError:
            pass  # the loop is closed: the worker has gone, and its attempts with it

    def _returned(self, outcome: Outcome) -> None:
        self.conclude(self.ended(outcome, stop_seen=self.context.stop_seen))
