"""
Hints through RabbitMQ: deliveries in, claims out, acks back.

The connection has a supervisor of its own here rather than a client that "reconnects
robustly": on any break everything is torn down and built anew, and a consumer that the
broker cancels (its queue was deleted, a consumer timeout) counts as a break, so a worker is
never connected and deaf.

A message carries the hint of one task or, while workers run short tasks faster than single
messages could feed them, a pack of some. Which, decides the relay.

How many hints may be out at one worker is its `window`, the slots it has and a little more
when tasks are short. A message is unacknowledged from delivery to the end of the last attempt
that came of it, so the broker's prefetch does the counting and gives other workers their
share; where packs arrive, the prefetch is that much smaller. Two messages leave that scheme
early:

- One with a hint that found no free slot within `WAIT_SECONDS_MAX`, which happens to a worker
  of several queues, or where slow tasks were packed with quick ones, goes back as a whole, and
  the worker stops consuming until a slot is free. What runs here of it carries on; who gets
  the message next cannot claim that.
- One that came `EARLY_ACK_SECONDS` ago is acknowledged, before RabbitMQ's own consumer timeout
  (30 minutes) strikes. The leases of its tasks carry on alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from uuid import UUID, uuid4

from asyncflow.domain.task import Claim
from asyncflow.errors import InvalidSettings, QueueUnusable, StoreError, TransportError
from asyncflow.settings import masked
from asyncflow.store import claims, hints
from asyncflow.store.database import Database
from asyncflow.store.installation import identity
from asyncflow.telemetry import events
from asyncflow.telemetry.seldom import Seldom
from asyncflow.transport import Claimant
from asyncflow.transport.amqp import BrokerTimeout, Channel, ChannelClosed, Delivery, connect
from asyncflow.transport.rabbitmq.diagnosis import explained
from asyncflow.transport.rabbitmq.queue_backoff import Reconnecting, RestingQueues
from asyncflow.transport.rabbitmq.topology import (
    PREFIX,
    broker_queue,
    declare_dead_letters,
    declare_task_queue,
    decode_hints,
    own,
)

OUTAGE_SECONDS = (0.2, 1.0)
"""A random wait while PostgreSQL is away."""

TICK_SECONDS = 0.25
WAIT_SECONDS_MAX = 0.25
EARLY_ACK_SECONDS = 600.0
STOP_SECONDS = 5.0

DECLINE_SECONDS = 1.0
"""How long a task rests that reached a worker which does not offer its name."""


class Pack:
    """
    A message that was delivered, until it is acknowledged or given back; both only once.

    A delivery tag means nothing on another channel, so it goes with its own.
    """

    __slots__ = ("_channel", "_tag", "_unsettled", "arrived")

    def __init__(self, channel: Channel, tag: int, *, hints: int) -> None:
        self._channel = channel
        self._tag = tag
        self._unsettled = hints
        self.arrived = time.monotonic()

    def settle_one(self) -> None:
        """
        One of its hints is used up; with the last one the message may go.
        """
        self._unsettled -= 1
        if self._unsettled == 0:
            self._channel.ack(self._tag)

    def settle(self) -> None:
        """
        All of its hints are as good as used up.
        """
        if self._unsettled > 0:
            self._unsettled = 0
            self._channel.ack(self._tag)

    def give_back(self) -> None:
        """
        Let another worker have it, whatever of it runs here.
        """
        if self._unsettled > 0:
            self._unsettled = 0
            self._channel.nack(self._tag, requeue=True)


Hint: TypeAlias = tuple[UUID, Pack]
"""A task id, and the message it came in."""


@dataclass(slots=True)
class Consumer:
    """
    How messages come from one queue.

    Attributes:
        tag: None while it does not consume.
        prefetch: How many messages may be here unacknowledged.
        hints_per_message: What the largest ones bring lately.
    """

    tag: str | None = None
    prefetch: int = 0
    hints_per_message: int = 1

    def observe(self, hints: int) -> None:
        """
        Take note of the largest message among some; forget an older one by halves.
        """
        self.hints_per_message = max(hints, self.hints_per_message // 2)

    def prefetch_for(self, window: int) -> int:
        """
        How many messages bring as many hints as `window`, 1 or more unless that is 0.
        """
        if self.hints_per_message == 1 or not window:
            return window
        # A pack counts until its last hint is used up, so one more keeps work coming.
        return 1 + window // self.hints_per_message

    def is_far_from(self, window: int) -> bool:
        """
        Whether its prefetch is worth changing; that costs two calls.
        """
        wanted = self.prefetch_for(window)
        return wanted >= 2 * self.prefetch or wanted <= self.prefetch // 4


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
    ) -> None:
        self._db = db
        self._claimant = claimant
        self._broker_url = broker_url
        self._prefix = prefix
        self._installation: str | None = None
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
        self._consumers: dict[str, Consumer] = {}
        self._queues: list[str] = []
        self._resting = RestingQueues()
        self._reconnecting = Reconnecting()
        self._unknown = Seldom()
        self._channel: Channel | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """
        Begin to connect; does not wait for RabbitMQ.
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
                self._want(window)
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

    def finished(self, claim: Claim) -> None:
        """
        See `Transport.finished`.
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
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._quiet.wait()

    async def close(self) -> None:
        """
        See `Transport.close`.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # From hints to claims

    async def _claim(self, hints: Sequence[Hint]) -> list[Claim]:
        packs: dict[UUID, Pack] = {}
        for task_id, pack in hints:
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
            # This worker cannot now; another may, so ask the broker for nothing meanwhile.
            events.database_unavailable(where="claim", reason=str(error))
            _give_back(packs.values())
            self._pause()
            await asyncio.sleep(random.uniform(*OUTAGE_SECONDS))
            return []
        for claim in taken:
            self._claimed[claim.task_id, claim.lease_id] = packs.pop(claim.task_id)
        if packs:
            await self._let_go(packs)
        return taken

    async def _let_go(self, unclaimed: Mapping[UUID, Pack]) -> None:
        # Finished, running elsewhere, not due, unknown: nothing to do. But a queued task of
        # a name we do not offer must not lose its turn. Should that fail, the relay finds
        # out that the hint is gone.
        with contextlib.suppress(StoreError):
            await hints.decline(
                self._db, list(unclaimed), names=self._names, delay_seconds=DECLINE_SECONDS
            )
            unknown = await hints.count_unknown(self._db, list(unclaimed))
            if unknown and (count := self._unknown.count("unknown", unknown)):
                events.hints_unknown(count=count)
        for pack in unclaimed.values():
            pack.settle_one()

    # The connection

    async def _supervise(self) -> None:
        while not self._stopped:
            may_pass = True
            try:
                await self._serve_one_connection()
            except QueueUnusable:
                pass  # It was reported, and rests.
            except StoreError as error:
                events.database_unavailable(where="broker", reason=str(error))
            except (TransportError, InvalidSettings) as error:
                # Settings were checked at the start; a certificate file may go later.
                finding = explained(error, prefix=self._prefix)
                may_pass = finding.may_pass
                events.broker_unavailable(
                    role="worker", reason=str(finding), may_pass=finding.may_pass
                )
            finally:
                self._forget_deliveries()
            if not self._stopped:
                await asyncio.sleep(self._reconnecting.wait_seconds(may_pass=may_pass))

    async def _serve_one_connection(self) -> None:
        connection = await connect(self._broker_url, name="asyncflow worker")
        try:
            channel = await connection.channel()
            await self._own(channel)
            await declare_dead_letters(channel, prefix=self._prefix)
            self._queues = self._usable_queues()
            for queue in self._queues:
                with self._resting_if_unusable(queue):
                    await declare_task_queue(channel, queue, prefix=self._prefix)
            events.broker_connected(role="worker", url=masked(self._broker_url))
            self._reconnecting.worked()
            self._channel = channel
            await self._consume(channel)
        finally:
            self._channel = None
            await connection.close()

    async def _own(self, channel: Channel) -> None:
        """
        Make sure that no other installation's hints are used up here.
        """
        self._installation = self._installation or await identity(self._db)
        if self._installation is not None:
            await own(
                channel,
                installation=self._installation,
                prefix=self._prefix,
                on_lost=channel.abandon,
            )

    def _usable_queues(self) -> list[str]:
        now = time.monotonic()
        return [q for q in self._claimant.queues if not self._resting.rests(q, now=now)]

    @contextlib.contextmanager
    def _resting_if_unusable(self, queue: str) -> Iterator[None]:
        try:
            yield
        except (BrokerTimeout, ChannelClosed) as error:
            # The next connection does without it, so that the other queues are served.
            self._resting.failed(queue, now=time.monotonic())
            reason = str(explained(error, prefix=self._prefix))
            events.broker_queue_unusable(role="worker", queue=queue, reason=reason)
            raise QueueUnusable(queue, error) from error

    async def _consume(self, channel: Channel) -> None:
        """
        Keep the consumers as this worker wants them, until the channel breaks.
        """
        broken = asyncio.ensure_future(channel.wait_closed())
        try:
            while not broken.done():
                self._changed.clear()
                await self._adjust_consumers(channel)
                if self._stopped:
                    # Attempts are still running; their acks need the channel.
                    await broken
                changed = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({broken, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            if (reason := broken.result()) is not None:
                raise reason
        finally:
            broken.cancel()

    async def _adjust_consumers(self, channel: Channel) -> None:
        window = 0 if self._paused or self._stopped else self._window
        if window:
            self._quiet.clear()
        for queue in self._queues:
            consumer = self._consumers.setdefault(queue, Consumer())
            if consumer.is_far_from(window):
                await self._adjust_consumer(channel, queue, consumer, window)
        if not window:
            _give_back(pack for _, pack in self._inbox)
            self._inbox.clear()
            self._quiet.set()

    async def _adjust_consumer(
        self, channel: Channel, queue: str, consumer: Consumer, window: int
    ) -> None:
        former, consumer.tag = consumer.tag, None
        consumer.prefetch = consumer.prefetch_for(window)
        if consumer.prefetch:
            with self._resting_if_unusable(queue):
                consumer.tag = await channel.consume(
                    broker_queue(queue, prefix=self._prefix),
                    prefetch=consumer.prefetch,
                    on_deliveries=lambda deliveries: self._receive(channel, consumer, deliveries),
                    # A deaf consumer on a healthy channel is the nastiest outage.
                    on_cancelled=channel.abandon,
                )
            self._resting.worked(queue)
        if former is not None:
            await channel.cancel(former)

    def _receive(
        self, channel: Channel, consumer: Consumer, deliveries: Sequence[Delivery]
    ) -> None:
        largest = 0
        for delivery in deliveries:
            task_ids = decode_hints(delivery.body)
            if task_ids is None:
                events.message_unreadable(
                    queue=delivery.routing_key, body_bytes=len(delivery.body or b"")
                )
                channel.nack(delivery.tag, requeue=False)
                continue
            pack = Pack(channel, delivery.tag, hints=len(task_ids))
            self._inbox.extend([(task_id, pack) for task_id in task_ids])
            largest = max(largest, len(task_ids))
        if largest:
            consumer.observe(largest)
            if consumer.is_far_from(self._window):
                self._changed.set()
        self._arrived.set()

    def _forget_deliveries(self) -> None:
        # The broker delivers them again. Claims already made carry on; their acks go nowhere.
        self._inbox.clear()
        self._claimed.clear()
        self._consumers.clear()
        self._quiet.set()

    # The window

    def _want(self, window: int) -> None:
        resume, self._paused = self._paused, False
        self._window = window
        if resume or any(c.is_far_from(window) for c in self._consumers.values()):
            self._changed.set()

    def _pause(self) -> None:
        self._paused = True
        self._changed.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            if (
                self._inbox
                and not self._taking
                and now - self._inbox[0][1].arrived > WAIT_SECONDS_MAX
                and not self._paused
            ):
                self._pause()
            if self._channel is not None and self._usable_queues() != self._queues:
                # A queue has rested: begin anew, with it; what is running goes on.
                self._channel.abandon()
            for pack in self._claimed.values():
                if now - pack.arrived > EARLY_ACK_SECONDS:
                    pack.settle()


def _give_back(packs: Iterable[Pack]) -> None:
    for pack in packs:
        pack.give_back()
