"""
Settles the attempts of dead workers.

They are settled as crashed, by the pure decision and the fenced statements that a worker uses. If
the worker was alive after all, its own settle and this one race for the lease, and one of them
writes.
"""

from __future__ import annotations

import math
import random
import time

from asyncflow.domain.outcome import Cancelled, Crashed, Failure, Outcome, Released, decide
from asyncflow.errors import StoreError
from asyncflow.store import settle, upkeep, workers
from asyncflow.store.database import Executor
from asyncflow.store.settle import Settling
from asyncflow.store.upkeep import LostLease
from asyncflow.telemetry import events

BATCH = 500


class Reaper:
    """
    Declares workers dead, but not those that an outage kept away.

    When PostgreSQL restarts its backends, another server takes over, a right is revoked for a while
    or the schema is restored, every heartbeat is overdue for a moment. The database does not show
    that; a reaper that could not use it remembers.

    A lease whose worker has no row was restored from a backup, and the row may be restored, too.
    After the same grace such a lease is released, which counts as no failure.

    Args:
        grace_seconds: How long live workers may take to come back after an outage or a start of
            PostgreSQL.
    """

    def __init__(self, *, grace_seconds: float = 10.0) -> None:
        self._grace_seconds = grace_seconds
        self._outage_at = -math.inf

    async def reap(self, db: Executor) -> int:
        """
        Declare workers dead and settle their attempts; return how many attempts.

        Raises:
            StoreError: Remembered as an outage.
        """
        try:
            await self._declare_lost(db)
            return await self._settle_lost(db)
        except StoreError:
            self._outage_at = time.monotonic()
            raise

    async def _declare_lost(self, db: Executor) -> None:
        lost = await workers.mark_lost(
            db, grace_seconds=self._grace_seconds, outage_seconds_ago=self._outage_seconds_ago
        )
        for worker_id, name in lost:
            events.worker_declared_lost(worker_id=worker_id, name=name)

    async def _settle_lost(self, db: Executor) -> int:
        lost = await upkeep.lost_leases(
            db,
            limit=BATCH,
            of_unknown_workers=self._outage_seconds_ago > self._grace_seconds,
        )
        if not lost:
            return 0
        written = await settle.settle(db, [_settling(lease) for lease in lost])
        events.leases_reaped(count=sum(written))
        return sum(written)

    @property
    def _outage_seconds_ago(self) -> float:
        return time.monotonic() - self._outage_at


def _settling(lease: LostLease) -> Settling:
    settlement = decide(
        _outcome(lease),
        failures=lease.failures,
        max_attempts=lease.max_attempts,
        backoff=lease.backoff,
        random=random.random(),
    )
    return Settling(lease.task_id, lease.lease_id, settlement)


def _outcome(lease: LostLease) -> Outcome:
    if lease.cancel_requested:
        return Cancelled(Failure("Cancelled", "Cancelled; its worker was gone by then."))
    if not lease.worker_known:
        return Released()
    return Crashed(Failure("WorkerLost", f"Worker {lease.worker_id} died or was cut off."))
