"""
Receives the messages of a worker's queues, over one channel.

A message is unacknowledged from delivery to the end of the last attempt that came of it, so the
broker's prefetch bounds how many hints are at one worker and leaves the others their share. Where
messages carry packs, the prefetch is that much smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from asyncflow.errors import QueueUnusable
from asyncflow.telemetry import events
from asyncflow.transport.amqp import BrokerTimeout, Channel, ChannelClosed, Delivery
from asyncflow.transport.rabbitmq.diagnosis import explained
from asyncflow.transport.rabbitmq.message import Hint, Pack, decode_hints
from asyncflow.transport.rabbitmq.queue_backoff import QueueBackoff
from asyncflow.transport.rabbitmq.topology import broker_queue, declare_task_queue


class Consumers:
    """
    The consumers of one channel, one per queue.

    A queue that cannot be used backs off, and costs the channel: the next one does without it.

    Args:
        on_hints: Called with the hints of messages that arrived together.

    Attributes:
        channel: The one that they share.
    """

    def __init__(
        self,
        channel: Channel,
        backoff: QueueBackoff,
        *,
        prefix: str,
        on_hints: Callable[[list[Hint]], None],
    ) -> None:
        self.channel = channel
        self._backoff = backoff
        self._prefix = prefix
        self._on_hints = on_hints
        self._by_queue: dict[str, Consumer] = {}

    @property
    def queues(self) -> Collection[str]:
        """
        The queues that were added.
        """
        return self._by_queue.keys()

    def are_far_from(self, window: int) -> bool:
        """
        Whether to `adjust` them to this window.
        """
        return any(consumer.prefetch.is_far_from(window) for consumer in self._by_queue.values())

    async def add(self, queue: str) -> None:
        """
        Declare a queue and add a consumer for it, which does not consume yet.

        Raises:
            QueueUnusable: It backs off.
        """
        with self._backing_off_if_unusable(queue):
            await declare_task_queue(self.channel, queue, prefix=self._prefix)
        name = broker_queue(queue, prefix=self._prefix)
        self._by_queue[queue] = Consumer(self.channel, name, on_hints=self._on_hints)

    async def adjust(self, window: int) -> None:
        """
        Have each queue send as many messages as bring `window` hints; 0 stops all consumers.

        Raises:
            QueueUnusable: It backs off.
        """
        for queue, consumer in self._by_queue.items():
            if consumer.prefetch.is_far_from(window):
                await self._adjust(queue, consumer, window)

    async def _adjust(self, queue: str, consumer: Consumer, window: int) -> None:
        former = consumer.tag
        if window:
            with self._backing_off_if_unusable(queue):
                await consumer.begin(window)
            self._backoff.worked(queue)
        else:
            consumer.pause()
        if former is not None:
            await self.channel.cancel(former)

    @contextmanager
    def _backing_off_if_unusable(self, queue: str) -> Iterator[None]:
        try:
            yield
        except (BrokerTimeout, ChannelClosed) as error:
            self._backoff.failed(queue, now=time.monotonic())
            reason = str(explained(error, prefix=self._prefix))
            events.broker_queue_unusable(role="worker", queue=queue, reason=reason)
            raise QueueUnusable(queue, error) from error


class Consumer:
    """
    Consumes one queue of RabbitMQ.

    Args:
        queue: Its name in RabbitMQ.
        on_hints: Called with the hints of messages that arrived together.

    Attributes:
        prefetch: What it asks RabbitMQ for.
        tag: RabbitMQ's name for it; None while it does not consume.
    """

    def __init__(
        self, channel: Channel, queue: str, *, on_hints: Callable[[list[Hint]], None]
    ) -> None:
        self.prefetch = Prefetch()
        self.tag: str | None = None
        self._channel = channel
        self._queue = queue
        self._on_hints = on_hints

    async def begin(self, window: int) -> None:
        """
        Have RabbitMQ send as many messages as bring `window` hints, 1 or more.
        """
        self.prefetch.messages = self.prefetch.wanted(window)
        self.tag = await self._channel.consume(
            self._queue,
            prefetch=self.prefetch.messages,
            on_deliveries=self._receive,
            # A deaf consumer on a healthy channel is the nastiest outage.
            on_cancelled=self._channel.abandon,
        )

    def pause(self) -> None:
        """
        Ask for no messages; those that were sent still arrive until its tag is cancelled.
        """
        self.prefetch.messages = 0
        self.tag = None

    def _receive(self, deliveries: Sequence[Delivery]) -> None:
        hints: list[Hint] = []
        largest = 0
        for delivery in deliveries:
            task_ids = decode_hints(delivery.body)
            if task_ids is None:
                self._park(delivery)
                continue
            pack = Pack(self._channel, delivery.tag, hints=len(task_ids))
            hints += [(task_id, pack) for task_id in task_ids]
            largest = max(largest, len(task_ids))
        if hints:
            self.prefetch.observe(largest)
            self._on_hints(hints)

    def _park(self, delivery: Delivery) -> None:
        """
        Move a message that is not ours to read to where a person can inspect it.
        """
        events.message_unreadable(queue=delivery.routing_key, body_bytes=len(delivery.body or b""))
        self._channel.nack(delivery.tag, requeue=False)


@dataclass(slots=True)
class Prefetch:
    """
    How many messages bring as many hints as a worker wants.

    Attributes:
        messages: How many may be unacknowledged now.
        hints_per_message: How many hints the largest recent messages had.
    """

    messages: int = 0
    hints_per_message: int = 1

    def observe(self, hints: int) -> None:
        """
        Take the largest of some messages into account; forget a larger one by halves.
        """
        self.hints_per_message = max(hints, self.hints_per_message // 2)

    def wanted(self, window: int) -> int:
        """
        How many messages bring as many hints as `window`; at least 1 unless that is 0.
        """
        if self.hints_per_message == 1 or not window:
            return window
        # A pack counts until its last hint is used up, so one more keeps work coming.
        return 1 + window // self.hints_per_message

    def is_far_from(self, window: int) -> bool:
        """
        Whether changing the prefetch is worth the two calls it costs.
        """
        wanted = self.wanted(window)
        return wanted >= 2 * self.messages or wanted <= self.messages // 4
