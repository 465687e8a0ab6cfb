"""
Hints through RabbitMQ: deliveries in, claims out, acks back.

The connection has a supervisor of its own here rather than a client that "reconnects
robustly": on any break everything is torn down and built anew, and a consumer that the
broker cancels (its queue was deleted, a consumer timeout) counts as a break, so a worker is
never connected and deaf.

How many hints may be out at one worker is its `window`, the slots it has and a little more
when tasks are short. A hint is unacknowledged from delivery to the end of its attempt, so
the broker's prefetch does the counting and gives other workers their share. Two hints leave
that scheme early:

- One that found no free slot within `WAIT_SECONDS_MAX`, which happens to a worker of several
  queues, goes back and the worker stops consuming until a slot is free.
- One whose attempt has lasted `EARLY_ACK_SECONDS` is acknowledged, before RabbitMQ's own
  consumer timeout (30 minutes) strikes. Its lease carries on alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple
from uuid import UUID, uuid4

from asyncflow.errors import InvalidSettings, StoreUnavailable, TransportError
from asyncflow.settings import masked
from asyncflow.store import admission, claims
from asyncflow.store.claims import Claim
from asyncflow.store.database import Database
from asyncflow.telemetry import events
from asyncflow.transport import Claimant
from asyncflow.transport.amqp import BrokerTimeout, Channel, ChannelClosed, Delivery, connect
from asyncflow.transport.resting import RestingQueues
from asyncflow.transport.topology import (
    broker_queue,
    declare_task_queue,
    declare_unreadable,
    decode_hint,
)

RECONNECT_SECONDS = (0.2, 1.5)
"""A random wait between tries, so that workers do not return in step."""

OUTAGE_SECONDS = (0.2, 1.0)
"""A random wait while PostgreSQL is away."""

TICK_SECONDS = 0.25
WAIT_SECONDS_MAX = 0.25
EARLY_ACK_SECONDS = 600.0
STOP_SECONDS = 5.0

DECLINE_SECONDS = 1.0
"""How long a task rests that reached a worker which does not offer its name."""


class Hint(NamedTuple):
    """
    A delivery and where it came from; a delivery tag means nothing on another channel.
    """

    task_id: UUID
    channel: Channel
    tag: int
    arrived: float


class RabbitTransport:
    """
    Claims the tasks whose hints RabbitMQ delivers.
    """

    def __init__(self, db: Database, claimant: Claimant, *, broker_url: str) -> None:
        self._db = db
        self._claimant = claimant
        self._broker_url = broker_url
        self._names = [offer.name for offer in claimant.offers]
        self._inbox: deque[Hint] = deque()
        self._claimed: dict[tuple[UUID, UUID], list[Hint]] = {}
        self._arrived = asyncio.Event()
        self._changed = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._window = 1
        self._paused = False
        self._taking = False
        self._stopped = False
        self._consuming: dict[str, str] = {}
        self._consuming_window = 0
        self._queues: list[str] = []
        self._resting = RestingQueues()
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
        for hint in self._claimed.pop((claim.task_id, claim.lease_id), ()):
            hint.channel.ack(hint.tag)

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
        by_id: dict[UUID, list[Hint]] = {}
        for hint in hints:
            by_id.setdefault(hint.task_id, []).append(hint)
        try:
            taken = await claims.claim_hinted(
                self._db,
                list(by_id),
                lease_id=uuid4(),
                worker_id=self._claimant.worker_id,
                offers=self._claimant.offers,
            )
        except StoreUnavailable as error:
            # This worker cannot now; another may, so ask the broker for nothing meanwhile.
            events.database_unavailable(where="claim", reason=str(error))
            _give_back(hints)
            self._pause()
            await asyncio.sleep(random.uniform(*OUTAGE_SECONDS))
            return []
        for claim in taken:
            self._claimed[claim.task_id, claim.lease_id] = by_id.pop(claim.task_id)
        if by_id:
            await self._let_go(by_id)
        return taken

    async def _let_go(self, unclaimed: dict[UUID, list[Hint]]) -> None:
        # Finished, running elsewhere, not due, unknown: nothing to do. But a queued task of
        # a name we do not offer must not lose its turn. Should that fail, the relay finds
        # out that the hint is gone.
        with contextlib.suppress(StoreUnavailable):
            await admission.decline(
                self._db, list(unclaimed), names=self._names, delay_seconds=DECLINE_SECONDS
            )
        for hints in unclaimed.values():
            for hint in hints:
                hint.channel.ack(hint.tag)

    # The connection

    async def _supervise(self) -> None:
        while not self._stopped:
            try:
                await self._serve_one_connection()
            except (TransportError, InvalidSettings) as error:
                # Settings were checked at the start; a certificate file may go later.
                events.broker_unavailable(role="worker", reason=str(error))
            finally:
                self._forget_deliveries()
            if not self._stopped:
                await asyncio.sleep(random.uniform(*RECONNECT_SECONDS))

    async def _serve_one_connection(self) -> None:
        connection = await connect(self._broker_url, name="asyncflow worker")
        try:
            channel = await connection.channel()
            await declare_unreadable(channel)
            self._queues = self._usable_queues()
            for queue in self._queues:
                with self._resting_if_unusable(queue):
                    await declare_task_queue(channel, queue)
            events.broker_connected(role="worker", url=masked(self._broker_url))
            self._channel = channel
            await self._consume(channel)
        finally:
            self._channel = None
            await connection.close()

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
            events.broker_queue_unusable(role="worker", queue=queue, reason=str(error))
            raise

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
        wanted = 0 if self._paused or self._stopped else self._window
        if wanted == self._consuming_window:
            return
        self._consuming_window = wanted
        former, self._consuming = self._consuming, {}
        if wanted:
            self._quiet.clear()
            for queue in self._queues:
                with self._resting_if_unusable(queue):
                    self._consuming[queue] = await channel.consume(
                        broker_queue(queue),
                        prefetch=wanted,
                        on_deliveries=lambda deliveries: self._receive(channel, deliveries),
                        # A deaf consumer on a healthy channel is the nastiest outage.
                        on_cancelled=channel.abandon,
                    )
                self._resting.worked(queue)
        for tag in former.values():
            await channel.cancel(tag)
        if not wanted:
            _give_back(self._inbox)
            self._inbox.clear()
            self._quiet.set()

    def _receive(self, channel: Channel, deliveries: Sequence[Delivery]) -> None:
        now = time.monotonic()
        for delivery in deliveries:
            task_id = decode_hint(delivery.body)
            if task_id is None:
                events.message_unreadable(
                    queue=delivery.routing_key, body_bytes=len(delivery.body or b"")
                )
                channel.nack(delivery.tag, requeue=False)
            else:
                self._inbox.append(Hint(task_id, channel, delivery.tag, now))
        self._arrived.set()

    def _forget_deliveries(self) -> None:
        # The broker delivers them again. Claims already made carry on; their acks go nowhere.
        self._inbox.clear()
        self._claimed.clear()
        self._consuming.clear()
        self._consuming_window = 0
        self._quiet.set()

    # The window

    def _want(self, window: int) -> None:
        resume, self._paused = self._paused, False
        # Changing a prefetch costs two calls per queue, so small wishes are not followed.
        if resume or window >= 2 * self._window or window <= self._window // 4:
            self._window = window
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
                and now - self._inbox[0].arrived > WAIT_SECONDS_MAX
                and not self._paused
            ):
                self._pause()
            if self._channel is not None and self._usable_queues() != self._queues:
                # A queue has rested: begin anew, with it; what is running goes on.
                self._channel.abandon()
            for hints in self._claimed.values():
                for hint in hints:
                    if now - hint.arrived > EARLY_ACK_SECONDS:
                        hint.channel.ack(hint.tag)
                hints[:] = [h for h in hints if now - h.arrived <= EARLY_ACK_SECONDS]


def _give_back(hints: Iterable[Hint]) -> None:
    for hint in hints:
        hint.channel.nack(hint.tag, requeue=True)
