"""
One call of a handler, from its start to its end, and what it means if it was asked to stop.

An attempt is asked to stop when its time is up or its task is cancelled. It then has the grace
period: an `async def` handler gets `CancelledError`, a `def` handler sees `context.cancelled`. A
child process that has not ended by then is killed with its whole process group. A thread or a
coroutine cannot be: its attempt ends without it, and it counts as *stuck* until it ends, too.

Once asked to stop, a handler that knows of it cannot complete any more: what it returns may be
half the work, and running a task twice is allowed where losing it is not. A `def` handler that
never read `context.cancelled` does not know, so what it returns within the grace period is whole
and counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from asyncflow.domain.outcome import Cancelled, Completed, Failed, Failure, Outcome
from asyncflow.handlers.calls import failed
from asyncflow.handlers.context import Context
from asyncflow.handlers.registry import Handler
from asyncflow.telemetry import events
from asyncflow.worker.isolation.means import Means

INTERRUPT_SECONDS = 0.5
"""How long a handler may take to stop when the worker no longer wants its outcome."""

OnStuck = Callable[[Outcome | None], None]


class Run:
    """
    One call of a handler: its deadline, its cancellation, its grace period, its end.

    Subclasses know how their kind is asked to stop and what is done when that was in vain.
    All methods belong to the loop's thread.
    """

    def __init__(
        self,
        means: Means,
        handler: Handler,
        payload: str,
        context: Context,
        on_stuck: OnStuck,
    ) -> None:
        self.means = means
        self.handler = handler
        self.payload = payload
        self.context = context
        self.on_stuck = on_stuck
        self.is_stopping = False
        self._is_over = False
        self._is_cancelled = False
        self._is_interrupted = False

    async def outcome(self) -> Outcome | None:
        """
        Call the handler and wait for its end; once.

        Returns:
            The attempt's outcome, whatever the handler does; None if it was interrupted and left
            nothing whole, or could not begin.
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """
        Stop it because its task was cancelled; if it stops for that, it ends as `Cancelled`.
        """
        self._is_cancelled = True
        self._stop()

    def interrupt(self) -> None:
        """
        Stop it without grace: the worker does not want its outcome any more.

        A child is killed. The others get half a second: nothing waits for the outcome, but the
        task may soon run elsewhere, and the two should not overlap. What an unaware handler
        returns in that time is whole and counts.
        """
        if not self._is_over and not self._is_interrupted:
            self._is_interrupted = self.is_stopping = True
            self.means.alarm.set(self, time.monotonic() + INTERRUPT_SECONDS)
            self.context.ask_to_stop()
            self.stop_at_once()

    def abandon(self) -> None:
        """
        Stop the handler if that is possible, and hear nothing of it. From any thread, while the
        loop stands still and the process is about to end.
        """
        self.context.ask_to_stop()

    def on_deadline(self) -> None:
        """
        See `Alarm`: the attempt's time is up, or its grace period.
        """
        if self.is_stopping:
            self.means.alarm.forget(self)
            self.give_up()
        else:
            self._stop()

    # For subclasses

    def start_clock(self) -> None:
        """
        Let the attempt's time run from now on.
        """
        self.means.alarm.set(self, time.monotonic() + self.context.remaining_seconds())

    def ask_to_stop(self) -> None:
        """
        Pass on the request to stop, beyond `context.cancelled`.
        """

    def stop_at_once(self) -> None:
        """
        Stop the handler without grace, if it can be.
        """
        self.ask_to_stop()

    def give_up(self) -> None:
        """
        The grace period is over and the handler still runs: end the attempt without it.
        """
        self.end()
        self.means.stuck_runs.add(self)
        self.conclude(
            self.stopped(
                None,
                "It could not be stopped and still runs in the worker; "
                'a handler with isolation="process" can be.',
            )
        )
        events.attempt_stuck(
            task_id=self.context.task_id, name=self.context.name, attempt=self.context.attempt
        )

    def conclude(self, outcome: Outcome | None) -> None:
        """
        Let the attempt go on with this outcome, whether or not its handler has ended.
        """
        raise NotImplementedError

    def ended(self, outcome: Outcome, *, stop_seen: bool) -> Outcome | None:
        """
        The handler has ended: say what that means for the attempt.
        """
        self.end()
        self.means.stuck_runs.discard(self)
        self.means.garbage.check()
        if self.is_stopping and (stop_seen or not isinstance(outcome, Completed)):
            return self.stopped(outcome)
        return outcome

    def ended_unentered(self) -> Outcome | None:
        """
        It was stopped before the handler was entered.
        """
        return self.ended(failed(asyncio.CancelledError()), stop_seen=True)

    def not_entered(self, reason: str) -> Outcome | None:
        """
        The machine lacks what the handler needs to run in; its task is not to blame.
        """
        self.end()
        self.means.shortage.meet(reason)
        return self.stopped(failed(asyncio.CancelledError())) if self.is_stopping else None

    def stopped(self, end: Outcome | None, remark: str = "") -> Outcome | None:
        """
        The outcome of an attempt that was asked to stop, given how its handler ended.
        """
        if self._is_interrupted:
            return None
        traceback = end.failure.traceback if isinstance(end, Failed) else None
        if self._is_cancelled:
            message = remark or "The handler was asked to stop and stopped."
            return Cancelled(Failure("Cancelled", message, traceback))
        message = f"The attempt took longer than its timeout of {self.context.timeout_seconds:g} s."
        if remark:
            message += f" {remark}"
        return Failed(Failure("TimedOut", message, traceback))

    def end(self) -> None:
        """
        Its end is known: nothing stops it any more.
        """
        self._is_over = True
        self.means.alarm.forget(self)

    def _stop(self) -> None:
        if not self._is_over and not self.is_stopping:
            self.is_stopping = True
            grace = self.means.cancel_grace_seconds
            self.means.alarm.set(self, time.monotonic() + grace)
            self.context.ask_to_stop()
            self.ask_to_stop()


class OutsideRun(Run):
    """
    A handler that runs outside of the event loop; its attempt waits for a future.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._outcome: asyncio.Future[Outcome | None] = asyncio.get_running_loop().create_future()

    async def outcome(self) -> Outcome | None:
        if self.is_stopping:
            self.conclude(self.ended_unentered())
        else:
            self.enter()
        try:
            return await asyncio.shield(self._outcome)
        except asyncio.CancelledError:
            # By code of another handler, which may cancel every task it finds. This handler runs
            # on, and its outcome still counts.
            self._outcome.add_done_callback(lambda ended: self.on_stuck(ended.result()))
            raise

    def enter(self) -> None:
        """
        Have the handler called, and start the attempt's time.
        """
        raise NotImplementedError

    def conclude(self, outcome: Outcome | None) -> None:
        if not self._outcome.done():
            self._outcome.set_result(outcome)
