"""
Hints through RabbitMQ: deliveries in, claims out, acks back.

The connection has a supervisor of its own rather than a client that "reconnects robustly": on any
break everything is torn down and built again. A consumer that the broker cancels (its queue was
deleted, a consumer timeout) counts as a break, so a worker is never connected and deaf.

A message carries the hint of one task or, while workers run short tasks faster than single
messages could feed them, a pack of hints. The relay decides which.

How many hints may be at one worker is its `window`: its slots, and a little more when tasks are
short. The prefetch of its consumers follows the window (see `consumer`), and two kinds of message
leave that scheme early:

- A message with a hint that found no free slot within `Times.wait_max` goes back as a whole, and
  the worker stops consuming until a slot is free. This happens to a worker of several queues, or
  where slow tasks were packed with quick ones. Its tasks that run here carry on, and the next
  worker to get the message cannot claim those.
- A message that came `Times.early_ack` ago is acknowledged, before RabbitMQ's own consumer timeout
  (30 minutes) strikes. The leases of its tasks carry on alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID, uuid4

from asyncflow.aio.background import cancel
from asyncflow.aio.waiting import set_within
from asyncflow.domain.task import Claim
from asyncflow.errors import InvalidSettings, QueueUnusable, StoreError, TransportError
from asyncflow.settings import masked
from asyncflow.store import claims, hints
from asyncflow.store.database import Database
from asyncflow.telemetry import events
from asyncflow.telemetry.throttle import Throttle
from asyncflow.transport import Claimant
from asyncflow.transport.amqp import Channel, connect
from asyncflow.transport.rabbitmq.consumer import Consumers
from asyncflow.transport.rabbitmq.diagnosis import explained
from asyncflow.transport.rabbitmq.message import Hint, Pack
from asyncflow.transport.rabbitmq.ownership import OWNED_SECONDS, Ownership
from asyncflow.transport.rabbitmq.queue_backoff import (
    BackoffTimes,
    ConnectionBackoff,
    QueueBackoff,
)
from asyncflow.transport.rabbitmq.topology import (
    PREFIX,
    declare_dead_letters,
)


@dataclass(frozen=True, slots=True)
class Times:
    """
    In seconds.

    Attributes:
        outage: Bounds of a random wait while PostgreSQL is away.
        tick: How often waiting hints, long attempts and backoffs are checked.
        wait_max: How long a hint may wait here for a free slot.
        early_ack: After how long a message is acknowledged although its attempts still run.
        stop_max: How long `stop` waits for hints to go back.
        decline: How long a task rests that reached a worker which does not offer its name.
        backoff: Waits after failures of RabbitMQ.
        owned: How long the names in RabbitMQ stay ours after the last process has left.
    """

    outage: tuple[float, float] = (0.2, 1.0)
    tick: float = 0.25
    wait_max: float = 0.25
    early_ack: float = 600.0
    stop_max: float = 5.0
    decline: float = 1.0
    backoff: BackoffTimes = field(default_factory=BackoffTimes)
    owned: float = OWNED_SECONDS


TIMES = Times()


class RabbitTransport:
    """
    Claims the tasks whose hints RabbitMQ delivers.

    Args:
        prefix: What the names in RabbitMQ begin with.
    """

    def __init__(
        self,
        db: Database,
        claimant: Claimant,
        *,
        broker_url: str,
        prefix: str = PREFIX,
        times: Times = TIMES,
    ) -> None:
        self._db = db
        self._claimant = claimant
        self._broker_url = broker_url
        self._prefix = prefix
        self._times = times
        self._names = [offer.name for offer in claimant.offers]
        self._inbox: deque[Hint] = deque()
        self._claimed: dict[tuple[UUID, UUID], Pack] = {}
        self._arrived = asyncio.Event()
        self._changed = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._window = 1
        self._paused = False
        self._taking = False
        self._stopped = False
        self._ownership = Ownership(db, prefix=prefix, owned_seconds=times.owned)
        self._queue_backoff = QueueBackoff(times.backoff)
        self._connection_backoff = ConnectionBackoff(times.backoff)
        self._throttle = Throttle()
        self._consumers: Consumers | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """
        Start to connect; does not wait for RabbitMQ.
        """
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._supervise()), loop.create_task(self._tick())]
        for task in self._tasks:
            task.add_done_callback(lambda _: self._arrived.set())

    async def take(self, slots: int, *, window: int) -> list[Claim]:
        """
        See `Transport.take`.
        """
        self._taking = True
        try:
            while not self._stopped:
                self._resume(window)
                self._arrived.clear()
                for task in self._tasks:
                    if task.done():
                        task.result()  # It failed by our own mistake; better lame than deaf.
                if self._inbox:
                    count = min(slots, len(self._inbox))
                    taken = await self._claim([self._inbox.popleft() for _ in range(count)])
                    if taken:
                        return taken
                else:
                    await self._arrived.wait()
            return []
        finally:
            self._taking = False

    def let_go(self, claim: Claim) -> None:
        """
        See `Transport.let_go`.
        """
        pack = self._claimed.pop((claim.task_id, claim.lease_id), None)
        if pack is not None:
            pack.settle_one()

    async def stop(self) -> None:
        """
        See `Transport.stop`.
        """
        self._stopped = True
        self._changed.set()
        self._arrived.set()
        # The supervisor ends the consumers and gives back what they delivered meanwhile.
        await set_within(self._quiet, self._times.stop_max)

    async def close(self) -> None:
        """
        See `Transport.close`.
        """
        await cancel(*self._tasks)

    # From hints to claims

    async def _claim(self, received: Sequence[Hint]) -> list[Claim]:
        packs: dict[UUID, Pack] = {}
        for task_id, pack in received:
            if task_id in packs:
                pack.settle_one()  # It came twice, and one hint is enough.
            else:
                packs[task_id] = pack
        try:
            taken = await claims.claim_hinted(
                self._db,
                list(packs),
                lease_id=uuid4(),
                worker_id=self._claimant.worker_id,
                offers=self._claimant.offers,
            )
        except StoreError as error:
            # This worker cannot claim now. Another may, so ask the broker for nothing meanwhile.
            events.database_unavailable(where="claim", reason=str(error))
            _give_back(packs.values())
            self._pause()
            await asyncio.sleep(random.uniform(*self._times.outage))
            return []
        for claim in taken:
            self._claimed[claim.task_id, claim.lease_id] = packs.pop(claim.task_id)
        if packs:
            await self._let_go(packs)
        return taken

    async def _let_go(self, unclaimed: Mapping[UUID, Pack]) -> None:
        # Finished, running elsewhere, not due, unknown: nothing to do. But a queued task of
        # a name we do not offer must not lose its turn. Should that fail, the relay notices
        # that its hint is lost.
        with contextlib.suppress(StoreError):
            await hints.decline(
                self._db, list(unclaimed), names=self._names, delay_seconds=self._times.decline
            )
            unknown = await hints.count_unknown(self._db, list(unclaimed))
            if unknown and (count := self._throttle.add("unknown", unknown)):
                events.hints_unknown(count=count)
        for pack in unclaimed.values():
            pack.settle_one()

    # The connection

    async def _supervise(self) -> None:
        while not self._stopped:
            try:
                may_pass = await self._serve_until_it_fails()
            finally:
                self._forget_deliveries()
            if not self._stopped:
                await asyncio.sleep(self._connection_backoff.next(may_pass=may_pass))

    async def _serve_until_it_fails(self) -> bool:
        """
        Serve; report what ends that, and return whether it passes by itself.
        """
        try:
            await self._serve_one_connection()
        except QueueUnusable:
            pass  # It was reported, and backs off.
        except StoreError as error:
            events.database_unavailable(where="broker", reason=str(error))
        except (TransportError, InvalidSettings) as error:
            # Settings were checked at the start; a certificate file may go later.
            finding = explained(error, prefix=self._prefix)
            reason, may_pass = str(finding), finding.may_pass
            events.broker_unavailable(role="worker", reason=reason, may_pass=may_pass)
            return may_pass
        return True

    async def _serve_one_connection(self) -> None:
        connection = await connect(self._broker_url, name="asyncflow worker")
        try:
            channel = await connection.channel()
            await self._ownership.claim(channel, on_lost=channel.abandon)
            await declare_dead_letters(channel, prefix=self._prefix)
            consumers = Consumers(
                channel, self._queue_backoff, prefix=self._prefix, on_hints=self._receive
            )
            for queue in self._usable_queues():
                await consumers.add(queue)
            events.broker_connected(role="worker", url=masked(self._broker_url))
            self._connection_backoff.reset()
            self._consumers = consumers
            await self._consume(channel, consumers)
        finally:
            self._consumers = None
            await connection.close()

    def _usable_queues(self) -> list[str]:
        now, queues = time.monotonic(), dict.fromkeys(self._claimant.queues)
        return [queue for queue in queues if not self._queue_backoff.skips(queue, now=now)]

    async def _consume(self, channel: Channel, consumers: Consumers) -> None:
        """
        Keep the consumers as this worker wants them, until the channel breaks.
        """
        broken = asyncio.ensure_future(channel.wait_closed())
        broken.add_done_callback(lambda _: self._changed.set())
        try:
            while not broken.done():
                self._changed.clear()
                await self._adjust(consumers)
                if self._stopped:
                    # Attempts are still running; their acks need the channel.
                    await broken
                await self._changed.wait()
            if (reason := broken.result()) is not None:
                raise reason
        finally:
            broken.cancel()

    async def _adjust(self, consumers: Consumers) -> None:
        window = 0 if self._paused or self._stopped else self._window
        if window:
            self._quiet.clear()
        await consumers.adjust(window)
        if not window:
            _give_back(pack for _, pack in self._inbox)
            self._inbox.clear()
            self._quiet.set()

    def _receive(self, hints: Sequence[Hint]) -> None:
        self._inbox.extend(hints)
        self._arrived.set()
        if self._consumers is not None and self._consumers.are_far_from(self._window):
            self._changed.set()

    def _forget_deliveries(self) -> None:
        # The broker delivers them again. Claims already made carry on; their acks go nowhere.
        self._inbox.clear()
        self._claimed.clear()
        self._quiet.set()

    # The window

    def _resume(self, window: int) -> None:
        was_paused, self._paused = self._paused, False
        self._window = window
        if was_paused or (self._consumers is not None and self._consumers.are_far_from(window)):
            self._changed.set()

    def _pause(self) -> None:
        self._paused = True
        self._changed.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._times.tick)
            now = time.monotonic()
            is_waiting = self._inbox and not self._taking and not self._paused
            if is_waiting and now - self._inbox[0][1].arrived > self._times.wait_max:
                self._pause()
            self._reconnect_after_a_backoff()
            for pack in self._claimed.values():
                if now - pack.arrived > self._times.early_ack:
                    pack.settle()

    def _reconnect_after_a_backoff(self) -> None:
        consumers = self._consumers
        if consumers is not None and consumers.queues != {*self._usable_queues()}:
            # The next connection serves that queue too; what is running here goes on.
            consumers.channel.abandon()


def _give_back(packs: Iterable[Pack]) -> None:
    for pack in packs:
        pack.give_back()
