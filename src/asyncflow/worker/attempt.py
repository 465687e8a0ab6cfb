"""
One attempt, top to bottom: run the handler, decide, settle, let go of the hint.

An attempt is one coroutine in one asyncio task; `_work` is all of it. An `async def` handler is
awaited inline in that task: a task of its own would cost as much again as a short handler.

A worker can end an attempt early in three ways. It *cancels* it, because its task was cancelled.
It *releases* it, because the worker stops: the task goes back unpunished. It makes it *void*,
because the lease is lost: nothing is written, since nothing may be. All three reach the attempt
only while its handler runs; before that they are noted, and after it they come too late.

The settle is what must not be lost:

- It is tried until PostgreSQL answers, for as long as the lease can be trusted. The hint is let
  go only after it.
- A handler that ignores its end keeps this task. The rest of the attempt then moves to a second
  one, and the first only waits for the handler to end, which frees the stuck slot.
- Code of a handler may keep this task and cancel it later. That interrupts a wait for the
  settle, which is then repeated; settling twice is settling once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from asyncflow.aio.batching import Batcher
from asyncflow.domain.outcome import (
    Crashed,
    Failed,
    Failure,
    Outcome,
    Released,
    Settlement,
    decide,
)
from asyncflow.domain.retry import Backoff
from asyncflow.domain.states import Event
from asyncflow.domain.task import Claim
from asyncflow.errors import StoreUnavailable
from asyncflow.handlers import Context, Progress, Registry
from asyncflow.handlers.encoding import error_kind, error_message, error_traceback
from asyncflow.store.settle import Settling
from asyncflow.telemetry import events
from asyncflow.worker.isolation.isolation import Isolation
from asyncflow.worker.isolation.loop import LoopRun
from asyncflow.worker.isolation.run import Run

REFUSALS_MAX = 3
REASON_LENGTH_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Tools:
    """
    What an attempt needs.

    Attributes:
        settler: Writes settlements in natural batches; True means recorded.
        on_progress: Takes what handlers report, from any thread.
        on_handler_end: Called once per attempt before it is settled, with the seconds its
            handler ran; None if it did not run to its end.
        on_end: Called once per attempt, when it is settled or its lease is lost.
        settle_retry_seconds: Bounds of the random wait between tries to settle.
    """

    registry: Registry
    isolation: Isolation
    settler: Batcher[Settling, bool]
    on_progress: Callable[[Claim, Progress], None]
    on_handler_end: Callable[[float | None], None]
    on_end: Callable[[Attempt], None]
    settle_retry_seconds: tuple[float, float]


class Attempt:
    """
    A claim that this worker works on. Belongs to the loop's thread.

    Attributes:
        taken_at: When it was claimed, by `time.monotonic`.
        settlement: How it ended, from the first try to write that; None before.
        void: Why the lease is lost; None while it holds.
    """

    __slots__ = (
        "_began_at",
        "_is_cancelled",
        "_is_finishing",
        "_is_released",
        "_rest",
        "_run",
        "_run_seconds",
        "_task",
        "_tools",
        "claim",
        "settlement",
        "taken_at",
        "void",
    )

    def __init__(self, claim: Claim, tools: Tools) -> None:
        self.claim = claim
        self.taken_at = self._began_at = time.monotonic()
        self.settlement: Settlement | None = None
        self.void: str | None = None
        self._tools = tools
        self._run: Run | None = None
        self._run_seconds: float | None = None
        self._is_cancelled = False
        self._is_finishing = False
        self._is_released = False
        self._task: asyncio.Task[None] | None = None
        self._rest: asyncio.Task[None] | None = None

    def start(self) -> None:
        """
        Begin to work; every end is an outcome that gets settled, or a lost lease.
        """
        self._task = asyncio.get_running_loop().create_task(self._work())

    def revive(self) -> None:
        """
        Release it if its task was cancelled before its first step: code of a handler may cancel
        every task it finds. Called now and then; a callback per attempt would cost more.
        """
        task = self._rest or self._task
        is_left = task is not None and task.done() and not self._is_finishing
        if is_left and self._run is None:
            self._rest = asyncio.get_running_loop().create_task(self._finish(None))

    def cancel(self) -> None:
        """
        Stop the handler because its task was cancelled; too late, it does nothing.
        """
        self._is_cancelled = True
        if self._run is not None:
            self._run.cancel()

    def release(self) -> None:
        """
        End it now and give the task back, unpunished.
        """
        self._is_released = True
        if self._run is not None:
            self._run.interrupt()

    def make_void(self, reason: str) -> None:
        """
        End it now and write nothing: its lease is lost.
        """
        self.void = reason
        if self._run is not None:
            self._run.interrupt()

    def abandon(self) -> None:
        """
        Stop the handler if that is possible, since its outcome will not be heard. From any
        thread, while the loop stands still.
        """
        if self._run is not None:
            self._run.abandon()

    @property
    def is_on_loop(self) -> bool:
        """
        Whether its handler runs on the event loop at this moment.
        """
        return isinstance(self._run, LoopRun)

    async def _work(self) -> None:
        outcome = await self._call_handler()
        if self._rest is None:  # else the handler outlived its attempt
            await self._finish(outcome)

    async def _finish(self, outcome: Outcome | None) -> None:
        self._is_finishing = True
        self._free_slot(None if outcome is None else self._run_seconds)
        is_recorded = await self._settle(self.decide(outcome or Released()))
        try:
            self._tools.on_end(self)
            # Last: a log line may lead to a terminal that has gone.
            self._log(is_recorded=is_recorded)
        except Exception as error:
            _report("An attempt failed after its settle.", error)

    # Run

    async def _call_handler(self) -> Outcome | None:
        """
        Run the handler; None means that the attempt ended early and left nothing whole.
        """
        if self._is_released or self.void is not None:
            return None
        handler = self._tools.registry.get(self.claim.name)
        if handler is None:
            # Claims are made for the names of this registry, so this is our own mistake.
            fact = f"This worker offers no {self.claim.name!r}."
            return Failed(Failure("UnknownHandler", fact))
        self._began_at = time.monotonic()
        try:
            self._run = self._tools.isolation.prepare(
                handler, self.claim.payload, self._context(), self._leave_behind
            )
            if self._is_cancelled:
                self._run.cancel()
            outcome = await self._run.outcome()
        except Exception as error:
            self._run = None
            # Our mistake, or the machine's. Charged all the same, or a task that always ends
            # like this would be run without end.
            return Crashed(Failure("Crashed", f"The attempt could not be run: {error!r}"))
        self._run = None
        if self._rest is None:
            self._run_seconds = time.monotonic() - self._began_at
        return outcome

    def _leave_behind(self, outcome: Outcome | None) -> None:
        # The handler keeps this attempt's task, so the rest needs another.
        self._run = None
        self._run_seconds = time.monotonic() - self._began_at
        self._rest = asyncio.get_running_loop().create_task(self._finish(outcome))

    def _context(self) -> Context:
        claim, tools = self.claim, self._tools
        return Context(
            claim,
            on_progress=lambda progress: tools.on_progress(claim, progress),
        )

    def _free_slot(self, ran_seconds: float | None) -> None:
        try:
            self._tools.on_handler_end(ran_seconds)
        except Exception as error:
            # A mistake in the worker's books must not cost the attempt its settle: the heartbeats
            # would keep its lease for as long as the worker lives.
            _report("A worker could not free a slot.", error)

    # Decide

    def decide(self, outcome: Outcome) -> Settlement:
        """
        Choose how to settle it with this outcome; never raises.
        """
        handler = self._tools.registry.get(self.claim.name)
        try:
            return self._decide(outcome, handler.policy.backoff if handler else Backoff())
        except Exception as error:
            # A user's own backoff, or a mistake of ours.
            return self._decide_after(error)

    def _decide_after(self, error: Exception) -> Settlement:
        fact = f"Its outcome could not be decided: {error_kind(error)}: {error_message(error)}"
        failure = Failure("Crashed", fact[:REASON_LENGTH_MAX], error_traceback(error))
        try:
            return self._decide(Crashed(failure), Backoff())
        except Exception:
            # Not even that can be decided. A dead letter is seen, and can be redriven.
            return Settlement(Event.FAIL, failure=failure)

    def _decide(self, outcome: Outcome, backoff: Backoff) -> Settlement:
        return decide(
            outcome,
            failures=self.claim.failures,
            max_attempts=self.claim.max_attempts,
            backoff=backoff,
            random=random.random(),
        )

    # Settle

    async def _settle(self, settlement: Settlement) -> bool:
        """
        Write it, however long that takes while the lease holds; return whether it is recorded.
        """
        claim, settler, refusals = self.claim, self._tools.settler, 0
        while self.void is None:
            self.settlement = settlement
            try:
                return await settler.submit(Settling(claim.task_id, claim.lease_id, settlement))
            except asyncio.CancelledError:
                continue  # by code of its handler that kept this task
            except StoreUnavailable as error:
                await self._wait_to_settle_again(str(error))
                continue
            except Exception as error:
                # A result is too precious to be thrown away for a mishap on the way.
                refusals += 1
                reason = repr(error)[:REASON_LENGTH_MAX]
            if refusals < REFUSALS_MAX:
                await self._wait_to_settle_again(reason)
            elif settlement.event is Event.FAIL:
                self.void = f"its outcome cannot be stored: {reason}"
            else:
                # PostgreSQL will not take this result, now or ever; the task must still end.
                failure = Failure("Unstorable", f"The outcome cannot be stored: {reason}")
                settlement = Settlement(Event.FAIL, failure=failure)
        return False

    async def _wait_to_settle_again(self, reason: str) -> None:
        # In a callback of its own: a log that fails must not end the attempt.
        note = partial(events.settle_delayed, task_id=self.claim.task_id, reason=reason)
        asyncio.get_running_loop().call_soon(note)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(random.uniform(*self._tools.settle_retry_seconds))

    def _log(self, *, is_recorded: bool) -> None:
        claim, settlement = self.claim, self.settlement
        if not is_recorded or settlement is None:
            events.attempt_void(
                task_id=claim.task_id,
                name=claim.name,
                attempt=claim.attempt,
                reason=self.void or "its lease was taken away",
            )
            return
        failure = settlement.failure
        events.attempt_settled(
            task_id=claim.task_id,
            name=claim.name,
            queue=claim.queue,
            tenant_id=claim.tenant_id,
            attempt=claim.attempt,
            outcome=settlement.outcome,
            run_seconds=self._run_seconds or 0.0,
            failure=failure.kind if failure else None,
            retry_seconds=settlement.delay_seconds if settlement.delay_seconds else None,
        )


def _report(message: str, error: Exception) -> None:
    fact = {"message": message, "exception": error}
    asyncio.get_running_loop().call_exception_handler(fact)
