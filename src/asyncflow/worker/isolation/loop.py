"""
Handlers on the worker's event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import types
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from asyncflow.domain.outcome import Outcome
from asyncflow.forking import end_copy
from asyncflow.handlers.calls import call_async
from asyncflow.worker.isolation.run import Run

Result = TypeVar("Result")


class LoopRun(Run):
    """
    An `async def` handler, awaited inline in the asyncio task of its attempt.

    It may outlive the attempt there. Then `on_stuck` gets the attempt's outcome, and what
    `outcome` returns in the end is ignored.
    """

    _task: asyncio.Task[Any] | None = None

    async def outcome(self) -> Outcome | None:
        if self.is_stopping:
            return self.ended_unentered()
        self._task = asyncio.current_task()
        self.start_clock()
        call = call_async(
            self.handler,
            self.payload,
            self.context,
            result_bytes_max=self.means.result_bytes_max,
        )
        # In variables of its own: what follows in this task is the worker's, the settle and log
        # lines above all.
        outcome = await within(contextvars.copy_context(), call)
        # From here on the task is not the handler's, and must not be cancelled for it.
        self._task = None
        end_copy()
        return self.ended(outcome, stop_seen=True)

    def ask_to_stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def give_up(self) -> None:
        self.ask_to_stop()
        super().give_up()

    def conclude(self, outcome: Outcome | None) -> None:
        self.on_stuck(outcome)


@types.coroutine
def within(context: contextvars.Context, call: Coroutine[Any, Any, Result]) -> Any:
    """
    Await `call` in this task, with the variables of `context`.
    """
    step: Callable[[Any], Any] = call.send
    value: Any = None
    while True:
        sent, value = value, None
        try:
            waited_for = context.run(step, sent)
        except StopIteration as end:
            return end.value
        finally:
            # An error that was sent holds the handler's frames, and would hold them through this.
            sent = None
        try:
            step, value = call.send, (yield waited_for)
        except BaseException as error:
            step, value = call.throw, error
