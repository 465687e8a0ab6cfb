"""
Background tasks: their owner cancels and awaits them, and none fails in silence.

An owner with one duty that lasts as long as itself holds a `Background`:

    class Watch:
        def __init__(self) -> None:
            self._background = Background(self._watch)

        async def __aenter__(self) -> Watch:
            self._background.start()
            return self

        async def __aexit__(self, *exc_info: object) -> None:
            await self._background.stop()

An owner that starts many short ones uses `start_task` and, in the end, `cancel`.

A duty handles the failures it expects by itself. Any other is a bug: it goes to the loop's
exception handler, which logs it, as soon as it happens rather than when the owner ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

Result = TypeVar("Result")


class Background:
    """
    One duty that runs in the background of its owner, from `start` to `stop`.

    It is also a context manager.

    Args:
        run: Begins the duty.
        name: For logs and debuggers; None takes the name of `run`.
    """

    def __init__(
        self, run: Callable[[], Coroutine[Any, Any, object]], *, name: str | None = None
    ) -> None:
        self._run = run
        self._name = getattr(run, "__qualname__", repr(run)) if name is None else name
        self._task: asyncio.Task[object] | None = None

    def start(self) -> None:
        """
        Start the duty; to be called once.
        """
        assert self._task is None, f"{self._name} has been started"
        self._task = start_task(self._run(), name=self._name)

    async def stop(self) -> None:
        """
        Cancel the duty and wait until it has ended; does nothing if it was never started.
        """
        if self._task is not None:
            await cancel(self._task)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()


def start_task(work: Coroutine[Any, Any, Result], *, name: str) -> asyncio.Task[Result]:
    """
    Start a task whose failure is reported when it happens.
    """
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(_report_failure)
    return task


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """
    Cancel tasks and wait until all have ended. What they raise is not raised here.
    """
    for task in tasks:
        task.cancel()
    # Not `await task`: its CancelledError could not be told from a cancellation of the caller.
    if tasks:
        await asyncio.wait(tasks)


def _report_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        fact = {"message": f"{task.get_name()} failed", "exception": error, "task": task}
        task.get_loop().call_exception_handler(fact)
