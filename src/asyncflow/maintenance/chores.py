"""
Every chore of a maintenance process, with its period.

A chore does one bounded piece of work and returns how much that was. While it finds work, it runs
again without a rest. The relay is not a chore: it is woken rather than timed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from asyncflow.maintenance.expirer import expire
from asyncflow.maintenance.mover import move
from asyncflow.maintenance.pruner import prune
from asyncflow.maintenance.reaper import Reaper
from asyncflow.maintenance.unqueuer import unqueue
from asyncflow.maintenance.unserved import UnservedWatch
from asyncflow.store.database import Executor
from asyncflow.store.presence import sign
from asyncflow.store.wakeups import Waker
from asyncflow.telemetry import events

TURN_SECONDS_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Chore:
    """
    One kind of background work.

    Attributes:
        run_once: Does a bounded piece of it and returns how many tasks that changed.
        period_seconds: How long to rest after a turn that changed nothing.
        wakes: Whether to wake workers, because the changed tasks may be due.
    """

    name: str
    run_once: Callable[[Executor], Awaitable[int]]
    period_seconds: float
    wakes: bool = False


def chores(
    *,
    retention_days: float,
    has_broker: bool,
    relay_trouble: Callable[[], str | None] = lambda: None,
) -> list[Chore]:
    """
    The chores of one maintenance process.

    Args:
        has_broker: Whether a relay runs too; it takes care of queued tasks.
        relay_trouble: Why it cannot send hints now, to be reported through the database.
    """

    async def report(db: Executor) -> int:
        await sign(db, relay_trouble=relay_trouble())
        return 0

    listed = [
        Chore("reap", Reaper().reap, period_seconds=1.0, wakes=True),
        Chore("expire", expire, period_seconds=1.0),
        Chore("move", move, period_seconds=5.0, wakes=True),
        Chore("report", report, period_seconds=2.0),
        Chore("watch unserved", UnservedWatch().check, period_seconds=10.0),
        Chore("prune", partial(prune, retention_days=retention_days), period_seconds=60.0),
    ]
    if not has_broker:
        listed.append(Chore("unqueue", unqueue, period_seconds=2.0, wakes=True))
    return listed


async def run_chore(
    chore: Chore, db: Executor, waker: Waker, *, turn_seconds_max: float = TURN_SECONDS_MAX
) -> None:
    """
    Run a chore at its period until cancelled; a turn that fails is followed by the next one.
    """
    while True:
        count = 0
        try:
            async with asyncio.timeout(turn_seconds_max):
                count = await chore.run_once(db)
        except Exception as error:
            # Of any kind: chores must not stop. Every failed turn is logged.
            events.chore_failed(chore=chore.name, reason=str(error) or "it took too long")
        if count and chore.wakes:
            waker.wake()
        if not count:
            # Random, so that processes do not run the same chore in step.
            await asyncio.sleep(chore.period_seconds * random.uniform(0.8, 1.0))
