"""
Everything that runs in the background, with its period. One glance tells.

A chore does one bounded piece of work and says how much that was; as long as it finds some,
it runs again at once. The relay is not in this list: it is woken rather than timed.
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

TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Chore:
    """
    One background duty.

    Attributes:
        run_once: Does a bounded piece of it and returns how many tasks that touched.
        period_seconds: How long it rests when there was nothing to do.
        wakes: What it touches may be due at once, so wake the workers.
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
    The list.

    Args:
        has_broker: Whether a relay runs beside them, which looks after queued tasks.
        relay_trouble: Why it cannot send hints, for those who ask the database.
    """

    async def be_seen(db: Executor) -> int:
        await sign(db, relay_trouble=relay_trouble())
        return 0

    listed = [
        Chore("reap", Reaper().reap, period_seconds=1.0, wakes=True),
        Chore("expire", expire, period_seconds=1.0),
        Chore("move", move, period_seconds=5.0, wakes=True),
        Chore("be seen", be_seen, period_seconds=2.0),
        Chore("look for unserved", UnservedWatch().look, period_seconds=10.0),
        Chore("prune", partial(prune, retention_days=retention_days), period_seconds=60.0),
    ]
    if not has_broker:
        listed.append(Chore("unqueue", unqueue, period_seconds=2.0, wakes=True))
    return listed


async def run_chore(chore: Chore, db: Executor, waker: Waker) -> None:
    """
    Run a chore for ever, at its period; a failure waits for the next turn.
    """
    while True:
        count = 0
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                count = await chore.run_once(db)
        except Exception as error:
            # Whatever it is, the other chores go on; the log says so at every turn.
            events.chore_failed(chore=chore.name, reason=str(error) or "it took too long")
        if count and chore.wakes:
            waker.wake()
        if not count:
            # Not in step with the same chore of other processes.
            await asyncio.sleep(chore.period_seconds * random.uniform(0.8, 1.0))
