"""
One attempt, top to bottom: run the handler, decide, settle, let the hint go.

The settle is the point of the exercise. It is tried until PostgreSQL answers, for as long
as the lease can be trusted; the hint is let go only after it. An attempt may also end early
in two ways: it is *given back* (the worker is stopping), which settles as a release, or it
is *void* (the lease is lost), which writes nothing because nothing may be written.

An attempt moves on by callbacks. The only asyncio task it needs is its handler's; one more
for waiting would cost as much as a short handler.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from asyncflow.store import settle
from asyncflow.store.database import Database
from asyncflow.store.settle import Settling
from asyncflow.telemetry import events
from asyncflow.worker.isolation import Isolation, LoopRun, Run

SETTLE_RETRY_SECONDS = (0.1, 0.6)
SETTLE_SIZE_MAX = 200
SETTLE_BYTES_MAX = 4 * 1024 * 1024
REFUSALS_MAX = 3
REASON_LENGTH_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Tools:
    """
    What an attempt needs.

    Attributes:
        settler: Writes settlements in natural batches; True means written.
        on_progress: Takes what handlers report, from any thread.
        on_handler_end: Called once per attempt before it is settled, with the seconds its
            handler ran; None if it did not run to its end.
        on_end: Called once per attempt, when it is settled or its lease is lost.
    """

    registry: Registry
    isolation: Isolation
    settler: Batcher[Settling, bool]
    on_progress: Callable[[Claim, Progress], None]
    on_handler_end: Callable[[float | None], None]
    on_end: Callable[[Attempt], None]


class Attempt:
    """
    A claim that this worker is working on. Belongs to the loop's thread.

    Attributes:
        taken_at: When it was claimed, by `time.monotonic`.
        settlement: How it ended, while that is written; None before.
        void: Why the lease is lost; None while it holds.
    """

    __slots__ = (
        "_began_at",
        "_given_back",
        "_is_cancelled",
        "_refusals",
        "_run",
        "_run_seconds",
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
        self._run_seconds = 0.0
        self._is_cancelled = False
        self._given_back = False
        self._refusals = 0

    @property
    def is_on_loop(self) -> bool:
        """
        Whether its handler runs on the event loop.
        """
        return isinstance(self._run, LoopRun)

    def begin(self) -> None:
        """
        Work it off. Whatever happens is an outcome, or the lease is lost.
        """
        self._began_at = time.monotonic()
        # What never runs ends in a later turn of the loop, as what runs does: an end makes
        # room for the next attempt, and many in a row would otherwise begin within each other.
        if self._given_back or self.void is not None:
            _later(self._end_without_run, Released())
            return
        handler = self._tools.registry.get(self.claim.name)
        if handler is None:
            # Claims are made for the names of this registry, so this is our own mistake.
            fact = f"This worker offers no {self.claim.name!r}."
            _later(self._end_without_run, Failed(Failure("UnknownHandler", fact)))
            return
        try:
            self._run = self._tools.isolation.start(
                handler, self.claim.payload, self._context(), self._on_run_end
            )
        except Exception as error:
            # Ours, or the machine's. Punished all the same, or a task that always ends like
            # this would run for ever.
            fact = f"The attempt could not be run: {error!r}"
            _later(self._end_without_run, Crashed(Failure("Crashed", fact)))
            return
        if self._is_cancelled:
            self._run.cancel()

    def cancel(self) -> None:
        """
        Stop it because somebody cancelled the task; too late, it does nothing.
        """
        self._is_cancelled = True
        if self._run is not None:
            self._run.cancel()

    def give_back(self) -> None:
        """
        End it now, unpunished.
        """
        self._given_back = True
        self._interrupt()

    def make_void(self, reason: str) -> None:
        """
        End it now and write nothing: its lease is lost.
        """
        self.void = reason
        self._interrupt()

    def abandon(self) -> None:
        """
        Have its handler stop if it can, since nobody will hear of it. From any thread, while the
        loop stands still.
        """
        if self._run is not None:
            self._run.abandon()

    def decide(self, outcome: Outcome) -> Settlement:
        """
        How it would be settled with this outcome; never raises.
        """
        handler = self._tools.registry.get(self.claim.name)
        try:
            return self._follow(outcome, handler.policy.backoff if handler else Backoff())
        except Exception as error:
            # A backoff of somebody's own, or a mistake of ours.
            return self._decide_anew(error)

    def _interrupt(self) -> None:
        # Never in the middle of a settle, whose outcome would be unknown then.
        if self._run is not None:
            self._run.interrupt()

    def _context(self) -> Context:
        claim, tools = self.claim, self._tools
        return Context(
            claim,
            on_progress=lambda progress: tools.on_progress(claim, progress),
        )

    # From the handler's end to the settle

    def _on_run_end(self, outcome: Outcome | None) -> None:
        self._run = None
        self._run_seconds = time.monotonic() - self._began_at
        if outcome is None:
            self._end(Released(), ran_seconds=None)
        else:
            self._end(outcome, ran_seconds=self._run_seconds)

    def _end_without_run(self, outcome: Outcome) -> None:
        self._end(outcome, ran_seconds=None)

    def _end(self, outcome: Outcome, *, ran_seconds: float | None) -> None:
        # Whatever fails here, there must be a settle: nobody waits for this attempt, and the
        # heartbeats would keep its lease for as long as the worker lives.
        try:
            self._tools.on_handler_end(ran_seconds)
        except Exception as error:
            # The worker's books are its own affair. Logged at once; raised, it might end with
            # whatever called us, unseen.
            fact = {"message": "A worker could not free a slot.", "exception": error}
            asyncio.get_running_loop().call_exception_handler(fact)
        self._settle(self.decide(outcome))

    def _decide_anew(self, error: Exception) -> Settlement:
        fact = f"Its outcome could not be decided: {error_kind(error)}: {error_message(error)}"
        failure = Failure("Crashed", fact[:REASON_LENGTH_MAX], error_traceback(error))
        try:
            return self._follow(Crashed(failure), Backoff())
        except Exception:
            # Not even that can be decided. A dead letter is seen, and can be redriven.
            return Settlement(Event.FAIL, failure=failure)

    def _follow(self, outcome: Outcome, backoff: Backoff) -> Settlement:
        return decide(
            outcome,
            failures=self.claim.failures,
            max_attempts=self.claim.max_attempts,
            backoff=backoff,
            random=random.random(),
        )

    def _settle(self, settlement: Settlement) -> None:
        if self.void is not None:
            return self._conclude(settlement, written=False)
        claim = self.claim
        self.settlement = settlement
        settled = self._tools.settler.submit(Settling(claim.task_id, claim.lease_id, settlement))
        settled.add_done_callback(lambda settled: self._on_settled(settlement, settled))

    def _on_settled(self, settlement: Settlement, settled: asyncio.Future[bool]) -> None:
        if settled.cancelled():
            return  # The process ends; the reaper finds the lease.
        error = settled.exception()
        if error is None:
            return self._conclude(settlement, written=settled.result())
        reason = repr(error)[:REASON_LENGTH_MAX]
        if isinstance(error, StoreUnavailable):
            reason = str(error)
        else:
            # A result is too precious to be thrown away for a mishap on the way.
            self._refusals += 1
        if self._refusals < REFUSALS_MAX:
            seconds = random.uniform(*SETTLE_RETRY_SECONDS)
            asyncio.get_running_loop().call_later(seconds, self._settle, settlement)
            events.settle_delayed(task_id=self.claim.task_id, reason=reason)
        elif settlement.event is Event.FAIL:
            self.void = f"its outcome cannot be stored: {reason}"
            self._conclude(settlement, written=False)
        else:
            # PostgreSQL will not take this result, now or ever; the task must still end.
            failure = Failure("Unstorable", f"The outcome cannot be stored: {reason}")
            self._settle(Settlement(Event.FAIL, failure=failure))

    def _conclude(self, settlement: Settlement, *, written: bool) -> None:
        # Before the log, which may lead to a terminal that has gone.
        self._tools.on_end(self)
        claim = self.claim
        if written:
            failure = settlement.failure
            events.attempt_settled(
                task_id=claim.task_id,
                name=claim.name,
                queue=claim.queue,
                tenant_id=claim.tenant_id,
                attempt=claim.attempt,
                outcome=settlement.outcome,
                run_seconds=self._run_seconds,
                failure=failure.kind if failure else None,
                retry_seconds=settlement.delay_seconds if settlement.delay_seconds else None,
            )
        else:
            events.attempt_void(
                task_id=claim.task_id,
                name=claim.name,
                attempt=claim.attempt,
                reason=self.void or "its lease was taken away",
            )


def make_settler(db: Database) -> Batcher[Settling, bool]:
    """
    Settles what ends at the same time in one statement.
    """

    async def flush(settlings: Sequence[Settling]) -> Sequence[bool]:
        written = await settle.settle(db, settlings)
        if all(written):
            return written
        # What was not written may have been before: by a call whose answer got lost, or one
        # that was refused for another settlement and is repeated for each.
        recorded = await settle.recorded(db, settlings)
        return [now or before for now, before in zip(written, recorded, strict=True)]

    # One statement at a time, so that they are few and large: PostgreSQL spends a sixth less.
    return Batcher(
        flush,
        size_max=SETTLE_SIZE_MAX,
        weigh=_weight,
        weight_max=SETTLE_BYTES_MAX,
        in_flight_max=1,
    )


def _weight(settling: Settling) -> int:
    result = settling.settlement.result
    return 0 if result is None else len(result)


def _later(call: Callable[[Outcome], None], outcome: Outcome) -> None:
    asyncio.get_running_loop().call_soon(call, outcome)
