"""
Hints that RabbitMQ dropped because an operator's policy told it to.

A policy may limit a queue's length or its messages' age. RabbitMQ then moves hints to a queue of
their own (see `topology`). Their tasks go back to pending immediately, and the relay shrinks the
queue's window until it fits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple
from uuid import UUID

from asyncflow.store import hints
from asyncflow.store.database import Executor
from asyncflow.telemetry import events
from asyncflow.telemetry.throttle import Throttle
from asyncflow.transport.amqp import Channel, Connection, Delivery, MalformedFrame
from asyncflow.transport.rabbitmq.message import decode_hints
from asyncflow.transport.rabbitmq.topology import broker_queue, dropped

MESSAGES_MAX = 100

REFUSED = "refused"
"""RabbitMQ did not accept a hint in the first place."""

_LEAVE_OUT = "leave AsyncFlow's queues out of the policy or operator policy"
POLICIES = {
    "expired": f"A policy sets message-ttl, which these hints outlived; {_LEAVE_OUT}.",
    "maxlen": f"A policy sets max-length or max-length-bytes; {_LEAVE_OUT}, or raise the limit.",
    "delivery_limit": f"A policy sets delivery-limit; {_LEAVE_OUT}.",
    REFUSED: (
        "RabbitMQ refused them: a policy sets max-length and overflow reject-publish, or the queue "
        f"has lost its majority; {_LEAVE_OUT}, or start the nodes that are missing."
    ),
}
"""Why RabbitMQ does not keep a hint, with the remedy, by the reason that it gives."""


class Dropped(NamedTuple):
    """
    What RabbitMQ dropped of one queue for one reason.

    Attributes:
        cause: A sentence with the remedy.
    """

    queue: str
    cause: str
    task_ids: list[UUID]


class DroppedHints:
    """
    Receives dropped hints and gives their tasks back.
    """

    def __init__(self, *, prefix: str) -> None:
        self._prefix = prefix
        self._throttle = Throttle()
        self._received: list[tuple[Channel, Delivery]] = []

    @asynccontextmanager
    async def receiving(self, connection: Connection) -> AsyncIterator[Channel]:
        """
        Receive dropped hints for one block, on a channel of its own.
        """
        channel = await connection.channel()
        try:
            await channel.consume(
                dropped(self._prefix),
                prefetch=MESSAGES_MAX,
                on_deliveries=lambda found: self._received.extend((channel, one) for one in found),
                on_cancelled=channel.abandon,
            )
            yield channel
        finally:
            self._received.clear()
            channel.abandon()

    async def unqueue(self, db: Executor) -> list[Dropped]:
        """
        Put the tasks of all hints received so far back to pending; return what was dropped.
        """
        received, self._received = self._received, []
        found = self._sorted([message for _, message in received])
        for drop in found:
            await hints.unqueue_dropped(db, drop.task_ids)
        for channel, message in received:
            channel.ack(message.tag)
        for drop in found:
            if count := self._throttle.add((drop.queue, drop.cause), len(drop.task_ids)):
                events.hints_dropped(queue=drop.queue, cause=drop.cause, count=count)
        return found

    def _sorted(self, messages: Sequence[Delivery]) -> list[Dropped]:
        found: defaultdict[tuple[str, str], list[UUID]] = defaultdict(list)
        for message in messages:
            task_ids = decode_hints(message.body)
            if task_ids is None:
                events.message_unreadable(
                    queue=message.routing_key, body_bytes=len(message.body or b"")
                )
                continue
            queue = message.routing_key.removeprefix(broker_queue("", prefix=self._prefix))
            found[queue, _cause(message)] += task_ids
        return [Dropped(queue, cause, task_ids) for (queue, cause), task_ids in found.items()]


def _cause(message: Delivery) -> str:
    try:
        reason = str(message.headers.get("x-last-death-reason"))
    except MalformedFrame:
        reason = "unknown"
    return POLICIES.get(reason, f"RabbitMQ dropped it ({reason}).")
