"""
Run one attempt of a handler in the loop, in a thread or in a child process, and stop it.

Whatever a handler does, `Isolation.run` answers with exactly one outcome. What a call
returned or raised is turned into an outcome by `handlers/calls`; here is when it has to
stop and what that means. Children live in `worker/children` and `worker/child`.

An attempt is asked to stop when its time is up or its `Cancellation` is set. It then has the
grace period: an `async def` handler gets `CancelledError`, a `def` handler sees
`context.cancelled`. A child process that has not ended by then is killed with its whole
process group. A thread or a coroutine cannot be: it is given up, the attempt ends all the
same, and it counts as `stuck` until it really ends.

Once asked to stop, a handler that knows of it cannot complete any more: what it returns may
be half the work, and running a task twice is allowed where losing it is not. A `def` handler
that never looked at `context.cancelled` knows nothing, so what it returns within the grace
period is whole and counts.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue

from asyncflow.domain.outcome import Cancelled, Completed, Crashed, Failed, Failure, Outcome
from asyncflow.handlers.calls import call_async, call_blocking, failed
from asyncflow.handlers.context import Context, Progress
from asyncflow.handlers.encoding import RESULT_BYTES_MAX
from asyncflow.handlers.registry import Handler
from asyncflow.telemetry import events
from asyncflow.telemetry.logs import Format
from asyncflow.worker.children import Child, Children

INTERRUPT_SECONDS = 1.0
"""How long a handler may take to stop when the worker no longer wants its outcome."""


class Cancellation:
    """
    A request that one attempt stops; once set it stays set.

    Like an `asyncio.Event` it belongs to the loop's thread. Unlike one it calls back, so
    that no attempt needs a second asyncio task to wait for a request that seldom comes.
    """

    __slots__ = ("_callback", "_is_set")

    def __init__(self) -> None:
        self._is_set = False
        self._callback: Callable[[], None] | None = None

    def is_set(self) -> bool:
        """
        Whether the attempt was asked to stop.
        """
        return self._is_set

    def set(self) -> None:
        """
        Ask the attempt to stop; does nothing when repeated or too late.
        """
        if not self._is_set:
            self._is_set = True
            if self._callback is not None:
                self._callback()

    def on_set(self, callback: Callable[[], None] | None) -> None:
        """
        Call `callback` when set, or at once if it is already; None takes it back.
        """
        self._callback = callback
        if callback is not None and self._is_set:
            callback()


class Isolation:
    """
    Runs the attempts of one worker.

    Args:
        slots: How many attempts the worker runs at once, 1 or more.
        cancel_grace_seconds: How long an attempt may take to stop when asked, 0 or more.
        result_bytes_max: Most bytes of a result as JSON.
        tasks_per_child_max: A child process is replaced after this many attempts, so that
            what leaks in it does not add up.
        log_level, log_format: How children log, as in `telemetry.logs.configure_logs`; a
            level of None leaves logging in them alone.
    """

    def __init__(
        self,
        *,
        slots: int,
        cancel_grace_seconds: float = 10.0,
        result_bytes_max: int = RESULT_BYTES_MAX,
        tasks_per_child_max: int = 1_000,
        log_level: str | None = None,
        log_format: Format = "auto",
    ) -> None:
        self.cancel_grace_seconds = cancel_grace_seconds
        self.result_bytes_max = result_bytes_max
        self.stuck_attempts: set[Attempt] = set()
        self._threads = Threads()
        logs = None if log_level is None else {"level": log_level, "log_format": log_format}
        self._children = Children(idle_max=slots, tasks_max=tasks_per_child_max, logs=logs)

    async def run(
        self, handler: Handler, payload: str, context: Context, *, cancelled: Cancellation
    ) -> Outcome:
        """
        Run one attempt to its end and tell what came of it.

        Never raises, with one exception: when the calling asyncio task is itself cancelled,
        the attempt is stopped without grace (a child is killed, the others get a second)
        and `CancelledError` passes through.

        Args:
            payload: JSON text.
            context: Made just now: the attempt's time runs from its making.
            cancelled: Set it to stop the attempt. One that stopped for it comes out as
                `Cancelled`, whatever the worker's reason was.
        """
        if handler.isolation == "loop":
            return await LoopAttempt(self, context, cancelled, handler, payload).outcome()
        if handler.isolation == "thread":
            attempt = ThreadAttempt(self, context, cancelled)
            try:
                self._threads.run(lambda: attempt.call(handler, payload))
            except RuntimeError as error:
                failure = Failure("Crashed", f"No thread could be started: {error}.")
                attempt.end(Crashed(failure), stop_seen=True)
            return await attempt.outcome()
        return await self._run_in_child(handler, payload, context, cancelled)

    @property
    def stuck(self) -> int:
        """
        How many handlers still run although their attempts were given up.

        Each holds a thread or disturbs the loop; a worker should not start work without
        bound beside them.
        """
        return len(self.stuck_attempts)

    async def close(self) -> None:
        """
        End every child process: idle ones get a second to leave, busy ones are killed.

        Threads that still run do not keep the worker's process from exiting.
        """
        self._threads.close()
        await self._children.close()

    async def _run_in_child(
        self, handler: Handler, payload: str, context: Context, cancelled: Cancellation
    ) -> Outcome:
        # A warm child may die in the moment it is lent. Then the handler was not entered and
        # the task is not to blame: another child gets it.
        while True:
            try:
                child = await self._children.lend()
            except OSError as error:
                return Crashed(Failure("Crashed", f"No process could be started: {error}."))
            attempt = ChildAttempt(self, context, cancelled, child)
            try:
                child.run(handler, payload, context, attempt, bytes_max=self.result_bytes_max)
                outcome = await attempt.outcome()
            finally:
                self._children.take_back(child)
            if not attempt.was_never_entered:
                return outcome


class Attempt:
    """
    The clock of one attempt: its deadline, its cancellation, its grace period, its end.

    Subclasses know how their kind is asked to stop and what is done when that was in vain.
    At most one timer is pending at any time.
    """

    def __init__(self, isolation: Isolation, context: Context, cancelled: Cancellation) -> None:
        self.isolation = isolation
        self.context = context
        self.loop = asyncio.get_running_loop()
        self.is_stopping = False
        self._has_ended = False
        self._cancelled = cancelled
        self._ended: asyncio.Future[Outcome] = self.loop.create_future()
        self._timer = self.loop.call_later(context.remaining_seconds(), self._stop)

    async def outcome(self) -> Outcome:
        """
        Wait for the end.
        """
        self._cancelled.on_set(self._stop)
        try:
            return await self._ended
        except asyncio.CancelledError:
            await self._interrupt()
            raise
        finally:
            self._timer.cancel()
            self._cancelled.on_set(None)

    def end(self, outcome: Outcome, *, stop_seen: bool) -> None:
        """
        The handler has ended; in the loop's thread.
        """
        self._has_ended = True
        self.isolation.stuck_attempts.discard(self)
        if not self._ended.done():
            if self.is_stopping and (stop_seen or not isinstance(outcome, Completed)):
                outcome = self.stopped(outcome)
            self._ended.set_result(outcome)

    def ask_to_stop(self) -> None:
        """
        Pass on the request to stop, beyond `context.cancelled`.
        """

    def interrupt(self) -> None:
        """
        Stop the handler without grace, if it can be.
        """
        self.ask_to_stop()

    def give_up(self) -> None:
        """
        The grace period is over and the handler still runs.
        """
        self.isolation.stuck_attempts.add(self)
        events.attempt_stuck(
            task_id=self.context.task_id, name=self.context.name, attempt=self.context.attempt
        )
        if not self._ended.done():
            self._ended.set_result(
                self.stopped(
                    None,
                    "It could not be stopped and still runs in the worker; "
                    'a handler with isolation="process" can be.',
                )
            )

    def stopped(self, end: Outcome | None, remark: str = "") -> Outcome:
        """
        What an attempt comes to that was asked to stop, and how it ended then.
        """
        traceback = end.failure.traceback if isinstance(end, Failed) else None
        if self._cancelled.is_set():
            message = remark or "The handler was asked to stop and stopped."
            return Cancelled(Failure("Cancelled", message, traceback))
        message = f"The attempt took longer than its timeout of {self.context.timeout_seconds:g} s."
        if remark:
            message += f" {remark}"
        return Failed(Failure("TimedOut", message, traceback))

    def _stop(self) -> None:
        if not self.is_stopping and not self._has_ended:
            self.is_stopping = True
            self._timer.cancel()
            self._timer = self.loop.call_later(
                self.isolation.cancel_grace_seconds, self._end_of_grace
            )
            self.context.ask_to_stop()
            self.ask_to_stop()

    def _end_of_grace(self) -> None:
        # A timer that is due in the same turn of the loop as the end may still fire after it.
        if not self._has_ended:
            self.give_up()

    async def _interrupt(self) -> None:
        # Nobody waits for the outcome, but the task may soon run elsewhere: a moment of patience
        # keeps the two from overlapping.
        if self._has_ended:
            return
        self._timer.cancel()
        self._ended = self.loop.create_future()
        self.is_stopping = True
        self.context.ask_to_stop()
        self.interrupt()
        try:
            await asyncio.wait([self._ended], timeout=INTERRUPT_SECONDS)
        finally:
            if not self._has_ended:
                self.give_up()


class LoopAttempt(Attempt):
    """
    An `async def` handler, as an asyncio task of its own.
    """

    def __init__(
        self,
        isolation: Isolation,
        context: Context,
        cancelled: Cancellation,
        handler: Handler,
        payload: str,
    ) -> None:
        super().__init__(isolation, context, cancelled)
        self._task = self.loop.create_task(self._call(handler, payload))

    async def _call(self, handler: Handler, payload: str) -> None:
        outcome = await call_async(
            handler, payload, self.context, result_bytes_max=self.isolation.result_bytes_max
        )
        self.end(outcome, stop_seen=True)

    def ask_to_stop(self) -> None:
        self._task.cancel()
        self._task.add_done_callback(self._never_entered)

    def give_up(self) -> None:
        self._task.cancel()
        super().give_up()

    def _never_entered(self, task: asyncio.Task[None]) -> None:
        # A task that is cancelled before its first step ends without running a line of ours.
        if task.cancelled():
            self.end(failed(asyncio.CancelledError()), stop_seen=True)


class ThreadAttempt(Attempt):
    """
    A `def` handler, in one of the worker's threads.
    """

    def call(self, handler: Handler, payload: str) -> None:
        """
        Call the handler; in its thread.
        """
        outcome = call_blocking(
            handler, payload, self.context, result_bytes_max=self.isolation.result_bytes_max
        )
        try:
            self.loop.call_soon_threadsafe(self._end, outcome)
        except RuntimeError:
            pass  # the loop is closed: the worker has gone and nobody waits for this thread

    def _end(self, outcome: Outcome) -> None:
        self.end(outcome, stop_seen=self.context.stop_seen)


class ChildAttempt(Attempt):
    """
    A handler in a child process. The child reports here, see `children.Listener`.

    Attributes:
        was_never_entered: The child died idle, before it took up the attempt.
    """

    def __init__(
        self, isolation: Isolation, context: Context, cancelled: Cancellation, child: Child
    ) -> None:
        super().__init__(isolation, context, cancelled)
        self._child = child
        self._is_killed = False
        self.was_never_entered = False

    def progressed(self, progress: Progress) -> None:
        self.context.progress(progress.fraction, progress.message)

    def ended(self, outcome: Outcome, *, stop_seen: bool) -> None:
        self.end(outcome, stop_seen=stop_seen)

    def died(self, end: Outcome, *, was_entered: bool) -> None:
        if self._is_killed:
            grace = self.isolation.cancel_grace_seconds
            end = self.stopped(None, f"It did not stop within {grace:g} s and was killed.")
            self.is_stopping = False
        else:
            self.was_never_entered = not was_entered and not self.is_stopping
        self.end(end, stop_seen=True)

    def ask_to_stop(self) -> None:
        self._child.ask_to_stop()

    def interrupt(self) -> None:
        self.give_up()

    def give_up(self) -> None:
        self._is_killed = True
        self._child.kill()


class Threads:
    """
    Threads that are reused, and that an exiting process does not wait for.

    `ThreadPoolExecutor` has its threads joined at exit, so one stuck handler would keep a
    worker from ending. There is no bound here: the worker's slots are the bound, and a
    thread that got stuck must not take the place of a live one.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0

    def run(self, job: Callable[[], None]) -> None:
        """
        Run `job`, which must not raise, with a copy of the caller's context variables.

        Raises:
            RuntimeError: No thread could be started; the job will not run.
        """
        context = contextvars.copy_context()
        with self._lock:
            start = self._idle == 0
            self._idle -= not start
        if start:
            # Before the job is in the queue, where a later thread would find it.
            threading.Thread(target=self._work, name="asyncflow-handler", daemon=True).start()
        self._jobs.put(lambda: context.run(job))

    def close(self) -> None:
        """
        Let idle threads end; busy ones end after their job.
        """
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # an idle thread would keep the last attempt and its payload alive
            with self._lock:
                self._idle += 1
        self._jobs.put(None)  # for the next thread
