"""
Known bugs for mutation testing: the checker must find each.

Each is a mistake made in a real system of this kind. A mutant replaces a name or part of a
statement when a process starts, which only `process` does; AsyncFlow itself knows nothing of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from asyncflow.domain import outcome
from asyncflow.domain.outcome import Crashed, Released, Settlement
from asyncflow.domain.states import Event
from asyncflow.errors import StoreUnavailable
from asyncflow.maintenance import reaper
from asyncflow.relay.feed import Feed
from asyncflow.relay.sending import Pack as SentPack
from asyncflow.store import claims, database, hints, sqlstates, steer, upkeep, workers
from asyncflow.store import settle as store_settle
from asyncflow.store import submit as store_submit
from asyncflow.store.database import Executor
from asyncflow.store.settle import Settling
from asyncflow.transport.amqp import Channel
from asyncflow.transport.rabbitmq.message import Pack
from asyncflow.transport.rabbitmq.transport import RabbitTransport
from asyncflow.worker import attempt, lease


@dataclass(frozen=True, slots=True)
class Mutant:
    """
    A bug, and what a run needs to expose it.

    Attributes:
        summary: What is wrong.
        plant: Introduces it into this process.
        faults: The kinds of faults that expose it; empty if the workload alone does.
        seconds: The duration of the faults in a run that looks for it.
        rate: Tasks per second; higher if a fault must hit a task at a certain moment.
        engine: The engine that has the bug.
    """

    summary: str
    plant: Callable[[], None]
    faults: tuple[str, ...] = ()
    seconds: float = 12.0
    rate: float = 100.0
    engine: str = "postgres"


MUTANTS: dict[str, Mutant] = {}


def _mutant(summary: str, **needs: Any) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def declare(plant: Callable[[], None]) -> Callable[[], None]:
        name = plant.__name__.strip("_").replace("_", "-")
        MUTANTS[name] = Mutant(summary, plant, **needs)
        return plant

    return declare


def _instead_of(piece: str, other: str, statement: str) -> str:
    """
    Replace part of a statement, which must contain it: a mutant must change something.
    """
    if piece not in statement:
        raise ValueError(f"The statement has no {piece!r} to replace.")
    return statement.replace(piece, other)


def _in_claims(piece: str, other: str = "") -> None:
    """
    Replace part of both statements that claim due tasks.
    """
    claims.CLAIM_DUE = _instead_of(piece, other, claims.CLAIM_DUE)
    claims.CLAIM_DUE_SINCE = _instead_of(piece, other, claims.CLAIM_DUE_SINCE)


def _leave_out_the_fence(*events: Event) -> None:
    fence = f"t.lease_id = {claims.LEASE}"
    for event in events:
        # The parameter must still be used, or its type is unknown.
        store_settle._SETTLES[event] = _instead_of(
            fence, "$2::uuid[] IS NOT NULL", store_settle._SETTLES[event]
        )


# Leases


@_mutant(
    "A worker settles without naming its lease.",
    faults=("cut-off",),
    seconds=20.0,
    rate=400.0,
)
def _settle_without_lease() -> None:
    _leave_out_the_fence(Event.COMPLETE, Event.FAIL, Event.CANCEL)


@_mutant("A claim neither locks its rows nor rechecks their state.", seconds=4.0)
def _claim_without_lock() -> None:
    _in_claims("FOR UPDATE SKIP LOCKED")
    _in_claims("AND t.state IN ('pending', 'queued')")


@_mutant("A worker uses one lease for all its claims.", seconds=4.0)
def _lease_reused() -> None:
    original = claims.claim_due

    async def claim_due(db: Executor, *, lease_id: Any, worker_id: Any, **more: Any) -> Any:
        return await original(db, lease_id=worker_id, worker_id=worker_id, **more)

    claims.claim_due = claim_due


@_mutant(
    "A worker without heartbeats does not fence itself.",
    faults=("cut-off",),
    seconds=10.0,
)
def _fence_forgotten() -> None:
    lease.LeaseKeeper._fence_if_overdue = lambda self: None  # type: ignore[method-assign]


@_mutant("Heartbeats continue although the event loop is blocked.", faults=("stall",), seconds=2.0)
def _stall_unnoticed() -> None:
    lease.LeaseKeeper._check_stall = lambda self: None  # type: ignore[method-assign]


# The reaper


@_mutant(
    "The reaper acts late, and by task id alone.",
    faults=("kill-worker",),
    seconds=15.0,
)
def _reaper_by_id() -> None:
    original = upkeep.lost_leases

    async def lost_leases(db: Executor, **more: Any) -> Any:
        lost = await original(db, **more)
        if lost:
            await asyncio.sleep(1.5)
        return lost

    upkeep.lost_leases = lost_leases
    _leave_out_the_fence(Event.FAIL, Event.RETRY)


@_mutant("The reaper declares workers dead whose last heartbeat is recent.")
def _reaper_impatient() -> None:
    workers.MARK_LOST = _instead_of(
        "w.lease_seconds * interval", "0.3 * w.heartbeat_seconds * interval", workers.MARK_LOST
    )


@_mutant("A crash is not charged to the task.", seconds=6.0)
def _crash_unpunished() -> None:
    original = outcome.decide

    def decide(what: outcome.Outcome, **facts: Any) -> outcome.Settlement:
        return original(Released() if isinstance(what, Crashed) else what, **facts)

    for module in (attempt, reaper):
        module.decide = decide  # type: ignore[attr-defined]


# Settling and counting


@_mutant(
    "A worker assumes a settlement that PostgreSQL never confirmed.",
    faults=("postgres-crash", "lose-requests"),
    seconds=10.0,
    rate=400.0,
)
def _settle_believed() -> None:
    original = store_settle.settle

    async def settle(db: Executor, settlings: Sequence[Settling]) -> list[bool]:
        try:
            return await original(db, settlings)
        except StoreUnavailable:
            return [True] * len(settlings)

    store_settle.settle = settle


@_mutant(
    "A worker acknowledges a task before its settlement is committed.",
    faults=("postgres-crash", "lose-requests"),
    seconds=10.0,
    rate=400.0,
)
def _ack_before_settle() -> None:
    async def settle(self: attempt.Attempt, settlement: Settlement) -> bool:
        if self.void is not None:
            return False
        self.settlement, claim = settlement, self.claim
        settled = self._tools.settler.submit(Settling(claim.task_id, claim.lease_id, settlement))
        settled.add_done_callback(lambda settled: settled.cancelled() or settled.exception())
        return True

    attempt.Attempt._settle = settle  # type: ignore[method-assign]


@_mutant(
    "A missing privilege is treated as a refusal of the values.",
    faults=("revoke",),
    seconds=12.0,
)
def _right_missing_refused() -> None:
    sqlstates.MEANINGS[sqlstates.NO_RIGHT] = sqlstates.Meaning.REFUSED


@_mutant(
    "A statement without an answer is waited for endlessly.",
    faults=("forget",),
    seconds=20.0,
)
def _silence_trusted() -> None:
    original = database.Database.__init__

    def without_limit(self: database.Database, url: str, **more: Any) -> None:
        original(self, url, **more | {"timeout_seconds": 3_600.0})

    database.Database.__init__ = without_limit  # type: ignore[method-assign]


@_mutant("A claim resets the attempt number.", seconds=4.0)
def _attempt_reset() -> None:
    _in_claims("attempt = t.attempt + 1", "attempt = 1")


@_mutant("A claim does not check whether the task is due.", seconds=4.0)
def _early_claim() -> None:
    _in_claims("AND t.run_at <= now()")


@_mutant(
    "A worker uses its own clock to decide which tasks are due.",
    faults=("clock-jump",),
    seconds=30.0,
)
def _due_by_own_clock() -> None:
    original, clock = claims.claim_due, "now()"

    async def claim_due(db: Executor, **more: Any) -> Any:
        nonlocal clock
        before, clock = clock, f"to_timestamp({time.time()})"
        _in_claims(f"t.run_at <= {before}", f"t.run_at <= {clock}")
        return await original(db, **more)

    claims.claim_due = claim_due


@_mutant("A task with an expiry is cancelled before its time.", seconds=5.0)
def _expired_early() -> None:
    upkeep.EXPIRE = _instead_of("t.expires_at <= now()", "t.expires_at IS NOT NULL", upkeep.EXPIRE)


@_mutant("A cancellation does not check the state of the task.", seconds=5.0)
def _cancel_overwrites() -> None:
    guard = "AND t.state IN ('pending', 'queued')"
    steer.CANCEL_WAITING = _instead_of(guard, "", steer.CANCEL_WAITING)


# Accepting


@_mutant(
    "PostgreSQL confirms a commit before it is on disk.",
    faults=("postgres-crash",),
    seconds=8.0,
)
def _commit_unsynced() -> None:
    database.PLANNER["synchronous_commit"] = "off"


@_mutant(
    "The API answers 202 whatever PostgreSQL says.",
    faults=("terminate-backends", "postgres-crash"),
    seconds=8.0,
)
def _submit_believed() -> None:
    original = store_submit.submit

    async def submit(db: Executor, tasks: Sequence[Any]) -> list[store_submit.Submitted]:
        try:
            return await original(db, tasks)
        except StoreUnavailable:
            now = datetime.now(UTC)
            return [store_submit._submitted(now, run_at=now) for _ in tasks]

    store_submit.submit = submit


@_mutant(
    "The API stores a batch in two transactions.",
    faults=("postgres-crash",),
    seconds=8.0,
)
def _batch_in_halves() -> None:
    original = store_submit.submit

    async def submit(db: Executor, tasks: Sequence[Any]) -> list[store_submit.Submitted]:
        half = len(tasks) // 2
        submitted = await original(db, tasks[:half])
        if half:
            await asyncio.sleep(0.2)
        return submitted + await original(db, tasks[half:])

    store_submit.submit = submit


# RabbitMQ


@_mutant(
    "Hints lost by RabbitMQ are not replaced.",
    faults=("broker-purge", "broker-delete-queues"),
    engine="rabbitmq",
)
def _hints_not_reconciled() -> None:
    async def unqueue_lost(db: Executor, **more: Any) -> int:
        return 0

    hints.unqueue_lost = unqueue_lost


@_mutant(
    "The relay marks a hint as sent before it sends it, and lost hints are not replaced.",
    faults=("broker-close-connections",),
    engine="rabbitmq",
)
def _relay_commits_first() -> None:
    async def send(
        self: Feed, db: Executor, channel: Channel, queue: str, packs: Sequence[SentPack]
    ) -> int:
        await self._mark(db, [task for pack in packs for task in pack])
        await asyncio.sleep(0.2)
        return len((await self._sender.publish(channel, queue, packs)).confirmed)

    Feed._send = send  # type: ignore[method-assign]
    _hints_not_reconciled()


@_mutant(
    "A worker requeues a hint whose task is running elsewhere.",
    faults=("reset-broker", "broker-close-connections"),
    seconds=20.0,
    rate=30.0,
    engine="rabbitmq",
)
def _nack_requeue() -> None:
    original = RabbitTransport._let_go
    running = "SELECT id FROM asyncflow.tasks_live WHERE id = ANY ($1) AND state = 'running'"

    async def let_go(self: RabbitTransport, unclaimed: dict[Any, Pack]) -> None:
        for row in await self._db.fetch(running, [*unclaimed]):
            unclaimed.pop(row["id"]).give_back()
        await original(self, unclaimed)

    RabbitTransport._let_go = let_go  # type: ignore[method-assign,assignment]


@_mutant(
    "A worker runs the task that a message names, whatever its state.",
    faults=("reset-broker", "broker-close-connections"),
    engine="rabbitmq",
)
def _message_is_truth() -> None:
    claims.CLAIM_HINTED = _instead_of(
        "AND t.state IN ('pending', 'queued')",
        "AND t.state IN ('pending', 'queued', 'running')",
        claims.CLAIM_HINTED,
    )
