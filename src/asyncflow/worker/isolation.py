"""
Run one attempt of a handler in the loop, in a thread or in a child process, and stop it.

Whatever a handler does, a `Run` ends exactly once. What a call returned or raised is turned
into an outcome by `handlers/calls`; here is when it has to stop and what that means. Children
live in `worker/children` and `worker/child`.

An attempt is asked to stop when its time is up or its task is cancelled. It then has the
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
import math
import threading
import time
import types
from collections.abc import Callable, Coroutine
from queue import SimpleQueue
from typing import Any, TypeVar

from asyncflow.domain.outcome import Cancelled, Completed, Failed, Failure, Outcome
from asyncflow.errors import ChildNotStarted
from asyncflow.forking import end_copy
from asyncflow.handlers.calls import call_async, call_blocking, failed
from asyncflow.handlers.context import Context, Progress
from asyncflow.handlers.encoding import RESULT_BYTES_MAX
from asyncflow.handlers.registry import Handler, IsolationKind
from asyncflow.telemetry import events
from asyncflow.worker.children import Child, Children, Nursery
from asyncflow.worker.garbage import Garbage
from asyncflow.worker.shortage import Shortage

INTERRUPT_SECONDS = 0.5
"""How long a handler may take to stop when the worker no longer wants its outcome."""

OnStuck = Callable[[Outcome | None], None]
Result = TypeVar("Result")


class Isolation:
    """
    Runs the attempts of one worker.

    Args:
        slots: How many attempts the worker runs at once, 1 or more.
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
        self.children = Children(
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
        return _KINDS[handler.isolation](self, handler, payload, context, on_stuck)

    @property
    def stuck(self) -> int:
        """
        How many handlers still run although their attempts were given up.

        Each holds a thread or disturbs the loop; a worker should not start work without
        bound beside them.
        """
        return len(self.stuck_runs)

    async def close(self) -> None:
        """
        End every child process: idle ones get a second to leave, busy ones are killed.

        Threads that still run do not keep the worker's process from exiting.
        """
        self.threads.close()
        await self.children.close()


class Alarm:
    """
    The deadlines of all runs, on one timer.

    Most runs end long before their deadline; a timer of its own for each would cost more
    than everything else that is done to watch over it.
    """

    def __init__(self) -> None:
        self._deadlines: dict[Run, float] = {}
        self._rings_at = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def set(self, run: Run, at: float) -> None:
        """
        Call `run.on_deadline` at `at` by `time.monotonic`; replaces the run's former one.
        """
        self._deadlines[run] = at
        if at < self._rings_at:
            self._arm(at)

    def forget(self, run: Run) -> None:
        """
        Do not call it any more.
        """
        self._deadlines.pop(run, None)

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = at
        delay = max(0.0, at - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._ring)

    def _ring(self) -> None:
        self._timer, self._rings_at = None, math.inf
        now = time.monotonic()
        try:
            for run in [run for run, at in self._deadlines.items() if at <= now]:
                if run in self._deadlines:  # what one does may end another
                    run.on_deadline()
        finally:
            if self._deadlines:
                self._arm(min(self._deadlines.values()))


class Run:
    """
    One call of a handler: its deadline, its cancellation, its grace period, its end.

    Subclasses know how their kind is asked to stop and what is done when that was in vain.
    All methods belong to the loop's thread.
    """

    def __init__(
        self,
        isolation: Isolation,
        handler: Handler,
        payload: str,
        context: Context,
        on_stuck: OnStuck,
    ) -> None:
        self.isolation = isolation
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
            What the attempt came to, whatever the handler does; None if it was interrupted and
            left nothing whole, or could not begin.
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
            self.isolation.alarm.set(self, time.monotonic() + INTERRUPT_SECONDS)
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
            self.isolation.alarm.forget(self)
            self.give_up()
        else:
            self._stop()

    # For subclasses

    def start_clock(self) -> None:
        """
        Let the attempt's time run from now on.
        """
        self.isolation.alarm.set(self, time.monotonic() + self.context.remaining_seconds())

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
        self.isolation.stuck_runs.add(self)
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
        self.isolation.stuck_runs.discard(self)
        self.isolation.garbage.look()
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
        self.isolation.shortage.meet(reason)
        return self.stopped(failed(asyncio.CancelledError())) if self.is_stopping else None

    def stopped(self, end: Outcome | None, remark: str = "") -> Outcome | None:
        """
        What an attempt comes to that was asked to stop, and how it ended then.
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
        self.isolation.alarm.forget(self)

    def _stop(self) -> None:
        if not self._is_over and not self.is_stopping:
            self.is_stopping = True
            grace = self.isolation.cancel_grace_seconds
            self.isolation.alarm.set(self, time.monotonic() + grace)
            self.context.ask_to_stop()
            self.ask_to_stop()


class LoopRun(Run):
    """
    An `async def` handler, awaited inline in the asyncio task of its attempt.

    It may outlive the attempt there: given up, `on_stuck` gets the outcome, and what `outcome`
    returns later is nobody's.
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
            result_bytes_max=self.isolation.result_bytes_max,
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
        try:
            waited_for = context.run(step, value)
        except StopIteration as end:
            return end.value
        try:
            step, value = call.send, (yield waited_for)
        except BaseException as error:
            step, value = call.throw, error


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
        return await self._outcome

    def enter(self) -> None:
        """
        Have the handler called, and start the attempt's time.
        """
        raise NotImplementedError

    def conclude(self, outcome: Outcome | None) -> None:
        if not self._outcome.done():
            self._outcome.set_result(outcome)


class ThreadRun(OutsideRun):
    """
    A `def` handler, in one of the worker's threads.
    """

    def enter(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self.isolation.threads.run(lambda: self._call(loop))
        except RuntimeError as error:
            self.conclude(self.not_entered(f"No thread could be started: {error}."))
        else:
            self.isolation.shortage.pass_by()
            self.start_clock()

    def _call(self, loop: asyncio.AbstractEventLoop) -> None:
        # In the handler's thread.
        outcome = call_blocking(
            self.handler,
            self.payload,
            self.context,
            result_bytes_max=self.isolation.result_bytes_max,
        )
        end_copy()
        try:
            loop.call_soon_threadsafe(self._returned, outcome)
        except RuntimeError:
            pass  # the loop is closed: the worker has gone, and its attempts with it

    def _returned(self, outcome: Outcome) -> None:
        self.conclude(self.ended(outcome, stop_seen=self.context.stop_seen))


class ChildRun(OutsideRun):
    """
    A handler in a child process. The child reports here, see `children.Listener`.
    """

    _child: Child | None = None
    _is_killed = False
    _entering: asyncio.Task[None]

    def enter(self) -> None:
        self._entering = asyncio.get_running_loop().create_task(self._enter_child())

    async def _enter_child(self) -> None:
        try:
            child = await self.isolation.children.lend()
        except ChildNotStarted as error:
            return self.conclude(self.not_entered(str(error)))
        self.isolation.shortage.pass_by()
        if self.is_stopping:
            self.isolation.children.take_back(child)
            return self.conclude(self.ended_unentered())
        self._child = child
        # What it took to start a process is no part of the attempt.
        self.context.start_clock()
        self.start_clock()
        child.run(
            self.handler,
            self.payload,
            self.context,
            self,
            bytes_max=self.isolation.result_bytes_max,
        )

    def progressed(self, progress: Progress) -> None:
        self.context.progress(progress.fraction, progress.message)

    def child_ended(self, outcome: Outcome, *, stop_seen: bool) -> None:
        self._let_go_of_child()
        self.conclude(self.ended(outcome, stop_seen=stop_seen))

    def child_died(self, end: Outcome, *, was_entered: bool) -> None:
        self._let_go_of_child()
        if self._is_killed:
            self.end()
            grace = self.isolation.cancel_grace_seconds
            self.conclude(self.stopped(None, f"It did not stop within {grace:g} s and was killed."))
        elif was_entered or self.is_stopping:
            self.conclude(self.ended(end, stop_seen=True))
        else:
            # A warm child may die in the moment it is lent. Then the handler was not entered
            # and the task is not to blame: another child gets it.
            self.enter()

    def ask_to_stop(self) -> None:
        if self._child is not None:
            self._child.ask_to_stop()

    def stop_at_once(self) -> None:
        self.give_up()

    def give_up(self) -> None:
        if self._child is None:
            return self.conclude(self.ended_unentered())
        self._is_killed = True
        self._child.kill()

    def abandon(self) -> None:
        child = self._child
        if child is not None:
            child.kill()

    def _let_go_of_child(self) -> None:
        child, self._child = self._child, None
        assert child is not None
        self.isolation.children.take_back(child)


_KINDS: dict[IsolationKind, type[Run]] = {
    "loop": LoopRun,
    "thread": ThreadRun,
    "process": ChildRun,
}


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
