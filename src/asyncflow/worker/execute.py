"""
One attempt, top to bottom: run the handler, decide, settle, let the hint go.

The settle is the point of the exercise. It is tried until PostgreSQL answers, for as long
as the lease can be trusted; the hint is let go only after it. An attempt may also end early
in two ways: it is *given back* (the worker is stopping), which settles as a release, or it
is *void* (the lease is lost), which writes nothing because nothing may be written.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from asyncflow.batching import Batcher
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
from asyncflow.errors import StoreUnavailable
from asyncflow.handlers import Context, Progress, Registry
from asyncflow.store import claims
from asyncflow.store.claims import Claim, Settling
from asyncflow.store.database import Database
from asyncflow.telemetry import events
from asyncflow.transport import Transport
from asyncflow.worker.isolation import Cancellation, Isolation

SETTLE_RETRY_SECONDS = (0.1, 0.6)
SETTLE_BYTES_MAX = 4 * 1024 * 1024
REFUSALS_MAX = 3
REASON_LENGTH_MAX = 1_000


@dataclass(slots=True, eq=False)
class Attempt:
    """
    A claim that this worker is working on.

    Attributes:
        cancellation: Set when somebody asked to cancel the task.
        void: Why the lease is lost; None while it holds.
        given_back: The worker is stopping and does not wait for it.
        task: The asyncio task that executes it; None while it waits for a slot.
        in_handler: Its handler runs, so ending it early means interrupting that.
    """

    claim: Claim
    cancellation: Cancellation = field(default_factory=Cancellation)
    taken_at: float = field(default_factory=time.monotonic)
    void: str | None = None
    given_back: bool = False
    task: asyncio.Task[None] | None = None
    in_handler: bool = False

    def give_back(self) -> None:
        """
        End it now, unpunished.
        """
        self.given_back = True
        self._interrupt()

    def make_void(self, reason: str) -> None:
        """
        End it now and write nothing: its lease is lost.
        """
        self.void = reason
        self._interrupt()

    def _interrupt(self) -> None:
        # Never in the middle of a settle, whose outcome would be unknown then.
        if self.in_handler and self.task is not None:
            self.task.cancel()


@dataclass(frozen=True, slots=True)
class Tools:
    """
    What executing an attempt needs.

    Attributes:
        settler: Writes settlements in natural batches; True means written.
        on_progress: Takes what handlers report, from any thread.
        on_end: Called once per attempt before it is settled, with the seconds its handler
            ran; None if it did not run to its end.
    """

    registry: Registry
    isolation: Isolation
    transport: Transport
    settler: Batcher[Settling, bool]
    on_progress: Callable[[Claim, Progress], None]
    on_end: Callable[[float | None], None]


def make_settler(db: Database) -> Batcher[Settling, bool]:
    """
    Settles what ends at the same time in one statement.
    """

    async def flush(settlings: Sequence[Settling]) -> Sequence[bool]:
        return await claims.settle(db, settlings)

    return Batcher(flush, size_max=500, weigh=_weight, weight_max=SETTLE_BYTES_MAX)


def _weight(settling: Settling) -> int:
    result = settling.settlement.result
    return 0 if result is None else len(result)


async def execute(attempt: Attempt, tools: Tools) -> None:
    """
    Work one attempt off. Never raises: whatever happens is an outcome, or the lease is lost.
    """
    started = time.monotonic()
    ran_seconds: float | None = None
    outcome: Outcome = Released()
    if not attempt.given_back and attempt.void is None:
        attempt.in_handler = True
        try:
            outcome = await _run_handler(attempt, tools)
            ran_seconds = time.monotonic() - started
        except asyncio.CancelledError:
            pass  # By `give_back` or `make_void`: the settle below knows what to do.
        except Exception as error:
            # Ours, or the machine's, such as no more threads. Punished all the same, or a task
            # that always ends like this would run for ever.
            outcome = Crashed(Failure("Crashed", f"The attempt could not be run: {error!r}"))
        finally:
            attempt.in_handler = False
    tools.on_end(ran_seconds)
    run_seconds = time.monotonic() - started
    await _settle(attempt, outcome, run_seconds, tools)
    tools.transport.finished(attempt.claim)


async def _run_handler(attempt: Attempt, tools: Tools) -> Outcome:
    claim = attempt.claim
    handler = tools.registry.get(claim.name)
    if handler is None:
        # Claims are made for the names of this registry, so this is our own mistake.
        return Failed(Failure("UnknownHandler", f"This worker offers no {claim.name!r}."))
    context = Context(
        task_id=claim.task_id,
        name=claim.name,
        queue=claim.queue,
        attempt=claim.attempt,
        max_attempts=claim.max_attempts,
        lease_id=claim.lease_id,
        tenant_id=claim.tenant_id,
        timeout_seconds=claim.timeout_seconds,
        on_progress=lambda progress: tools.on_progress(claim, progress),
    )
    return await tools.isolation.run(
        handler, claim.payload, context, cancelled=attempt.cancellation
    )


async def _settle(attempt: Attempt, outcome: Outcome, run_seconds: float, tools: Tools) -> None:
    claim = attempt.claim
    settlement = decide(
        outcome,
        failures=claim.failures,
        max_attempts=claim.max_attempts,
        backoff=_backoff(claim, tools.registry),
        random=random.random(),
    )
    written = await _settle_while_leased(attempt, settlement, tools)
    if not written:
        reason = attempt.void or "its lease was taken away"
        events.attempt_void(
            task_id=claim.task_id, name=claim.name, attempt=claim.attempt, reason=reason
        )
        return
    failure = settlement.failure
    events.attempt_settled(
        task_id=claim.task_id,
        name=claim.name,
        queue=claim.queue,
        tenant_id=claim.tenant_id,
        attempt=claim.attempt,
        outcome=settlement.event,
        run_seconds=run_seconds,
        failure=failure.kind if failure else None,
        retry_seconds=settlement.delay_seconds if settlement.delay_seconds else None,
    )


async def _settle_while_leased(attempt: Attempt, settlement: Settlement, tools: Tools) -> bool:
    claim = attempt.claim
    refusals = 0
    while attempt.void is None:
        settling = Settling(claim.task_id, claim.lease_id, settlement)
        try:
            return await tools.settler.submit(settling)
        except StoreUnavailable as error:
            events.settle_delayed(task_id=claim.task_id, reason=str(error))
            await asyncio.sleep(random.uniform(*SETTLE_RETRY_SECONDS))
        except Exception as error:
            why = repr(error)[:REASON_LENGTH_MAX]
            refusals += 1
            if refusals < REFUSALS_MAX:
                # A result is too precious to be thrown away for a mishap on the way.
                events.settle_delayed(task_id=claim.task_id, reason=why)
                await asyncio.sleep(random.uniform(*SETTLE_RETRY_SECONDS))
            elif settlement.event is Event.FAIL:
                attempt.void = f"its outcome cannot be stored: {why}"
            else:
                # PostgreSQL will not take this result, now or ever; the task must still end.
                failure = Failure("Unstorable", f"The outcome cannot be stored: {why}")
                settlement = Settlement(Event.FAIL, failure=failure)
    return False


def _backoff(claim: Claim, registry: Registry) -> Backoff:
    handler = registry.get(claim.name)
    return handler.policy.backoff if handler else Backoff()
