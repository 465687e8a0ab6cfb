"""
Tasks directly from PostgreSQL, without a broker: claim what is due, sleep until woken.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from uuid import uuid4

from asyncflow.aio.waiting import set_within
from asyncflow.domain.task import Claim
from asyncflow.errors import StoreError
from asyncflow.store.database import Database
from asyncflow.store.due import Due
from asyncflow.store.wakeups import RECONNECT_SECONDS, Listener
from asyncflow.telemetry import events
from asyncflow.transport import Claimant


@dataclass(frozen=True, slots=True)
class Times:
    """
    In seconds.

    Attributes:
        poll: The safety net under wake-ups, and how late a delayed task may start.
        outage: Bounds of a random wait between tries while PostgreSQL is away, so that workers do
            not return in step.
        listen: The wait before it listens for wake-ups again after that connection broke.
    """

    poll: float = 0.5
    outage: tuple[float, float] = (0.2, 1.0)
    listen: float = RECONNECT_SECONDS


TIMES = Times()


class PostgresTransport:
    """
    Claims due tasks by SKIP LOCKED; a wake-up or the next poll ends a wait.
    """

    def __init__(self, db: Database, claimant: Claimant, *, times: Times = TIMES) -> None:
        self._claimant = claimant
        self._times = times
        self._queues = list(claimant.queues)
        self._due = Due(db)
        self._woken = asyncio.Event()
        self._stopped = False
        self._listener = Listener(db, self._woken.set, reconnect_seconds=times.listen)

    async def open(self) -> None:
        """
        Start to listen; does not wait for PostgreSQL.
        """
        await self._listener.__aenter__()

    async def take(self, slots: int, *, window: int) -> list[Claim]:
        """
        See `Transport.take`.
        """
        while not self._stopped:
            self._woken.clear()
            try:
                taken = await self._claim(slots)
            except StoreError as error:
                events.database_unavailable(where="claim", reason=str(error))
                await set_within(self._woken, random.uniform(*self._times.outage))
                continue
            if taken:
                return taken
            await set_within(self._woken, self._times.poll)
        return []

    def let_go(self, claim: Claim) -> None:
        """
        Do nothing: there was no message.
        """

    async def stop(self) -> None:
        """
        See `Transport.stop`.
        """
        self._stopped = True
        self._woken.set()

    async def close(self) -> None:
        """
        See `Transport.close`.
        """
        await self._listener.__aexit__(None, None, None)
        await self._due.aclose()

    async def _claim(self, slots: int) -> list[Claim]:
        # Another queue comes first each time, so that none waits behind another's backlog.
        self._queues.append(self._queues.pop(0))
        return await self._due.claim(
            lease_id=uuid4(),
            worker_id=self._claimant.worker_id,
            offers=self._claimant.offers,
            queues=self._queues,
            limit=slots,
        )
